"""One scalar energy, two jobs: the forward pass classifies, the input gradient denoises.

    z_t = alpha_t z_0 + sigma_t eps,      alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)
    log p_t(z, y)       = -energy(z, t) / sigma_t + log_softmax(logits(z, t))[y] + const(t)
    epsilon(z, t)       = grad_z energy(z, t) = -sigma_t * score
    guided epsilon(z,y) = grad_z [ energy(z, t) - w * sigma_t * log_softmax(logits(z, t))[y] ]
    classifier-free:      grad_z [ (1 - s) * energy(z, t) + s * energy(z, t, c) ], with a class embedding that sees c

Summing the joint over y leaves exp(-energy / sigma_t): the label is marginalised by construction, and w = 1 samples
p(z | y) exactly. Source: Guo et al., "EGC: Image Generation and Classification via a Diffusion Energy-Based Model",
ICCV 2023 (arXiv 2304.02012).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .heads import ENERGY_POOLINGS, EnergyOutput, attention_pool, inner_energy, map_energy, with_gaussian_part
from .noise_schedule import interpolated_levels, log_ratio_slopes, noise_schedule
from .numerics import at_least_float32, twice_differentiable, without_autocast
from .potentials import Potential, classifier_free_potential, classifier_potential, energy_potential, input_gradient
from .recomputation import recomputed
from .weights import check_loaded

# What the class embedding sees where it sees no label.
NULL_LABEL = -1


def _repeated(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class EnergyModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """What every backbone shares: the noise schedule, the energy and logits of its output, and their derivatives.

    A backbone registers the config fields of `EGCUNet`'s first block (sample_size ... beta_schedule), calls
    `check_energy_config`, runs its blocks through `run_block` and implements `network`.
    """

    _supports_gradient_checkpointing = True
    # Both move or cast weights as soon as a layer's forward pass is over; the input gradient still needs them.
    _supports_group_offloading = False
    gradient_checkpointing = False  # set by diffusers' `enable_gradient_checkpointing`

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """See `ModelMixin.from_pretrained`.

        Raises:
            ValueError: naming the tensors that are missing, unexpected, of another shape, NaN or infinite.
        """
        model, report = super().from_pretrained(*arguments, output_loading_info=True, **options)
        check_loaded(model, report)
        return (model, report) if output_loading_info else model

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """See `ConfigMixin.load_config`. Refuses another backbone's folder, which would load as random weights."""
        loaded = super().load_config(*arguments, **options)
        saved_as = (loaded[0] if isinstance(loaded, tuple) else loaded).get("_class_name", cls.__name__)
        if saved_as != cls.__name__:
            raise ValueError(f"this folder holds an {saved_as}, it cannot be loaded as an {cls.__name__}")
        return loaded

    def enable_layerwise_casting(self, *arguments: Any, **options: Any) -> None:
        """Raises ValueError: a layer's weights would be cast away before the input gradient has used them."""
        raise ValueError(
            f"{type(self).__name__} does not support layerwise casting: its input gradient needs a layer's weights "
            "after the layer's forward pass; cast the whole network with .to(dtype=...)"
        )

    def set_attention_backend(self, backend: str) -> None:
        """Raises ValueError: the kernel follows from how often a pass is differentiated, see `models/attention.py`."""
        raise ValueError(
            f"{type(self).__name__} has no attention backend of its own, got {backend!r}: use the context manager "
            "diffusers.models.attention_backend, which holds where a pass is differentiated once"
        )

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compiles the forward pass, as `torch.nn.Module.compile` does, and `epsilon`, which sampling calls."""
        super().compile(*arguments, **options)
        self.epsilon = torch.compile(self.epsilon, *arguments, **options)

    def network(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The backbone's raw output.

        Args:
            noisy_latents: (N, C, h, w), checked.
            timesteps: (N,).
            embedded_labels: (N,) in [-1, K), -1 = null, for a model with a class embedding, else None.

        Returns:
            Head "map": the map f (N, E, h, w), and None. Head "inner": the field h (N, C, h, w), and the logits (N, K)
            or None without classes.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement network()")

    def run_block(self, block: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        """A block's output; with activation checkpointing, what training would keep of it is recomputed when needed."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return recomputed(block, tuple(block.parameters()), inputs)
        return block(*inputs)

    def check_energy_config(self) -> int | None:
        """Checks the fields that every backbone shares; returns E, the map head's channels (None for head "inner").

        Raises:
            ValueError: naming the field, what was received and what is allowed.
        """
        c = self.config
        noise_schedule(c.num_train_timesteps, c.beta_start, c.beta_end, c.beta_schedule, torch.float32)
        if c.head not in ("map", "inner"):
            raise ValueError(f"head must be 'map' or 'inner', got {c.head!r}")
        if c.energy_pooling not in ENERGY_POOLINGS:
            raise ValueError(f"energy_pooling must be one of {', '.join(ENERGY_POOLINGS)}, got {c.energy_pooling!r}")
        if c.num_classes is not None and c.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, or None for unlabelled data, got {c.num_classes}")
        if c.class_embedding and c.num_classes is None:
            raise ValueError("class_embedding needs num_classes, got num_classes=None")
        if c.head == "inner":
            if c.energy_channels is not None:
                raise ValueError(f"energy_channels belongs to head 'map'; head 'inner' got {c.energy_channels}")
            return None
        if c.num_classes is None:
            if c.energy_channels is None or c.energy_channels < 1:
                raise ValueError(
                    f"head 'map' without classes needs energy_channels of at least 1, got {c.energy_channels}"
                )
            return c.energy_channels
        if c.energy_channels not in (None, c.num_classes):
            raise ValueError(
                f"energy_channels must be num_classes={c.num_classes} (the logits are pooled from the same map), "
                f"got {c.energy_channels}"
            )
        return c.num_classes

    # --- the noise schedule -----------------------------------------------------------------------------------------

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """(T,) abar_t on the model's device, float32 (float64 for a float64 model). Not a buffer: no cast ruins it."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        # Weights on the meta device are offloaded, or only counted.
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        cached = getattr(self, "_alphas_cumprod", None)
        if cached is None or cached.dtype != dtype or cached.device != device:
            c = self.config
            # Built outside inference mode: an inference tensor in the cache could not be used in training afterwards.
            with torch.inference_mode(False):
                cached = noise_schedule(c.num_train_timesteps, c.beta_start, c.beta_end, c.beta_schedule, dtype)
                cached = cached.to(device)
            self._alphas_cumprod = cached
        return cached

    def noise_levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t. Between integers, log(sigma_t / alpha_t) is interpolated, as diffusers' schedulers do.

        Args:
            timesteps: (N,) in [0, num_train_timesteps), integer or float.

        Returns:
            alpha (N,) and sigma (N,), float32 or float64, alpha^2 + sigma^2 = 1.
        """
        alphas_cumprod = self.alphas_cumprod.to(timesteps.device)
        if timesteps.is_floating_point():
            return interpolated_levels(alphas_cumprod, timesteps)
        abar = alphas_cumprod[timesteps]
        return abar.sqrt(), (1 - abar).sqrt()

    def log_ratio_slopes(self, timesteps: torch.Tensor) -> torch.Tensor:
        """d log(sigma_t / alpha_t) / dt (N,) of `noise_levels` at timesteps (N,), see `models/noise_schedule.py`."""
        return log_ratio_slopes(self.alphas_cumprod.to(timesteps.device), timesteps)

    # --- energy, logits and their derivatives -----------------------------------------------------------------------

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> EnergyOutput | tuple[torch.Tensor, ...]:
        """Energy and class logits. Differentiable twice by `noisy_latents` where these require grad.

        Args:
            noisy_latents: (N, C, h, w), scaled latents at `timesteps`.
            timesteps: (N,) or a scalar, in [0, num_train_timesteps), integer or float. Clean latents belong to 0.
            class_labels: (N,) int64 in [-1, K), what the class embedding sees; -1 is null. Ignored without one.
            return_dict: False returns a tuple, (energy, logits), or (energy,) without classes.

        Returns:
            `EnergyOutput`: energy (N,) at `class_labels`, logits (N, K) at the null label, or None without classes.

        Raises:
            ValueError: a shape, label or timestep does not fit this model.
        """
        with twice_differentiable(torch.is_grad_enabled() and noisy_latents.requires_grad):
            if class_labels is None or not self.config.class_embedding:
                (output,) = self.read_at(noisy_latents, timesteps, [None])
            else:
                # The energy sees the label, the classifier must not.
                at_label, at_null = self.read_at(noisy_latents, timesteps, [class_labels, None])
                output = EnergyOutput(energy=at_label.energy, logits=at_null.logits)
        return output if return_dict else output.to_tuple()

    @apply_forward_hook  # offloading moves weights before `forward`, which sampling does not call
    def read_at(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, labels_seen: Sequence[torch.Tensor | None]
    ) -> list[EnergyOutput]:
        """Energy and logits of the same latents at several labels, in one pass; see `models/potentials.py`.

        Args:
            noisy_latents: (N, C, h, w), scaled latents at `timesteps`.
            timesteps: (N,) or a scalar, in [0, num_train_timesteps), integer or float.
            labels_seen: by the class embedding, (N,) int64 in [-1, K) each, -1 = null; None: the null label alone.

        Returns:
            An `EnergyOutput` for each of them, energy and logits both as the network gives them at these labels.

        Raises:
            ValueError: a shape, label or timestep does not fit this model.
        """
        timesteps = self._check_inputs(noisy_latents, timesteps)
        num_rows, embedded_labels = noisy_latents.shape[0], None
        if self.config.class_embedding:
            for labels in labels_seen:
                if labels is not None:
                    self.check_labels("class_labels", labels, num_rows, lowest=NULL_LABEL)
            null = torch.full((num_rows,), NULL_LABEL, dtype=torch.long, device=noisy_latents.device)
            embedded_labels = _repeated([null if labels is None else labels for labels in labels_seen])
        levels = [_repeated([level] * len(labels_seen)) for level in self.noise_levels(timesteps)]
        latents, timesteps = (_repeated([tensor] * len(labels_seen)) for tensor in (noisy_latents, timesteps))
        energy, logits = self._energy_and_logits(latents, timesteps, embedded_labels, *levels)
        logits = [None] * len(labels_seen) if logits is None else logits.tensor_split(len(labels_seen))
        return [EnergyOutput(*output) for output in zip(energy.tensor_split(len(labels_seen)), logits, strict=True)]

    def _energy_and_logits(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        embedded_labels: torch.Tensor | None,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Energy (N,) and logits (N, K) of one pass through the network."""
        config = self.config
        output, logits = self.network(latents, timesteps, embedded_labels)
        latents = at_least_float32(latents)
        # Autocast would run the head's matrix products in half precision again.
        with without_autocast(latents):
            output = at_least_float32(output)
            if config.head == "map":
                energy = map_energy(output, config.energy_pooling)
                logits = None if config.num_classes is None else attention_pool(output)
            else:
                energy = inner_energy(latents, output)
                logits = None if logits is None else at_least_float32(logits)
            if config.gaussian_part:
                energy = with_gaussian_part(energy, latents, alpha, sigma)
            if config.head == "inner" and logits is not None:
                energy = energy - sigma * ENERGY_POOLINGS[config.energy_pooling](logits, dim=1)
        return energy, logits

    def epsilon(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        *,
        guidance_labels: torch.Tensor | None = None,
        guidance_scale: float = 0.0,
        classifier_free_scale: float = 1.0,
    ) -> torch.Tensor:
        """Noise prediction: the gradient of the energy, guided by the classifier in the same backward pass.

        Args:
            noisy_latents: (N, C, h, w), scaled latents at `timesteps`; need not require grad.
            timesteps: (N,) or a scalar, in [0, num_train_timesteps), integer or float.
            class_labels: (N,) int64 in [-1, K), what the class embedding sees; -1 is null. Ignored without one.
            guidance_labels: (N,) int64 in [0, K), the y of log p(y | z_t). None: `class_labels`.
            guidance_scale: weight w of sigma_t * grad log p(y | z_t); 0 is unguided, 1 samples p(z | y) exactly.
            classifier_free_scale: weight s of the energy at `class_labels` against the energy at the null label; 1 is
                the former alone, more is classifier-free guidance, 0 the latter alone. Needs a class embedding.

        Returns:
            (N, C, h, w), the dtype of `noisy_latents`. Differentiable by the parameters where gradients are on; works
            under `torch.no_grad()` and `torch.inference_mode()`. Whatever the scales, this is one forward and one
            backward pass: of 2N rows where both `class_labels` and the null label have to be seen, else of N.

        Raises:
            ValueError: a shape, label or timestep does not fit this model, or guidance without labels, classes or
                class embedding.

        Source: EGC (ICCV 2023), class-conditional score, times -sigma_t.
        """
        potential = self.potential(
            class_labels,
            guidance_labels=guidance_labels,
            guidance_scale=guidance_scale,
            classifier_free_scale=classifier_free_scale,
        )
        return input_gradient(potential, noisy_latents, timesteps)[0]

    def potential(
        self,
        class_labels: torch.Tensor | None = None,
        *,
        guidance_labels: torch.Tensor | None = None,
        guidance_scale: float = 0.0,
        classifier_free_scale: float = 1.0,
    ) -> Potential:
        """The potential that `epsilon` differentiates. Arguments and errors as there."""
        embedded = self.config.class_embedding
        if classifier_free_scale != 1 and (class_labels is None or not embedded):
            raise ValueError(
                f"classifier_free_scale={classifier_free_scale} needs class_labels and a model with class_embedding"
            )
        if classifier_free_scale in (0, 1):
            potential = energy_potential(self, class_labels if embedded and classifier_free_scale == 1 else None)
        else:
            potential = classifier_free_potential(self, class_labels, classifier_free_scale)
        if guidance_scale != 0:
            guidance_labels = class_labels if guidance_labels is None else guidance_labels
            if self.config.num_classes is None:
                raise ValueError("guidance needs a model with classes, this one has num_classes=None")
            if guidance_labels is None:
                raise ValueError("guidance_scale is not 0 but neither guidance_labels nor class_labels is given")
            potential = potential + classifier_potential(self, guidance_labels, guidance_scale)
        return potential

    # --- input checks -----------------------------------------------------------------------------------------------

    def _values_can_be_checked(self, tensor: torch.Tensor) -> bool:
        """Compiled code cannot branch on values, the meta device has none, and a training step must not wait for a GPU.

        What training gives has been checked where it was read.
        """
        waits = tensor.device.type != "cpu" and self.training
        return not (torch.compiler.is_compiling() or tensor.device.type == "meta" or waits)

    def _check_inputs(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Raises ValueError on what does not fit; returns `timesteps` as (N,) on the latents' device."""
        config = self.config
        if noisy_latents.ndim != 4 or noisy_latents.shape[1] != config.in_channels:
            raise ValueError(
                f"noisy_latents must be (N, {config.in_channels}, h, w), got shape {tuple(noisy_latents.shape)}"
            )
        height, width = noisy_latents.shape[-2:]
        if height % self.size_divisor or width % self.size_divisor:
            raise ValueError(
                f"noisy_latents' height and width must be divisible by {self.size_divisor}, got {height} x {width}"
            )
        num_rows = noisy_latents.shape[0]  # `len` would be a constant in an exported graph
        timesteps = torch.as_tensor(timesteps, device=noisy_latents.device)
        if timesteps.ndim == 0:
            timesteps = timesteps.expand(num_rows)
        if timesteps.shape != (num_rows,):
            raise ValueError(f"timesteps must be a scalar or ({num_rows},), got shape {tuple(timesteps.shape)}")
        if num_rows and self._values_can_be_checked(timesteps):
            low, high = (float(t) for t in timesteps.detach().aminmax())
            if not 0 <= low <= high < config.num_train_timesteps:
                raise ValueError(f"timesteps must be in [0, {config.num_train_timesteps}), got {low:g} to {high:g}")
        return timesteps

    def check_labels(self, name: str, labels: torch.Tensor, num_rows: int, lowest: int) -> None:
        """Raises ValueError unless `labels` is (num_rows,) int64 in [lowest, K)."""
        num_classes = self.config.num_classes
        if labels.shape != (num_rows,) or labels.dtype != torch.long:
            raise ValueError(f"{name} must be ({num_rows},) int64, got {tuple(labels.shape)} {labels.dtype}")
        if num_rows and self._values_can_be_checked(labels):
            low, high = (int(label) for label in labels.aminmax())
            if low < lowest or high >= num_classes:
                raise ValueError(f"{name} must be in [{lowest}, {num_classes}), got {low} to {high}")
