"""EGCPipeline: one object that samples images and classifies them, with one energy network.

Sampling follows the energy's input gradient through any epsilon-prediction scheduler of diffusers; classification is
one forward pass on clean latents at timestep 0, the published convention. This file travels to the Hub beside the
weights, so it imports torch, diffusers and the standard library only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from latent_egc.methods.correctors import Corrector
from latent_egc.models.potentials import Potential

from .certification import CertifyingPipeline
from .class_names import ClassLabels
from .composition import ComposingPipeline, epsilon_of
from .correction import Correction, checked_corrector
from .density import DensityPipeline
from .editing import EditingPipeline
from .energy_pipeline import StepCallback
from .sampling_checks import check_counts, check_interval, check_scales, check_start, latent_length
from .schedulers import check_scheduler, step_options


@dataclass
class EGCSampleOutput(ImagePipelineOutput):
    """Sampled images.

    Args:
        images: N of them.
        acceptance_rates: (N, L) where a corrector ran, of each image at each of L noise levels; see `Correction`.
    """

    acceptance_rates: torch.Tensor | None = None


class EGCPipeline(CertifyingPipeline, ComposingPipeline, DensityPipeline, EditingPipeline):
    """Samples, classifies and edits images with one energy network; its components are those of an `EnergyPipeline`."""

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
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        potential: Potential | None = None,
        corrector: Corrector | str | None = None,
    ) -> EGCSampleOutput | tuple:
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
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": latents}) after each step of each
                batch; "latents" of what it returns, if anything, replaces them. Its pipeline is this call's own: what
                is set there (`_guidance_scale`, `_interrupt`) holds for this call. Or one of `diffusers.callbacks`.
            callback_on_step_end_tensor_inputs: what the callback is given; of `_callback_tensor_inputs`.
            timesteps, sigmas: the scheduler's steps themselves, for schedulers that take them.
            eta: DDIM's share of noise in each step, 0 = none; for schedulers that take it.
            height, width: of the images, in pixels; None: `image_size`.
            batch_size: images sampled at once; None: what memory surely holds, by their size.
            guidance_interval: where both guidances act, lowest and highest noise level as shares of all timesteps
                (Kynkaanniemi et al., arXiv 2404.07724); elsewhere a step costs 2 units with a class embedding too.
            potential: what is sampled in place of this pipeline's energy, labels and scales; such as
                `composed_potential`'s. One gradient of it a step.
            corrector: the chain that runs at each noise level between the steps, on the density that the next step
                follows; "ula", "mala", "hmc", or a `Corrector`, which says what it costs.

        Returns:
            `EGCSampleOutput` with `images`, and `acceptance_rates` with a corrector, or a tuple of them.

        Raises:
            ValueError: an unknown label or name, a label that would be ignored (guidance_scale 0 without class
                embedding or with classifier_free_scale 0), guidance without labels, or another argument out of range;
                by name.
        """
        labels = self.label_ids(class_labels)
        if guidance_scale is None:
            guidance_scale = 0.0 if labels is None else self.config.default_guidance_scale
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        config = self.energy_model.config
        check_counts(num_images_per_label, num_inference_steps, batch_size, config.num_train_timesteps)
        num_images = num_images_per_label * (1 if labels is None else len(labels))
        size = [
            latent_length(name, pixels, self.vae_scale_factor, self.energy_model.size_divisor)
            for name, pixels in (("height", height), ("width", width))
        ]
        check_scales(self.energy_model, labels, guidance_scale, classifier_free_scale)
        check_interval(guidance_interval)
        check_start(generator, latents, num_images, tuple(size))
        check_scheduler(self.scheduler, self.energy_model)
        self._check_potential(potential, class_labels=class_labels, guidance_interval=guidance_interval)
        corrector = checked_corrector(corrector, self.scheduler)
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)

        device = self._execution_device
        if labels is not None:
            labels = labels.repeat_interleave(num_images_per_label).to(device)
        # At least float32, whatever the weights' type: the steps of a solver add up many small differences.
        dtype = torch.promote_types(self.energy_model.dtype, torch.float32)
        if latents is None:
            shape = (num_images, config.in_channels, *(length or config.sample_size for length in size))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device, dtype)

        call = self._own_call()
        batch_size = batch_size or self._default_batch_size(*latents.shape[-2:])
        images, rates = [], []
        for start in range(0, num_images, batch_size):
            rows = slice(start, start + batch_size)
            self._set_steps(call, num_inference_steps, timesteps, sigmas)
            call._guidance_scale = self._guidance_scale = guidance_scale
            guidance = None if labels is None else labels[rows], classifier_free_scale, guidance_interval
            own_generator = generator[rows] if isinstance(generator, list) else generator
            correction = call._correction(corrector, potential, guidance, len(latents[rows]), own_generator)
            found = call._denoise(
                latents[rows] * call.scheduler.init_noise_sigma,
                call._guided_epsilon(*guidance) if potential is None else epsilon_of(potential),
                step_options(call.scheduler, own_generator, eta),
                between=correction,
                callback=callback_on_step_end,
                callback_inputs=callback_on_step_end_tensor_inputs,
                interrupted=lambda: call.interrupt or self.interrupt,
            )
            images.append(found if output_type == "latent" else self._decode_in_slices(found))
            rates += [] if correction is None else [correction.acceptance_rates]
        self._guidance_scale = call.guidance_scale
        self.maybe_free_model_hooks()
        output = self._sample_output(torch.cat(images), rates, output_type)
        return output if return_dict else output.to_tuple()

    def _sample_output(self, images: torch.Tensor, rates: list[torch.Tensor], output_type: str) -> EGCSampleOutput:
        """Decoded images, or latents, in the form that was asked for; with the batches' acceptance rates, if any."""
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        return EGCSampleOutput(images=images, acceptance_rates=torch.cat(rates) if rates else None)

    def _guided_epsilon(
        self, labels: torch.Tensor | None, classifier_free_scale: float, guidance_interval: tuple[float, float]
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """What gives a call's steps their epsilon; see `__call__`."""

        def epsilon_at(noisy_latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            scales = self._scales_at(timestep, classifier_free_scale, guidance_interval)
            return self.energy_model.epsilon(noisy_latents, timestep, labels, **scales)

        return epsilon_at

    def _scales_at(
        self, timestep: torch.Tensor, classifier_free_scale: float, guidance_interval: tuple[float, float]
    ) -> dict[str, float]:
        """The scales that hold at a timestep."""
        noise_level = float(timestep / self.energy_model.config.num_train_timesteps)
        guided = guidance_interval[0] <= noise_level <= guidance_interval[1]
        return {
            "guidance_scale": self.guidance_scale if guided else 0.0,
            # Unguided is the energy that sees the label, if it was to see one at all.
            "classifier_free_scale": classifier_free_scale if guided else float(classifier_free_scale != 0),
        }

    def _correction(
        self,
        corrector: Corrector | None,
        potential: Potential | None,
        guidance: tuple[torch.Tensor | None, float, tuple[float, float]],
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Correction | None:
        """What happens between the steps of a call's batch: what its steps follow, corrected. None: nothing."""
        if corrector is None:
            return None
        labels, *scales = guidance

        def potential_at(timestep: torch.Tensor) -> Potential:
            return potential or self.energy_model.potential(labels, **self._scales_at(timestep, *scales))

        noise_levels = self.energy_model.noise_levels
        return Correction(corrector, self.scheduler, noise_levels, potential_at, num_images, generator)
