"""What the ways of editing share: images to latents and back, guidance of many rows, DDIM up to noise and down."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines import ImagePipelineOutput

from latent_egc.methods.editing import ddim_inversion, held_near

from .class_names import ClassLabels
from .energy_pipeline import EnergyPipeline
from .images import preprocess_images
from .sampling_checks import check_counts, check_interval, check_scales, check_strength
from .schedulers import default_scheduler, last_timesteps


@dataclass(frozen=True)
class EditingGuidance:
    """What rows shall become, (N,) int64 or None, and by how much; see `EGCPipeline.__call__`."""

    labels: torch.Tensor | None
    scale: float
    classifier_free_scale: float
    interval: tuple[float, float]

    def of(self, rows: slice | torch.Tensor) -> "EditingGuidance":
        """The guidance of some of the rows."""
        return self if self.labels is None else replace(self, labels=self.labels[rows])


class EditingSteps(EnergyPipeline):
    """The steps of `EditingPipeline`; `EGCPipeline` gives it a step's `_guided_epsilon`, and `classify`."""

    def _begin(
        self,
        images: PipelineImageInput,
        output_type: str,
        num_inference_steps: int,
        batch_size: int | None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """Images to scaled latents (N, C, h, w) on the device, at least float32, once the arguments fit."""
        check_strength(strength)
        check_counts(1, num_inference_steps, batch_size, self.energy_model.config.num_train_timesteps)
        self._check_outputs(output_type, ())
        pixel_values = preprocess_images(images, self.image_size)
        dtype = torch.promote_types(self.energy_model.dtype, torch.float32)
        parts = pixel_values.split(batch_size or self._default_image_batch_size())
        return torch.cat([self.encode(part.to(self._execution_device)).to(dtype) for part in parts])

    def _guidance(
        self,
        num_images: int,
        class_labels: ClassLabels | None = None,
        guidance_scale: float | None = None,
        classifier_free_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> EditingGuidance:
        """Labels for all images, one or one each, and scales; without labels and scale unguided."""
        labels = self.label_ids(class_labels)
        if guidance_scale is None:
            guidance_scale = 0.0 if labels is None else self.config.default_guidance_scale
        check_scales(self.energy_model, labels, guidance_scale, classifier_free_scale)
        check_interval(guidance_interval)
        if labels is not None:
            if len(labels) not in (1, num_images):
                raise ValueError(f"class_labels must be one or one for each of {num_images} images, got {len(labels)}")
            labels = labels.expand(num_images).to(self._execution_device)
        return EditingGuidance(labels, guidance_scale, classifier_free_scale, guidance_interval)

    def _guided(self, call: EnergyPipeline, guidance: EditingGuidance) -> Callable[..., torch.Tensor]:
        """What gives a call's steps their epsilon."""
        call._guidance_scale = self._guidance_scale = guidance.scale
        return call._guided_epsilon(guidance.labels, guidance.classifier_free_scale, guidance.interval)

    def _in_batches(
        self, edited: Callable[[slice], torch.Tensor], num_images: int, batch_size: int | None
    ) -> torch.Tensor:
        """(num_images, ...) from a function of rows, for so many at once as memory surely holds."""
        size = batch_size or self._default_batch_size()
        return torch.cat([edited(slice(start, start + size)) for start in range(0, num_images, size)])

    def _ddim(self, num_inference_steps: int, strength: float) -> tuple["EditingSteps", torch.Tensor]:
        """A call that goes by DDIM, whatever the pipeline's scheduler, and the descending timesteps that it goes."""
        call = self._own_call()
        call.scheduler = default_scheduler(self.energy_model)
        call.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps = last_timesteps(call.scheduler, num_inference_steps, strength)
        call._num_timesteps = self._num_timesteps = len(timesteps)
        return call, timesteps

    def _up(
        self,
        latents: torch.Tensor,
        guidance: EditingGuidance,
        num_inference_steps: int,
        strength: float,
        batch_size: int | None,
        num_refinements: int = 1,
    ) -> torch.Tensor:
        """Clean latents (N, C, h, w) to those at a share of the noise levels from which `_down` comes back to them."""

        def inverted(rows: slice) -> torch.Tensor:
            call, timesteps = self._ddim(num_inference_steps, strength)
            epsilon_at, ascending = self._guided(call, guidance.of(rows)), self.progress_bar(timesteps.flip(0))
            levels = self.energy_model.noise_levels
            return ddim_inversion(epsilon_at, levels, latents[rows], ascending, num_refinements)

        return self._in_batches(inverted, len(latents), batch_size)

    def _down(
        self,
        noisy_latents: torch.Tensor,
        guidance: EditingGuidance,
        num_inference_steps: int,
        strength: float,
        batch_size: int | None,
        held: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        """Latents (N, C, h, w) from there to clean ones; `held` near to others (N, C, h, w) by a `distance_scale`."""

        def denoised(rows: slice) -> torch.Tensor:
            call, timesteps = self._ddim(num_inference_steps, strength)
            epsilon_at = self._guided(call, guidance.of(rows))

            def held_epsilon_at(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                epsilon, levels = epsilon_at(latents, timestep), self.energy_model.noise_levels(timestep)
                return held_near(epsilon, latents, levels, held[0][rows], held[1])

            return call._denoise(
                noisy_latents[rows], epsilon_at if held is None else held_epsilon_at, {}, timesteps=timesteps
            )

        return self._in_batches(denoised, len(noisy_latents), batch_size)

    def _decode_to_unit_range(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents to images (N, 3, H, W) in [0, 1], float32."""
        return (self._decode_in_slices(latents) / 2 + 0.5).clamp(0, 1)

    def _finish(
        self, latents: torch.Tensor, output_type: str, return_dict: bool, images: torch.Tensor | None = None
    ) -> ImagePipelineOutput | tuple:
        """What a call returns, of latents or of images (N, 3, H, W) in [0, 1] that were made of them."""
        result: Any = latents
        if output_type != "latent":
            images = self._decode_to_unit_range(latents) if images is None else images
            unchanged = [False] * len(images)
            result = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=unchanged)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)
