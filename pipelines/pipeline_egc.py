"""EGCPipeline: one object that samples images and classifies them, with one energy network.

Sampling follows the energy's input gradient through any epsilon-prediction scheduler of diffusers; classification is
one forward pass on clean latents at timestep 0, the published convention. This file travels to the Hub beside the
weights, so it imports torch, diffusers and the standard library only.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines import ImagePipelineOutput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .class_names import ClassLabels, label_ids
from .images import preprocess_images, scale_latents, unscale_latents, vae_scale_factor
from .schedulers import check_scheduler

PIXELS_DECODED_AT_ONCE = 2**20  # 16 images of 256 px


@dataclass
class EGCClassificationOutput(BaseOutput):
    """What the energy network says of N images.

    Args:
        logits: (N, K) at timestep 0.
        probabilities: (N, K), softmax of the logits.
        labels: for each image the names of its `top_k` most probable classes, most probable first.
        energy: (N,) at timestep 0, low = likely; comparable between images of one model only.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    labels: list[list[str]]
    energy: torch.Tensor


def _align_weights(module: ModelMixin | None) -> None:
    """Copies weights that a file was mapped to at odd addresses, where CPU kernels are slower and round differently.

    A loaded pipeline then gives, bit for bit, what the saved one gave.
    """
    for parameter in module.parameters() if module is not None else ():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _in_package() -> bool:
    """Whether this is latent_egc's own file, not a copy of it from a repository."""
    return __name__.split(".")[0] == "latent_egc"


class EGCPipeline(DiffusionPipeline):
    """Samples and classifies images with one energy network.

    Args:
        energy_model: an `EGCUNet` or another `EnergyModel`.
        vae: a diffusers autoencoder (`AutoencoderKL`, `AutoencoderTiny`, ...); None in pixel space.
        scheduler: any epsilon-prediction scheduler of diffusers on the energy network's own noise schedule.
        id2label: class id -> name; None: the ids are the names.
        default_guidance_scale: what `guidance_scale=None` means for labelled samples, at least 1.

    Raises:
        ValueError: a scheduler with other betas or another prediction type, or names that do not fit the classes.
    """

    _optional_components = ["vae"]

    def __init__(
        self,
        energy_model: ModelMixin,
        vae: ModelMixin | None,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | dict[int, str] | None = None,
        default_guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        num_classes = energy_model.config.num_classes or 0
        if id2label is None:
            id2label = {i: str(i) for i in range(num_classes)}
        id2label = {str(i): str(name) for i, name in id2label.items()}
        if set(id2label) != {str(i) for i in range(num_classes)}:
            raise ValueError(f"id2label must name the classes 0 to {num_classes - 1}, got ids {sorted(id2label)}")
        if not default_guidance_scale >= 1:
            raise ValueError(f"default_guidance_scale must be at least 1, got {default_guidance_scale}")
        self.register_modules(energy_model=energy_model, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, default_guidance_scale=default_guidance_scale)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        check_scheduler(self.scheduler, self.energy_model)
        for module in (energy_model, vae):
            _align_weights(module)

    # An exported folder names its own code files, for use without this package. Where the package is installed its
    # classes are used instead, and no code from the folder is run: two methods rewrite the names, strings only. The
    # pipeline's own is rewritten in the private one because loading from the Hub reads model_index.json through it
    # before anything is downloaded; the energy network's must stay until then, or the Hub's listing would not fit it.

    @classmethod
    def _dict_from_json_file(cls, json_file: str) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file)
        if _in_package() and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return config

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """See `ConfigMixin.load_config`."""
        loaded = super().load_config(*arguments, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        module, class_name = config.get("energy_model") or (None, None)
        if _in_package() and module is not None and "." not in module:
            config["energy_model"] = [f"latent_egc.models.{module}", class_name]
        return loaded

    # --- facts ------------------------------------------------------------------------------------------------------

    @property
    def id2label(self) -> dict[int, str]:
        """Class id -> name."""
        return {int(i): name for i, name in self.config.id2label.items()}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, in height and width; 1 in pixel space."""
        return vae_scale_factor(self.vae)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.energy_model.config.sample_size * self.vae_scale_factor

    # --- pixels <-> latents -----------------------------------------------------------------------------------------

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images to scaled latents, by the posterior mean. Differentiable.

        Args:
            pixel_values: (N, 3, H, W) in [-1, 1].

        Returns:
            (N, C, h, w) of about unit variance; `pixel_values` themselves in pixel space.
        """
        if self.vae is None:
            return pixel_values
        encoded = self.vae.encode(pixel_values.to(self.vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return scale_latents(self.vae, latents.to(torch.promote_types(latents.dtype, torch.float32)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) to images (N, 3, H, W), about in [-1, 1]. Differentiable."""
        if self.vae is None:
            return latents
        return self.vae.decode(unscale_latents(self.vae, latents).to(self.vae.dtype)).sample

    # --- classification ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def classify(self, images: PipelineImageInput, top_k: int = 1) -> EGCClassificationOutput:
        """Classifies images by one forward pass of the energy network on their clean latents at timestep 0.

        Args:
            images: as in `preprocess_images`: PIL, numpy or torch, one or many, of any size.
            top_k: how many class names to return for each image, in [1, K].

        Returns:
            `EGCClassificationOutput` on the CPU.

        Raises:
            ValueError: a model without classes, `top_k` out of range, or unusable images.
        """
        num_classes = self.energy_model.config.num_classes
        if num_classes is None:
            raise ValueError("this model was trained without classes, it cannot classify")
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"top_k must be in [1, {num_classes}], got {top_k}")
        pixel_values = preprocess_images(images, self.image_size).to(self._execution_device)
        output = self.energy_model(self.encode(pixel_values), 0)
        logits, id2label = output.logits.cpu(), self.id2label
        return EGCClassificationOutput(
            logits=logits,
            probabilities=logits.softmax(dim=-1),
            labels=[[id2label[i] for i in row] for row in logits.topk(top_k, dim=-1).indices.tolist()],
            energy=output.energy.cpu(),
        )

    # --- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        classifier_free_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["EGCPipeline", int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples images.

        With a class embedding, three things can bring in a label, each with a scale of its own: the energy that sees it
        (`classifier_free_scale` 1), classifier-free guidance (more than 1) and the classifier's gradient
        (`guidance_scale`). Whichever are used, a step is one forward and one backward pass. The published procedure, on
        such a model, is the energy at the label with the gradient of the classifier at the null label:

            pipeline([207, 360], num_inference_steps=100, guidance_scale=6.0)  # the default scheduler is DDIM

        Args:
            class_labels: ids or names, one or many; None samples from p(z), without guidance.
            num_images_per_label: images for each label, in the labels' order; without labels, images in all.
            num_inference_steps: scheduler steps, each one forward and one backward pass.
            guidance_scale: weight of the classifier's gradient; 0 = off (only with a class embedding), 1 = p(z | y),
                more = sharper. None: the value stored with the pipeline.
            classifier_free_scale: weight of the energy at the labels against the energy without them; 1 is the former
                alone, more is classifier-free guidance, 0 the latter alone. Needs a model with class embedding.
            generator: one for all images, or one an image (an image then does not depend on its batch).
            latents: (N, C, h, w) standard normal start; None: drawn from `generator`.
            output_type: "pil", "np", "pt" (images in [0, 1]) or "latent" (scaled latents).
            return_dict: False returns a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": latents}) after each step; "latents"
                of what it returns, if anything, replaces them.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: an unknown label or name, a label that would be ignored (guidance_scale 0 without class
                embedding or with classifier_free_scale 0), guidance without labels, or another argument out of range;
                by name.
        """
        labels = self.label_ids(class_labels)
        if guidance_scale is None:
            guidance_scale = 0.0 if labels is None else self.config.default_guidance_scale
        num_images = num_images_per_label * (1 if labels is None else len(labels))
        self._check_call(
            labels,
            num_images_per_label,
            num_inference_steps,
            guidance_scale,
            classifier_free_scale,
            generator,
            latents,
            output_type,
            num_images,
        )
        check_scheduler(self.scheduler, self.energy_model)

        device = self._execution_device
        if labels is not None:
            labels = labels.repeat_interleave(num_images_per_label).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self._initial_latents(num_images, generator, latents, device)
        # Schedulers differ in what step() takes: deterministic ones have no generator.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress_bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                epsilon = self.energy_model.epsilon(
                    self.scheduler.scale_model_input(latents, timestep),
                    timestep,
                    labels,
                    guidance_scale=guidance_scale,
                    classifier_free_scale=classifier_free_scale,
                )
                latents = self.scheduler.step(epsilon, timestep, latents, **step_kwargs).prev_sample
                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, step, timestep, {"latents": latents}) or {}
                    latents = returned.get("latents", latents)
                progress_bar.update()

        if output_type == "latent":
            images = latents
        else:
            # In slices: an autoencoder's activations at full resolution are far larger than the images.
            images_at_once = max(1, PIXELS_DECODED_AT_ONCE // self.image_size**2)
            images = torch.cat([self.decode(part).float() for part in latents.split(images_at_once)])
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_latents(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        # At least float32, whatever the weights' type: the steps of a solver add up many small differences.
        dtype = torch.promote_types(self.energy_model.dtype, torch.float32)
        if latents is None:
            config = self.energy_model.config
            shape = (num_images, config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    # --- checks -----------------------------------------------------------------------------------------------------

    def label_ids(self, class_labels: ClassLabels | None) -> torch.Tensor | None:
        """Ids, names, one or many -> (L,) int64; None stays None. Raises ValueError on an unknown id or name."""
        return None if class_labels is None else label_ids(class_labels, self.id2label)

    def _check_call(
        self,
        labels: torch.Tensor | None,
        num_images_per_label: int,
        num_inference_steps: int,
        guidance_scale: float,
        classifier_free_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        num_images: int,
    ) -> None:
        config = self.energy_model.config
        if not isinstance(num_images_per_label, int) or num_images_per_label < 1:
            raise ValueError(f"num_images_per_label must be at least 1, got {num_images_per_label!r}")
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be in [1, {config.num_train_timesteps}], got {num_inference_steps!r}"
            )
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise ValueError(f"guidance_scale must be finite and not negative, got {guidance_scale}")
        if labels is None and guidance_scale != 0:
            raise ValueError(f"guidance_scale={guidance_scale} needs class_labels, got None")
        if labels is not None and guidance_scale == 0 and not config.class_embedding:
            raise ValueError(
                "guidance_scale=0 would ignore class_labels: this model has no class embedding, only the classifier's "
                "gradient sees a label"
            )
        if labels is not None and guidance_scale == 0 and classifier_free_scale == 0:
            raise ValueError("guidance_scale=0 with classifier_free_scale=0 would ignore class_labels")
        if not math.isfinite(classifier_free_scale):
            raise ValueError(f"classifier_free_scale must be finite, got {classifier_free_scale}")
        if classifier_free_scale != 1 and (labels is None or not config.class_embedding):
            raise ValueError(
                f"classifier_free_scale={classifier_free_scale} needs class_labels and a model with class embedding"
            )
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"generator must be one or a list of {num_images}, got a list of {len(generator)}")
        if latents is not None:
            if latents.ndim != 4 or len(latents) != num_images:
                raise ValueError(f"latents must be ({num_images}, C, h, w), got shape {tuple(latents.shape)}")
            if not latents.isfinite().all():
                raise ValueError("latents must be finite, got NaN or infinite values")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
