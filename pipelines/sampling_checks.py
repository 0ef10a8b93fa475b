"""The arguments of a call that samples: what fits, and what is named where it does not."""

import math
from typing import Any

import torch
from diffusers import ModelMixin

from .guidance import GuidanceScale, network_of, scale_at


def check_counts(num_images_per_label: int, num_inference_steps: int, batch_size: int | None, num_train: int) -> None:
    """Raises ValueError unless these are positive, and the steps at most `num_train`."""
    for name, count in (("num_images_per_label", num_images_per_label), ("batch_size", batch_size)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be at least 1, got {count!r}")
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= num_train:
        raise ValueError(f"num_inference_steps must be in [1, {num_train}], got {num_inference_steps!r}")


def check_guidance(
    energy_model: ModelMixin,
    labels: torch.Tensor | None,
    guidance_scale: GuidanceScale,
    classifier_free_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    auto_guidance_model: Any = None,
    auto_guidance_scale: float = 1.0,
) -> None:
    """Raises ValueError unless these guide, see `Guidance`; a scale of the noise level is asked at every timestep."""
    if callable(guidance_scale):
        num_timesteps = energy_model.config.num_train_timesteps
        scales = [scale_at(guidance_scale, timestep / num_timesteps) for timestep in range(num_timesteps)]
        wrong = next((scale for scale in scales if not (math.isfinite(scale) and scale >= 0)), None)
        guidance_scale = max(scales) if wrong is None else wrong
    check_scales(energy_model, labels, guidance_scale, classifier_free_scale)
    check_interval(guidance_interval)
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
    check_auto_guidance(energy_model, auto_guidance_model, auto_guidance_scale)


def check_auto_guidance(energy_model: ModelMixin, auto_guidance_model: Any, auto_guidance_scale: float) -> None:
    """Raises ValueError unless there is no weaker model and no scale, or both, and the model fits the stronger one."""
    if not math.isfinite(auto_guidance_scale):
        raise ValueError(f"auto_guidance_scale must be finite, got {auto_guidance_scale}")
    if auto_guidance_model is None:
        if auto_guidance_scale != 1:
            raise ValueError(f"auto_guidance_scale={auto_guidance_scale} needs auto_guidance_model, got None")
        return
    weaker = network_of(auto_guidance_model)
    if not callable(getattr(weaker, "potential", None)):
        kind = type(auto_guidance_model).__name__
        raise ValueError(f"auto_guidance_model must be an EnergyModel or an EGCPipeline, got {kind}")
    if auto_guidance_scale == 1:
        raise ValueError("auto_guidance_scale=1 would ignore auto_guidance_model; more than 1 leads away from it")
    for field in ("num_classes", "class_embedding", "in_channels", "sample_size"):
        own, other = energy_model.config[field], weaker.config[field]
        if own != other:
            raise ValueError(f"auto_guidance_model has {field}={other}, the pipeline's network has {own}")
    own, other = (model.alphas_cumprod.float().cpu() for model in (energy_model, weaker))
    if own.shape != other.shape or not torch.allclose(own, other, atol=1e-5):
        raise ValueError("auto_guidance_model has another noise schedule than the pipeline's network")
    # Offloaded weights come to where they are needed; others stay where they are.
    if not any(hasattr(model, "_hf_hook") for model in (energy_model, weaker)) and energy_model.device != weaker.device:
        raise ValueError(f"auto_guidance_model is on {weaker.device}, the pipeline's network on {energy_model.device}")


def check_selection(
    labels: torch.Tensor | None, latents: torch.Tensor | None, num_candidates: int, select_by: str
) -> None:
    """Raises ValueError unless so many candidates can be drawn for an image, and judged so."""
    if not isinstance(num_candidates, int) or num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates!r}")
    if select_by not in ("classifier", "density", "both"):
        raise ValueError(f"select_by must be 'classifier', 'density' or 'both', got {select_by!r}")
    if num_candidates > 1 and latents is not None:
        raise ValueError(f"num_candidates={num_candidates} draws starting noise of its own, leave latents out")
    if num_candidates > 1 and labels is None and select_by != "density":
        raise ValueError(f"select_by={select_by!r} needs class_labels, got None; 'density' does not")


def check_scales(
    energy_model: ModelMixin, labels: torch.Tensor | None, guidance_scale: float, classifier_free_scale: float
) -> None:
    """Raises ValueError where a scale is out of range, needs labels that are not there, or would ignore those given."""
    class_embedding = energy_model.config.class_embedding
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale must be finite and not negative, got {guidance_scale}")
    if labels is None and guidance_scale != 0:
        raise ValueError(f"guidance_scale={guidance_scale} needs class_labels, got None")
    if labels is not None and guidance_scale == 0 and not class_embedding:
        raise ValueError(
            "guidance_scale=0 would ignore class_labels: this model has no class embedding, only the classifier's "
            "gradient sees a label"
        )
    if labels is not None and guidance_scale == 0 and classifier_free_scale == 0:
        raise ValueError("guidance_scale=0 with classifier_free_scale=0 would ignore class_labels")
    if not math.isfinite(classifier_free_scale):
        raise ValueError(f"classifier_free_scale must be finite, got {classifier_free_scale}")
    if classifier_free_scale != 1 and (labels is None or not class_embedding):
        raise ValueError(
            f"classifier_free_scale={classifier_free_scale} needs class_labels and a model with class embedding"
        )


def check_interval(guidance_interval: tuple[float, float]) -> None:
    """Raises ValueError unless these are two shares in order."""
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise ValueError(f"guidance_interval must be two shares, 0 <= start <= stop <= 1, got {guidance_interval}")


def check_start(
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    num_images: int,
    size: tuple[int | None, int | None],
) -> None:
    """Raises ValueError unless generators and starting latents are as many as the images, finite and of their size.

    Args:
        generator: one, or one an image.
        latents: (N, C, h, w) or None.
        num_images: N.
        size: h and w, where they were asked for.
    """
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"generator must be one or a list of {num_images}, got a list of {len(generator)}")
    if latents is not None:
        if latents.ndim != 4 or len(latents) != num_images:
            raise ValueError(f"latents must be ({num_images}, C, h, w), got shape {tuple(latents.shape)}")
        if any(asked not in (None, found) for asked, found in zip(size, latents.shape[-2:], strict=True)):
            raise ValueError(f"height and width belong to latents of {size}, got latents of {tuple(latents.shape)}")
        if not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or infinite values")


def latent_length(name: str, pixels: int | None, scale_factor: int, size_divisor: int) -> int | None:
    """The `height` or `width` of images in latents; None stays None. Raises ValueError where it does not fit."""
    divisor = scale_factor * size_divisor
    if pixels is None:
        return None
    if not isinstance(pixels, int) or pixels < 1 or pixels % divisor:
        raise ValueError(f"{name} must be a positive multiple of {divisor}, got {pixels!r}")
    return pixels // scale_factor


def check_strength(strength: float) -> None:
    """Raises ValueError unless it is a share."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
