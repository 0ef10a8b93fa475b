"""The arguments of a call that samples: what fits, and what is named where it does not."""

import math

import torch
from diffusers import ModelMixin


def check_counts(num_images_per_label: int, num_inference_steps: int, batch_size: int | None, num_train: int) -> None:
    """Raises ValueError unless these are positive, and the steps at most `num_train`."""
    for name, count in (("num_images_per_label", num_images_per_label), ("batch_size", batch_size)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be at least 1, got {count!r}")
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= num_train:
        raise ValueError(f"num_inference_steps must be in [1, {num_train}], got {num_inference_steps!r}")


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
