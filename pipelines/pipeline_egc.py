"""EGCPipeline: one object that samples images and classifies them, with one energy network.

Sampling follows the energy's input gradient through any epsilon-prediction scheduler of diffusers; classification is
one forward pass on clean latents at timestep 0, the published convention. This file travels to the Hub beside the
weights, so it imports torch, diffusers and the standard library only.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines import ImagePipelineOutput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from latent_egc.models.weights import align_weights, check_weights

from .class_names import ClassLabels, label_ids
from .images import preprocess_images
from .latents import decode_latents, latent_channels, latent_moments, scale_latents, vae_scale_factor
from .sampling_checks import check_counts, check_interval, check_scales, check_start, latent_length
from .schedulers import check_scheduler, set_timesteps, step_options
from .self_contained import SelfContainedPipeline

PIXELS_AT_ONCE = 2**20  # through the autoencoder: 16 images of 256 px
LATENTS_AT_ONCE = 2**14  # positions through the energy network: 16 images of 32x32 latents


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


class EGCPipeline(SelfContainedPipeline):
    """Samples and classifies images with one energy network.

    Args:
        energy_model: an `EGCUNet` or another `EnergyModel`.
        vae: a diffusers autoencoder (`AutoencoderKL`, `AutoencoderTiny`, ...); None in pixel space.
        scheduler: any epsilon-prediction scheduler of diffusers on the energy network's own noise schedule.
        id2label: class id -> name; None: the ids are the names.
        default_guidance_scale: what `guidance_scale=None` means for labelled samples, at least 1.

    Raises:
        ValueError: a scheduler with other betas or another prediction type, names that do not fit the classes, or
            weights that were not in their file, are NaN or infinite.
    """

    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    model_cpu_offload_seq = "energy_model->vae"

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
            if module is not None:
                check_weights(module)
                align_weights(module)

    # --- facts ------------------------------------------------------------------------------------------------------

    @property
    def id2label(self) -> dict[int, str]:
        """Class id -> name, by id: JSON keeps 10 before 2."""
        return dict(sorted((int(i), name) for i, name in self.config.id2label.items()))

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, in height and width; 1 in pixel space."""
        return vae_scale_factor(self.vae)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.energy_model.config.sample_size * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        """The classifier's weight in the running or last call. A callback may set `_guidance_scale` of its pipeline."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the running or last call's scheduler."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call stops before its next step. A callback may set `_interrupt` of its pipeline."""
        return self._interrupt

    # --- pixels <-> latents -----------------------------------------------------------------------------------------

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images to scaled latents, by the posterior mean. Differentiable.

        Args:
            pixel_values: (N, 3, H, W) in [-1, 1].

        Returns:
            (N, C, h, w) of about unit variance; `pixel_values` themselves in pixel space.
        """
        self._check_pixel_space()
        if self.vae is None:
            return pixel_values
        mean = latent_moments(self.vae, pixel_values)[:, : latent_channels(self.vae)]
        return scale_latents(self.vae, mean)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) to images (N, 3, H, W), about in [-1, 1]. Differentiable."""
        self._check_pixel_space()
        return latents if self.vae is None else decode_latents(self.vae, latents)

    def _check_pixel_space(self) -> None:
        """Raises ValueError where there is no autoencoder and the network's latents are no pixels."""
        channels = self.energy_model.config.in_channels
        if self.vae is None and channels != latent_channels(None):
            raise ValueError(
                f"vae=None, but the energy network's latents have {channels} channels, so they are no pixels: give the "
                'pipeline its autoencoder, or sample with output_type="latent"'
            )

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
            pixels_at_once = self._default_batch_size() if self.vae is None else PIXELS_AT_ONCE // self.image_size**2
            batch_size = max(1, min(self._default_batch_size(), pixels_at_once))
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
        callback_on_step_end: Callable[["EGCPipeline", int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
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

        # Calls may run side by side: what one of them changes, the scheduler above all, is its own. The pipeline itself
        # only tells of the last call.
        call = copy.copy(self)
        call._interrupt = self._interrupt = False
        batch_size = batch_size or self._default_batch_size(*latents.shape[-2:])
        images = []
        for start in range(0, num_images, batch_size):
            rows = slice(start, start + batch_size)
            call.scheduler = copy.deepcopy(self.scheduler)
            call._guidance_scale = self._guidance_scale = guidance_scale
            set_timesteps(call.scheduler, num_inference_steps, timesteps, sigmas, device)
            call._num_timesteps = self._num_timesteps = len(call.scheduler.timesteps)
            found = call._sample(
                latents[rows] * call.scheduler.init_noise_sigma,
                None if labels is None else labels[rows],
                classifier_free_scale,
                guidance_interval,
                step_options(call.scheduler, generator[rows] if isinstance(generator, list) else generator, eta),
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                interrupted=lambda: call.interrupt or self.interrupt,
            )
            images.append(found if output_type == "latent" else self._decode_in_slices(found))
        self._guidance_scale = call.guidance_scale
        images = torch.cat(images)
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        classifier_free_scale: float,
        guidance_interval: tuple[float, float],
        step_kwargs: dict[str, Any],
        callback: Callable[["EGCPipeline", int, Any, dict[str, Any]], dict[str, Any] | None] | None,
        callback_inputs: Sequence[str],
        interrupted: Callable[[], bool],
    ) -> torch.Tensor:
        """Noise (N, C, h, w) to clean latents, by the steps that this call's scheduler has been set to."""
        noise_levels = (self.scheduler.timesteps / self.energy_model.config.num_train_timesteps).tolist()
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                if interrupted():
                    break
                guided = guidance_interval[0] <= noise_levels[step] <= guidance_interval[1]
                epsilon = self.energy_model.epsilon(
                    self.scheduler.scale_model_input(latents, timestep),
                    timestep,
                    labels,
                    guidance_scale=self.guidance_scale if guided else 0.0,
                    # Unguided is the energy that sees the label, if it was to see one at all.
                    classifier_free_scale=classifier_free_scale if guided else float(classifier_free_scale != 0),
                )
                latents = self.scheduler.step(epsilon, timestep, latents, **step_kwargs).prev_sample
                if callback is not None:
                    values = {"latents": latents}
                    returned = callback(self, step, timestep, {name: values[name] for name in callback_inputs}) or {}
                    latents = returned.get("latents", latents)
                progress_bar.update()
        return latents

    def _decode_in_slices(self, latents: torch.Tensor) -> torch.Tensor:
        """`decode`, in float32; an autoencoder's activations at full resolution are far larger than the images."""
        height, width = latents.shape[-2:]
        images_at_once = max(1, PIXELS_AT_ONCE // (height * width * self.vae_scale_factor**2))
        return torch.cat([self.decode(part).float() for part in latents.split(images_at_once)])

    def _default_batch_size(self, height: int | None = None, width: int | None = None) -> int:
        """How many latents of a size, by default the network's own, are surely not too many at once."""
        size = self.energy_model.config.sample_size
        return max(1, LATENTS_AT_ONCE // ((height or size) * (width or size)))

    # --- checks -----------------------------------------------------------------------------------------------------

    def label_ids(self, class_labels: ClassLabels | None) -> torch.Tensor | None:
        """Ids, names, one or many -> (L,) int64; None stays None. Raises ValueError on an unknown id or name."""
        return None if class_labels is None else label_ids(class_labels, self.id2label)

    def _check_outputs(self, output_type: str, callback_inputs: Sequence[str]) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if output_type != "latent":
            self._check_pixel_space()
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {self._callback_tensor_inputs}, got {unknown}"
            )
