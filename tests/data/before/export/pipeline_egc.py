"""EGCPipeline: one object that samples images and classifies them, with one energy network.

Sampling follows the energy's input gradient through any epsilon-prediction scheduler of diffusers; classification is
one forward pass on clean latents at timestep 0, the published convention. This file travels to the Hub beside the
weights, so it imports torch, diffusers and the standard library only.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines import ImagePipelineOutput
from diffusers.utils import BaseOutput, load_image
from diffusers.utils.torch_utils import randn_tensor

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


def default_scheduler(energy_model: ModelMixin) -> DDIMScheduler:
    """A DDIM scheduler on the energy network's own noise schedule, which ends on clean latents and clips nothing."""
    config = energy_model.config
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def scale_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents -> about unit variance, by its own scaling and shift factor."""
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def unscale_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale_latents`."""
    return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)


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


def preprocess_images(images: PipelineImageInput, size: int) -> torch.Tensor:
    """Images of any size -> a batch, the shorter side resized to `size` and the centre cropped.

    Args:
        images: a PIL image (any mode; its EXIF orientation is applied), a numpy array (H, W, 3) or (N, H, W, 3), a
            tensor (3, H, W) or (N, 3, H, W), or a list of one of these. Arrays and tensors are in [0, 1], or uint8.
        size: height and width of the result, in pixels.

    Returns:
        (N, 3, size, size) in [-1, 1], on the CPU for PIL and numpy, differentiable for tensors.

    Raises:
        ValueError: no image, wrong type, wrong channel count, or values that are not finite or outside [0, 1].
    """
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError("images must hold at least one image, got none")
    return torch.cat([_preprocess_one(image, size) for image in images])


def load_rgb(image: Any) -> Any:
    """A PIL image of any mode as an upright RGB image: EXIF orientation applied, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert would clip to white
        image = image.point(lambda value: value / 256).convert("L")
    return load_image(image)


def _preprocess_one(image: Any, size: int) -> torch.Tensor:
    if hasattr(image, "convert"):  # a PIL image
        processor = VaeImageProcessor(resample="lanczos")
        image = processor.resize(load_rgb(image), size, size, resize_mode="crop")
        return processor.normalize(processor.numpy_to_pt(processor.pil_to_numpy(image)))
    if not torch.is_tensor(image):
        if not hasattr(image, "__array__"):
            raise ValueError(f"images must be PIL images, numpy arrays or tensors, got {type(image).__name__}")
        array = torch.as_tensor(image)
        image = array.movedim(-1, -3) if array.ndim in (3, 4) else array
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(
            "images must have 3 channels: arrays (N, H, W, 3), tensors (N, 3, H, W); as channels first this is "
            f"{tuple(image.shape)}"
        )
    if batch.dtype == torch.uint8:
        batch = batch / 255
    if not batch.is_floating_point():
        raise ValueError(f"images must be uint8 or floats in [0, 1], got {batch.dtype}")
    if not (batch.isfinite().all() and batch.min() >= 0 and batch.max() <= 1):
        raise ValueError(f"images must be in [0, 1], got {batch.min().item():g} to {batch.max().item():g}")
    height, width = batch.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        resized = (max(size, round(height * scale)), max(size, round(width * scale)))
        batch = F.interpolate(batch, resized, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
        batch = batch[..., top : top + size, left : left + size]
    return 2 * batch - 1


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
        self._check_scheduler()
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
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

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
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
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
        self._check_scheduler()

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

    def label_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor | None) -> torch.Tensor | None:
        """Ids, names, one or many -> (L,) int64; None stays None. Raises ValueError on an unknown id or name."""
        if class_labels is None:
            return None
        num_classes = self.energy_model.config.num_classes
        if num_classes is None:
            raise ValueError(f"this model was trained without classes, got class_labels={class_labels!r}")
        if torch.is_tensor(class_labels):
            class_labels = class_labels.flatten().tolist()
        elif isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        label2id = {name: i for i, name in self.id2label.items()}
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                if label not in label2id:
                    close = difflib.get_close_matches(label, label2id, n=3)
                    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
                    names = ", ".join(list(label2id)[:20]) + (", ..." if len(label2id) > 20 else "")
                    raise ValueError(
                        f"unknown class name {label!r} in class_labels; {hint or 'the names are ' + names}"
                    )
                label = label2id[label]
            if not isinstance(label, int) or not 0 <= label < num_classes:
                raise ValueError(f"class_labels must be names or ids in [0, {num_classes}), got {label!r}")
            ids.append(label)
        if not ids:
            raise ValueError("class_labels is empty; None samples without labels")
        return torch.tensor(ids)

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

    def _check_scheduler(self) -> None:
        """The energy network owns its noise schedule; a scheduler on another one would sample nonsense silently."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(f"{name} has prediction_type {config.prediction_type!r}, this pipeline needs 'epsilon'")
        own = self.energy_model.alphas_cumprod.float().cpu()
        other = getattr(self.scheduler, "alphas_cumprod", None)
        if other is None or own.shape != other.shape or not torch.allclose(own, other.float().cpu(), atol=1e-5):
            fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
            needed = {field: self.energy_model.config[field] for field in fields}
            received = {field: config.get(field) for field in fields}
            raise ValueError(
                f"{name} has another noise schedule than the energy network: it needs {needed}, got {received}; build "
                f"it with {name}.from_config(pipeline.scheduler.config)"
            )
