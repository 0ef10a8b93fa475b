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
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines import ImagePipelineOutput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from latent_egc.models.potentials import Potential

from .class_names import ClassLabels
from .energy_pipeline import EnergyPipeline, StepCallback
from .guidance import Guidance, GuidanceScale, candidate_scores, scale_at
from .images import preprocess_images
from .sampling_checks import check_counts, check_guidance, check_selection, check_start, latent_length
from .schedulers import check_scheduler, step_options


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


class EGCPipeline(EnergyPipeline):
    """Samples and classifies images with one energy network; its components are those of an `EnergyPipeline`."""

    # --- classification ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def classify(
        self, images: PipelineImageInput, top_k: int = 1, batch_size: int | None = None
    ) -> EGCClassificationOutput:
        """Classifies images by one forward pass of the energy network on their clean latents at timestep 0.

        Args:
            images: as in `preprocess_images`: PIL, numpy or torch, one or many, of any size.
            top_k: how many class names to return for each image, in [1, K].
            batch_size: images at once; None: what memory surely holds, by their size.

        Returns:
            `EGCClassificationOutput` on the CPU.

        Raises:
            ValueError: a model without classes, `top_k` or `batch_size` out of range, or unusable images.
        """
        num_classes = self.energy_model.config.num_classes
        if num_classes is None:
            raise ValueError("this model was trained without classes, it cannot classify")
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"top_k must be in [1, {num_classes}], got {top_k}")
        if batch_size is None:
            batch_size = self._default_image_batch_size()
        check_counts(1, 1, batch_size, 1)
        given = images if isinstance(images, (list, tuple)) else [images]
        one_by_one = [image for entry in given for image in (entry if getattr(entry, "ndim", 3) == 4 else [entry])]
        starts = range(0, max(1, len(one_by_one)), batch_size)  # none at all is for `preprocess_images` to refuse
        logits, energy = [], []
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            pixel_values = preprocess_images(one_by_one[start : start + batch_size], self.image_size)
            output = self.energy_model(self.encode(pixel_values.to(self._execution_device)), 0)
            logits.append(output.logits.cpu())
            energy.append(output.energy.cpu())
        self.maybe_free_model_hooks()
        logits, id2label = torch.cat(logits), self.id2label
        return EGCClassificationOutput(
            logits=logits,
            probabilities=logits.softmax(dim=-1),
            labels=[[id2label[i] for i in row] for row in logits.topk(top_k, dim=-1).indices.tolist()],
            energy=torch.cat(energy),
        )

    # --- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
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
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)

        if labels is not None:
            labels = labels.repeat_interleave(num_images_per_label).to(self._execution_device)
        call = self._own_call()

        def draw() -> torch.Tensor:
            noise, found = self._starting_noise(num_images, size, generator, latents), []
            at_once = batch_size or self._default_batch_size(*noise.shape[-2:])
            for start in range(0, num_images, at_once):
                rows = slice(start, start + at_once)
                self._set_steps(call, num_inference_steps, timesteps, sigmas)
                call._guidance_scale = self._guidance_scale = guidance_scale
                part = call._denoise(
                    noise[rows] * call.scheduler.init_noise_sigma,
                    call._guided_epsilon(None if labels is None else labels[rows], *guidance),
                    step_options(call.scheduler, generator[rows] if isinstance(generator, list) else generator, eta),
                    callback=callback_on_step_end,
                    callback_inputs=callback_on_step_end_tensor_inputs,
                    interrupted=lambda: call.interrupt or self.interrupt,
                )
                found.append(part)
            return torch.cat(found)

        images = draw() if num_candidates == 1 else self._best_of(num_candidates, draw, labels, select_by, call)
        self._guidance_scale = call.guidance_scale
        if output_type != "latent":
            images = self.image_processor.postprocess(self._decode_in_slices(images), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
        draw: Callable[[], torch.Tensor],
        labels: torch.Tensor | None,
        select_by: str,
        call: EnergyPipeline,
    ) -> torch.Tensor:
        """For each of N images the best of its candidates; of those that are finished, where a call is interrupted.

        Args:
            num_candidates: of each image, 1 unit each to judge.
            draw: gives a candidate of every image, clean latents (N, C, h, w).
            labels, select_by: (N,), see `candidate_scores`.
            call: see `_own_call`.
        """
        candidates, scores = [], []
        while len(candidates) < num_candidates and not (call.interrupt or self.interrupt):
            candidates.append(draw())
        if (call.interrupt or self.interrupt) and len(candidates) > 1:
            candidates.pop()
        at_once, best = self._default_batch_size(*candidates[0].shape[-2:]), []
        for start in range(0, len(candidates[0]), at_once):
            rows = slice(start, start + at_once)
            labels_of_rows = None if labels is None else labels[rows]
            scores = [candidate_scores(self.energy_model, one[rows], labels_of_rows, select_by) for one in candidates]
            best.append(torch.stack(scores).argmax(dim=0))
        best = torch.cat(best)
        return torch.stack(candidates)[best, torch.arange(len(best), device=best.device)]

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

    def _guided_potential(
        self, labels: torch.Tensor | None, *options: Any, **named: Any
    ) -> Callable[[torch.Tensor], Potential]:
        """What gives a call's steps their potential, from a timestep; see `_guidance`."""
        return self._guidance(labels, *options, **named).potential
