"""EGCPipeline: one object that samples images and classifies them, with one energy network.

Sampling follows the energy's input gradient through any epsilon-prediction scheduler of diffusers; classification is
one forward pass on clean latents at timestep 0, the published convention. This file travels to the Hub beside the
weights, so it imports torch, diffusers and the standard library only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
from .energy_pipeline import EnergyPipeline, StepCallback
from .guidance import Guidance, GuidanceScale, candidate_scores, scale_at
from .sampling_checks import check_counts, check_guidance, check_selection, check_start, latent_length
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
        num_inference_steps: int | None = None,
        guidance_scale: GuidanceScale | None = None,
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
        guidance_rescale: float = 0.0,
        auto_guidance_model: Any = None,
        auto_guidance_scale: float = 1.0,
        num_candidates: int = 1,
        select_by: str = "classifier",
        potential: Potential | None = None,
        corrector: Corrector | str | None = None,
    ) -> EGCSampleOutput | tuple:
        """Samples images.

        With a class embedding, three things can bring in a label, each with a scale of its own: the energy that sees it
        (`classifier_free_scale` 1), classifier-free guidance (more than 1) and the classifier's gradient
        (`guidance_scale`). Whichever are used, a step is one forward and one backward pass. The published procedure, on
        such a model, is the energy at the label with the gradient of the classifier at the null label:

            pipeline.scheduler = solver("DDIM", pipeline.scheduler)
            pipeline([207, 360], num_inference_steps=100, guidance_scale=6.0)

        Args:
            class_labels: ids or names, one or many; None samples from p(z), without guidance.
            num_images_per_label: images for each label, in the labels' order; without labels, images in all.
            num_inference_steps: scheduler steps, each one forward and one backward pass. None: the number stored with
                the pipeline.
            guidance_scale: weight of the classifier's gradient; 0 = off (only with a class embedding), 1 = p(z | y),
                more = sharper; or a function of the noise level in [0, 1], 0 for clean images. None: the value stored
                with the pipeline.
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
            guidance_interval: where every guidance acts, lowest and highest noise level as shares of all timesteps
                (Kynkaanniemi et al., arXiv 2404.07724); elsewhere a step costs 2 units, whatever it costs here.
            guidance_rescale: share in [0, 1] of the way on which the guided epsilon's standard deviation is brought to
                the unguided one's (Lin et al., arXiv 2305.08891); more than 0 adds 2 units to a guided step.
            auto_guidance_model: an `EGCPipeline` or its energy network, smaller or trained for less long, which this
                one is led away from. A guided step is as many units of it besides, at the same labels and scales.
            auto_guidance_scale: how far: 0 is the weaker model, 1 this one, more is beyond (Karras et al., NeurIPS
                2024). Only with a weaker model, and then not 1.
            num_candidates: how many are drawn for each image that is returned: so many times the steps, and with
                several one forward pass each. A generator draws all images' first candidates, as it would without
                others, then their second. The callback sees them all.
            select_by: which candidate is returned, by the clean latents at timestep 0: "classifier" the one with the
                largest log p(y | z), "density" with the lowest energy, "both" with the largest log p(z, y).
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
        num_inference_steps, guidance_scale = self._or_stored(num_inference_steps, guidance_scale, labels is None)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        config = self.energy_model.config
        check_counts(num_images_per_label, num_inference_steps, batch_size, config.num_train_timesteps)
        num_images = num_images_per_label * (1 if labels is None else len(labels))
        size = self._latent_size(height, width)
        guidance = classifier_free_scale, guidance_interval, guidance_rescale, auto_guidance_model, auto_guidance_scale
        check_guidance(self.energy_model, labels, guidance_scale, *guidance)
        check_selection(labels, latents, num_candidates, select_by)
        check_start(generator, latents, num_images, size)
        check_scheduler(self.scheduler, self.energy_model)
        self._check_potential(potential, class_labels, guidance)
        corrector = checked_corrector(corrector, self.scheduler, guidance_rescale)
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)

        if labels is not None:
            labels = labels.repeat_interleave(num_images_per_label).to(self._execution_device)
        call = self._own_call()

        def draw() -> EGCSampleOutput:
            noise, found, rates = self._starting_noise(num_images, size, generator, latents), [], []
            at_once = batch_size or self._default_batch_size(*noise.shape[-2:])
            for start in range(0, num_images, at_once):
                rows = slice(start, start + at_once)
                self._set_steps(call, num_inference_steps, timesteps, sigmas)
                call._guidance_scale = self._guidance_scale = guidance_scale
                guided = call._guidance(None if labels is None else labels[rows], *guidance)
                own_generator = generator[rows] if isinstance(generator, list) else generator
                correction = call._correction(corrector, potential, guided, len(noise[rows]), own_generator)
                part = call._denoise(
                    noise[rows] * call.scheduler.init_noise_sigma,
                    guided.epsilon if potential is None else epsilon_of(potential),
                    step_options(call.scheduler, own_generator, eta),
                    between=correction,
                    callback=callback_on_step_end,
                    callback_inputs=callback_on_step_end_tensor_inputs,
                    interrupted=lambda: call.interrupt or self.interrupt,
                )
                found.append(part)
                rates += [] if correction is None else [correction.acceptance_rates]
            return EGCSampleOutput(torch.cat(found), torch.cat(rates) if rates else None)

        output = draw() if num_candidates == 1 else self._best_of(num_candidates, draw, labels, select_by, call)
        self._guidance_scale = call.guidance_scale
        if output_type != "latent":
            images = self._decode_in_slices(output.images)
            output.images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def _or_stored(
        self, num_inference_steps: int | None, guidance_scale: GuidanceScale | None, unlabelled: bool
    ) -> tuple[int, GuidanceScale]:
        """Both, or what is stored with the pipeline where they are None."""
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = 0.0 if unlabelled else self.config.default_guidance_scale
        return num_inference_steps, guidance_scale

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """Height and width of latents, where those of the images are given in pixels. Raises ValueError by name."""
        factors = self.vae_scale_factor, self.energy_model.size_divisor
        return latent_length("height", height, *factors), latent_length("width", width, *factors)

    def _starting_noise(
        self,
        num_images: int,
        size: tuple[int | None, int | None],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, C, h, w) standard normal: `latents` if given, else drawn. For `size` see `_latent_size`."""
        # At least float32, whatever the weights' type: the steps of a solver add up many small differences.
        dtype, device = torch.promote_types(self.energy_model.dtype, torch.float32), self._execution_device
        if latents is not None:
            return latents.to(device, dtype)
        config = self.energy_model.config
        shape = (num_images, config.in_channels, *(length or config.sample_size for length in size))
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def _best_of(
        self,
        num_candidates: int,
        draw: Callable[[], EGCSampleOutput],
        labels: torch.Tensor | None,
        select_by: str,
        call: EnergyPipeline,
    ) -> EGCSampleOutput:
        """For each of N images the best of its candidates; of those that are finished, where a call is interrupted.

        Args:
            num_candidates: of each image, 1 unit each to judge.
            draw: gives a candidate of every image, clean latents (N, C, h, w).
            labels, select_by: (N,), see `candidate_scores`.
            call: see `_own_call`.
        """
        candidates: list[EGCSampleOutput] = []
        while len(candidates) < num_candidates and not (call.interrupt or self.interrupt):
            candidates.append(draw())
        if (call.interrupt or self.interrupt) and len(candidates) > 1:
            candidates.pop()
        latents = torch.stack([candidate.images for candidate in candidates])  # (M, N, C, h, w)
        at_once, best = self._default_batch_size(*latents.shape[-2:]), []
        for start in range(0, latents.shape[1], at_once):
            rows = slice(start, start + at_once)
            labels_of_rows = None if labels is None else labels[rows]
            scores = [candidate_scores(self.energy_model, one[rows], labels_of_rows, select_by) for one in latents]
            best.append(torch.stack(scores).argmax(dim=0))
        best = torch.cat(best)
        of_each = torch.arange(len(best), device=best.device)
        rates = [candidate.acceptance_rates for candidate in candidates]
        rates = None if rates[0] is None else torch.stack(rates)[best.cpu(), of_each.cpu()]
        return EGCSampleOutput(latents[best, of_each], rates)

    def _guidance(self, labels: torch.Tensor | None, *options: Any, **named: Any) -> Guidance:
        """What guides this call's steps; `options` are those of `Guidance` behind its `guidance_scale`."""
        return Guidance(
            self.energy_model, labels, lambda level: scale_at(self.guidance_scale, level), *options, **named
        )

    def _guided_epsilon(
        self, labels: torch.Tensor | None, *options: Any, **named: Any
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """What gives a call's steps their epsilon, from noisy latents and a timestep; see `_guidance`."""
        return self._guidance(labels, *options, **named).epsilon

    def _correction(
        self,
        corrector: Corrector | None,
        potential: Potential | None,
        guided: Guidance,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Correction | None:
        """What happens between the steps of a call's batch: what its steps follow, corrected. None: nothing."""
        if corrector is None:
            return None
        potential_at = guided.potential if potential is None else lambda timestep: potential
        noise_levels = self.energy_model.noise_levels
        return Correction(corrector, self.scheduler, noise_levels, potential_at, num_images, generator)
