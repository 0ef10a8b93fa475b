"""What every capability of the pipeline stands on: its components, pixels to latents and back, and the steps down.

Sampling, editing and inverting are one loop over a scheduler's timesteps, `EnergyPipeline._denoise`; they differ in
where it starts, in what gives a step its epsilon, and in what happens between two steps.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor

from latent_egc.models.weights import align_weights, check_weights

from .class_names import ClassLabels, label_ids
from .guidance import GuidanceScale
from .latents import decode_latents, latent_channels, latent_moments, scale_latents, vae_scale_factor
from .named_autoencoder import named_autoencoder
from .schedulers import check_scheduler, set_timesteps
from .self_contained import SelfContainedPipeline

PIXELS_AT_ONCE = 2**20  # through the autoencoder: 16 images of 256 px
LATENTS_AT_ONCE = 2**14  # positions through the energy network: 16 images of 32x32 latents

# Called after a step with pipeline, step, timestep and tensors by name; returns tensors that replace them, or None.
StepCallback = Callable[["EnergyPipeline", int, Any, dict[str, Any]], dict[str, Any] | None]


class EnergyPipeline(SelfContainedPipeline):
    """An energy network, an autoencoder, a scheduler and names; `EGCPipeline` adds what can be done with them.

    Args:
        energy_model: an `EGCUNet` or another `EnergyModel`.
        vae: a diffusers autoencoder (`AutoencoderKL`, `AutoencoderTiny`, ...); None in pixel space.
        scheduler: any epsilon-prediction scheduler of diffusers on the energy network's own noise schedule.
        id2label: class id -> name; None: the ids are the names.
        default_guidance_scale: what `guidance_scale=None` means for labelled samples, at least 1.
        log_normalizer: log Z, with which the energies of all noise levels are one density, see
            `DensityPipeline.log_density`; None: the network was not trained for that.
        default_num_inference_steps: what `num_inference_steps=None` means for this scheduler, at least 1.
        autoencoder: Hub id or folder of the autoencoder, which is loaded from there where `vae` is not given. Such a
            pipeline is saved with the name in place of its autoencoder's weights.

    Raises:
        ValueError: a scheduler with other betas or another prediction type, names that do not fit the classes, an
            autoencoder that cannot be loaded or has other latents, or weights that were not in their file, are NaN or
            infinite.
    """

    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    model_cpu_offload_seq = "energy_model->vae"
    _guidance_scale: GuidanceScale

    def __init__(
        self,
        energy_model: ModelMixin,
        vae: ModelMixin | None,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | dict[int, str] | None = None,
        default_guidance_scale: float = 1.0,
        log_normalizer: float | None = None,
        autoencoder: str | None = None,
        default_num_inference_steps: int = 50,
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
        if not default_num_inference_steps >= 1:
            raise ValueError(f"default_num_inference_steps must be at least 1, got {default_num_inference_steps}")
        if vae is None and autoencoder is not None:
            # Here, because `DiffusionPipeline.from_pretrained` calls nothing else of a class that it finds in a folder.
            vae = _loaded_beside(energy_model, autoencoder)
        channels, own_channels = latent_channels(vae), energy_model.config.in_channels
        if vae is not None and channels != own_channels:
            what = type(vae).__name__ if autoencoder is None else f"{type(vae).__name__} (autoencoder={autoencoder!r})"
            raise ValueError(f"the latents of {what} have {channels} channels, the energy network's {own_channels}")
        self.register_modules(energy_model=energy_model, vae=vae, scheduler=scheduler)
        self.register_to_config(
            id2label=id2label,
            default_guidance_scale=default_guidance_scale,
            log_normalizer=log_normalizer,
            autoencoder=autoencoder,
            default_num_inference_steps=default_num_inference_steps,
        )
        if autoencoder is not None:
            self.register_to_config(vae=(None, None))  # what is saved; the pipeline in memory has its autoencoder
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
    def guidance_scale(self) -> GuidanceScale:
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

    # --- a call's own state -----------------------------------------------------------------------------------------

    def _own_call(self) -> "EnergyPipeline":
        """A copy whose state is one call's: what a call changes, calls that run beside it must not see.

        The pipeline itself only tells of the last call.
        """
        call = copy.copy(self)
        call._interrupt = self._interrupt = False
        return call

    def _set_steps(
        self,
        call: "EnergyPipeline",
        num_inference_steps: int,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Gives a call a scheduler of its own, at the first of its steps."""
        call.scheduler = copy.deepcopy(self.scheduler)
        set_timesteps(call.scheduler, num_inference_steps, timesteps, sigmas, self._execution_device)
        call._num_timesteps = self._num_timesteps = len(call.scheduler.timesteps)

    # --- the steps --------------------------------------------------------------------------------------------------

    def _denoise(
        self,
        latents: torch.Tensor,
        epsilon_at: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        step_kwargs: dict[str, Any],
        *,
        timesteps: torch.Tensor | None = None,
        between: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        callback: StepCallback | None = None,
        callback_inputs: Sequence[str] = ("latents",),
        interrupted: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """Noisy latents to clean ones, by the steps that this call's scheduler has been set to.

        Args:
            latents: (N, C, h, w) in the scheduler's own scale, at the first of the timesteps.
            epsilon_at: from latents in the network's scale, (N, C, h, w), and a timestep, to epsilon.
            step_kwargs: see `schedulers.step_options`.
            timesteps: of the scheduler's, those to go; None: all of them.
            between: what becomes of the latents after a step of this number, such as a correction.
            callback: see `EGCPipeline.__call__`.
            callback_inputs: which tensors it is given.
            interrupted: asked before each step.
        """
        timesteps = self.scheduler.timesteps if timesteps is None else timesteps
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if interrupted():
                    break
                epsilon = epsilon_at(self.scheduler.scale_model_input(latents, timestep), timestep)
                latents = self.scheduler.step(epsilon, timestep, latents, **step_kwargs).prev_sample
                if between is not None:
                    latents = between(latents, step)
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

    def _default_image_batch_size(self) -> int:
        """How many images of the network's own size are surely not too many to be encoded and read at once."""
        latents_at_once = self._default_batch_size()
        return (
            latents_at_once if self.vae is None else max(1, min(latents_at_once, PIXELS_AT_ONCE // self.image_size**2))
        )

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


def _loaded_beside(energy_model: ModelMixin, autoencoder: str) -> ModelMixin:
    """A named autoencoder in the energy network's precision, and on its device unless that is offloaded."""
    vae = named_autoencoder(autoencoder)
    if vae.dtype != energy_model.dtype:
        vae.to(energy_model.dtype)
    return vae if energy_model.device.type == "meta" else vae.to(energy_model.device)
