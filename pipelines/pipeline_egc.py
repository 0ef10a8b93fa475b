"""EGCPipeline: one object that samples images and classifies them, with one energy network.

Sampling follows the energy's input gradient through any epsilon-prediction scheduler of diffusers; classification is
one forward pass on clean latents at timestep 0, the published convention. This file travels to the Hub beside the
weights, so it imports torch, diffusers and the standard library only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines import ImagePipelineOutput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .class_names import ClassLabels
from .density import DensityPipeline
from .energy_pipeline import StepCallback
from .images import preprocess_images
from .sampling_checks import check_counts, check_interval, check_scales, check_start, latent_length
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


class EGCPipeline(DensityPipeline):
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
        size = [
            latent_length(name, pixels, self.vae_scale_factor, self.energy_model.size_divisor)
            for name, pixels in (("height", height), ("width", width))
        ]
        check_scales(self.energy_model, labels, guidance_scale, classifier_free_scale)
        check_interval(guidance_interval)
        check_start(generator, latents, num_images, tuple(size))
        check_scheduler(self.scheduler, self.energy_model)
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
        images = []
        for start in range(0, num_images, batch_size):
            rows = slice(start, start + batch_size)
            self._set_steps(call, num_inference_steps, timesteps, sigmas)
            call._guidance_scale = self._guidance_scale = guidance_scale
            found = call._denoise(
                latents[rows] * call.scheduler.init_noise_sigma,
                call._guided_epsilon(
                    None if labels is None else labels[rows], classifier_free_scale, guidance_interval
                ),
                step_options(call.scheduler, generator[rows] if isinstance(generator, list) else generator, eta),
                callback=callback_on_step_end,
                callback_inputs=callback_on_step_end_tensor_inputs,
                interrupted=lambda: call.interrupt or self.interrupt,
            )
            images.append(found if output_type == "latent" else self._decode_in_slices(found))
        self._guidance_scale = call.guidance_scale
        images = torch.cat(images)
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _guided_epsilon(
        self, labels: torch.Tensor | None, classifier_free_scale: float, guidance_interval: tuple[float, float]
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """What gives a call's steps their epsilon; see `__call__`."""

        def epsilon_at(noisy_latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            noise_level = float(timestep / self.energy_model.config.num_train_timesteps)
            guided = guidance_interval[0] <= noise_level <= guidance_interval[1]
            return self.energy_model.epsilon(
                noisy_latents,
                timestep,
                labels,
                guidance_scale=self.guidance_scale if guided else 0.0,
                # Unguided is the energy that sees the label, if it was to see one at all.
                classifier_free_scale=classifier_free_scale if guided else float(classifier_free_scale != 0),
            )

        return epsilon_at
