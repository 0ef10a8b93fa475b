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

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .noise_schedule import noise_schedule
from .recomputation import recomputed


@dataclass
class EnergyOutput(BaseOutput):
    """What an energy network says of a batch.

    Args:
        energy: (N,), low = likely, at least float32. Comparable at equal timesteps only; across them divide by sigma_t.
        logits: (N, K), at least float32, at the null label; None for a model without classes.
    """

    energy: torch.Tensor
    logits: torch.Tensor | None = None


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Upcasts half types to float32; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """A context in which operations on the tensor's device keep its precision."""
    # There is no autocast on the meta device, where a network only counts what it would need.
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


def _values_can_be_checked(tensor: torch.Tensor) -> bool:
    """Compiled code cannot branch on values, and a tensor on the meta device has none."""
    return not torch.compiler.is_compiling() and tensor.device.type != "meta"


def attention_pool(energy_map: torch.Tensor) -> torch.Tensor:
    """Parameter-free attention pool of a map: what its spatial mean attends to.

    Tokens are the mean and every position; the result is the mean's row of softmax(tokens tokens^T / sqrt(K)) tokens.

    Args:
        energy_map: (N, K, h, w).

    Returns:
        (N, K).

    Source: the published EGC implementation's pooling of the latent models' output map.
    """
    positions = energy_map.flatten(2).transpose(1, 2)  # (N, h*w, K)
    mean = positions.mean(dim=1, keepdim=True)  # (N, 1, K)
    tokens = torch.cat([mean, positions], dim=1)
    weights = (mean @ tokens.transpose(1, 2) * tokens.shape[-1] ** -0.5).softmax(dim=-1)  # (N, 1, 1 + h*w)
    return (weights @ tokens).squeeze(1)


class EnergyModel(ModelMixin, ConfigMixin):
    """What every backbone shares: the noise schedule, the energy and logits of its output, and their derivatives.

    A backbone registers the config fields of `EGCUNet`'s first block (sample_size ... beta_schedule), calls
    `check_energy_config`, runs its blocks through `run_block` and implements `network`.
    """

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False  # set by diffusers' `enable_gradient_checkpointing`
    _taking_input_gradient = False

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """See `ConfigMixin.load_config`. Refuses another backbone's folder, which would load as random weights."""
        loaded = super().load_config(*arguments, **options)
        saved_as = (loaded[0] if isinstance(loaded, tuple) else loaded).get("_class_name", cls.__name__)
        if saved_as != cls.__name__:
            raise ValueError(f"this folder holds an {saved_as}, it cannot be loaded as an {cls.__name__}")
        return loaded

    def network(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        *,
        twice_differentiable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The backbone's raw output.

        Args:
            noisy_latents: (N, C, h, w), checked.
            timesteps: (N,).
            class_labels: (N,) in [-1, K) for a model with a class embedding, else None.
            twice_differentiable: whether the result will be differentiated twice.

        Returns:
            Head "map": the map f (N, E, h, w), and None. Head "inner": the field h (N, C, h, w), and the logits (N, K)
            or None without classes.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement network()")

    def run_block(self, block: nn.Module, *inputs: Any, twice_differentiable: bool) -> torch.Tensor:
        """A block's output; with activation checkpointing, what training would keep of it is recomputed when needed."""
        run = functools.partial(block, twice_differentiable=twice_differentiable)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return recomputed(run, tuple(block.parameters()), inputs, lambda: not self._taking_input_gradient)
        return run(*inputs)

    def check_energy_config(self) -> int | None:
        """Checks the fields that every backbone shares; returns E, the map head's channels (None for head "inner").

        Raises:
            ValueError: naming the field, what was received and what is allowed.
        """
        c = self.config
        noise_schedule(c.num_train_timesteps, c.beta_start, c.beta_end, c.beta_schedule, torch.float32)
        if c.head not in ("map", "inner"):
            raise ValueError(f"head must be 'map' or 'inner', got {c.head!r}")
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
        cached = getattr(self, "_alphas_cumprod", None)
        if cached is None or cached.dtype != dtype or cached.device != self.device:
            c = self.config
            # Built outside inference mode: an inference tensor in the cache could not be used in training afterwards.
            with torch.inference_mode(False):
                cached = noise_schedule(c.num_train_timesteps, c.beta_start, c.beta_end, c.beta_schedule, dtype)
                cached = cached.to(self.device)
            self._alphas_cumprod = cached
        return cached

    def noise_levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t. Between integers, log(sigma_t / alpha_t) is interpolated, as diffusers' schedulers do.

        Args:
            timesteps: (N,) in [0, num_train_timesteps), integer or float.

        Returns:
            alpha (N,) and sigma (N,), float32 or float64, alpha^2 + sigma^2 = 1.
        """
        alphas_cumprod = self.alphas_cumprod
        if not timesteps.is_floating_point():
            abar = alphas_cumprod[timesteps]
            return abar.sqrt(), (1 - abar).sqrt()
        log_ratio = 0.5 * ((1 - alphas_cumprod).log() - alphas_cumprod.log())  # log(sigma_t / alpha_t) at the integers
        lower = timesteps.floor().long().clamp(0, len(alphas_cumprod) - 1)
        upper = (lower + 1).clamp(max=len(alphas_cumprod) - 1)
        ratio = torch.lerp(log_ratio[lower], log_ratio[upper], (timesteps - lower).to(log_ratio.dtype)).exp()
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha

    # --- energy, logits and their derivatives -----------------------------------------------------------------------

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> EnergyOutput:
        """Energy and class logits. Differentiable twice by `noisy_latents` where these require grad.

        Args:
            noisy_latents: (N, C, h, w), scaled latents at `timesteps`.
            timesteps: (N,) or a scalar, in [0, num_train_timesteps), integer or float. Clean latents belong to 0.
            class_labels: (N,) int64 in [-1, K), what the class embedding sees; -1 is null. Ignored without one.

        Returns:
            `EnergyOutput`: energy (N,) at `class_labels`, logits (N, K) at the null label, or None without classes.

        Raises:
            ValueError: a shape, label or timestep does not fit this model.
        """
        timesteps = self._check_inputs(noisy_latents, timesteps, class_labels)
        levels = self.noise_levels(timesteps)
        twice_differentiable = torch.is_grad_enabled() and noisy_latents.requires_grad
        energy, _, logits = self._energies_and_logits(
            noisy_latents, timesteps, class_labels, levels, twice_differentiable
        )
        return EnergyOutput(energy=energy, logits=logits)

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
        epsilon, _ = self.epsilon_and_output(
            noisy_latents,
            timesteps,
            class_labels,
            guidance_labels=guidance_labels,
            guidance_scale=guidance_scale,
            classifier_free_scale=classifier_free_scale,
            with_logits=False,
        )
        return epsilon

    def epsilon_and_output(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        *,
        guidance_labels: torch.Tensor | None = None,
        guidance_scale: float = 0.0,
        classifier_free_scale: float = 1.0,
        with_logits: bool = True,
    ) -> tuple[torch.Tensor, EnergyOutput]:
        """`epsilon`, with the energy and logits of the forward pass that it differentiated. Arguments as there.

        Without `with_logits` the logits are None, and a model with a class embedding sees the null label only where the
        scales ask for it.
        """
        timesteps = self._check_inputs(noisy_latents, timesteps, class_labels)
        if guidance_scale != 0:
            guidance_labels = class_labels if guidance_labels is None else guidance_labels
            self._check_guidance(guidance_labels, len(noisy_latents))
        if classifier_free_scale != 1 and (class_labels is None or not self.config.class_embedding):
            raise ValueError(
                f"classifier_free_scale={classifier_free_scale} needs class_labels and a model with class_embedding"
            )
        if classifier_free_scale == 0:
            class_labels = None
        with_null_label = with_logits or guidance_scale != 0 or classifier_free_scale != 1
        alpha, sigma = self.noise_levels(timesteps)
        twice_differentiable = torch.is_grad_enabled()

        def potential(latents: torch.Tensor) -> tuple[torch.Tensor, tuple]:
            energy, null_energy, logits = self._energies_and_logits(
                latents, timesteps, class_labels, (alpha, sigma), twice_differentiable, with_null_label
            )
            total = energy
            if classifier_free_scale != 1:
                total = null_energy + classifier_free_scale * (energy - null_energy)
            if guidance_scale != 0:
                log_p_y = F.log_softmax(logits, dim=-1).gather(1, guidance_labels[:, None]).squeeze(1)
                total = total - guidance_scale * sigma * log_p_y
            # Rows do not see each other, so the gradient of the sum is every row's own gradient.
            return total.sum(), (energy, logits) if with_logits and logits is not None else (energy,)

        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            # The one form that compiles, and that inference mode does not switch off.
            epsilon, output = torch.func.grad(potential, has_aux=True)(noisy_latents)
            return epsilon, EnergyOutput(*output)
        # Elsewhere autograd: the same gradient, without the graph of the gradient where nobody will ask for it.
        with torch.enable_grad():
            if not (twice_differentiable and noisy_latents.requires_grad):
                noisy_latents = noisy_latents.detach().requires_grad_()
            total, output = potential(noisy_latents)
            self._taking_input_gradient = True
            try:
                (epsilon,) = torch.autograd.grad(total, noisy_latents, create_graph=twice_differentiable)
            finally:
                self._taking_input_gradient = False
        if not twice_differentiable:
            output = tuple(tensor.detach() for tensor in output)
        return epsilon, EnergyOutput(*output)

    def _energies_and_logits(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        noise_levels: tuple[torch.Tensor, torch.Tensor],
        twice_differentiable: bool,
        with_null_label: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One pass over N or 2N rows: energy (N,) at the labels, energy (N,) and logits (N, K) at the null label.

        `with_null_label` False saves the latter's rows where labels are given; then only the first result counts.
        """
        config, num_rows = self.config, len(noisy_latents)
        alpha, sigma = noise_levels
        latents, labels = noisy_latents, None
        if config.class_embedding:
            labels = torch.full((num_rows,), -1, dtype=torch.long, device=latents.device)
            if class_labels is not None and not with_null_label:
                labels = class_labels
            elif class_labels is not None:
                # The energy sees the label, the classifier must not: both as one batch of 2N rows.
                labels = torch.cat([class_labels, labels])
                latents, timesteps, alpha, sigma = (torch.cat([x, x]) for x in (latents, timesteps, alpha, sigma))
        output, logits = self.network(latents, timesteps, labels, twice_differentiable=twice_differentiable)

        latents = at_least_float32(latents)
        # Autocast would run the head's matrix products in half precision again.
        with without_autocast(latents):
            output = at_least_float32(output)
            log_evidence = None
            if config.head == "map":
                energy = -output.logsumexp(dim=1).sum(dim=(1, 2))
                if config.num_classes is not None:
                    logits = attention_pool(output[-num_rows:])
            else:
                energy = (latents * output).sum(dim=(1, 2, 3)) / 2
                if logits is not None:
                    logits = at_least_float32(logits)
                    log_evidence, logits = logits.logsumexp(dim=1), logits[-num_rows:]
            if config.gaussian_part:
                energy = sigma * latents.square().sum(dim=(1, 2, 3)) / 2 + alpha * energy
            if log_evidence is not None:
                energy = energy - sigma * log_evidence
        return energy[:num_rows], energy[-num_rows:], logits

    # --- input checks -----------------------------------------------------------------------------------------------

    def _check_inputs(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
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
        num_rows = len(noisy_latents)
        timesteps = torch.as_tensor(timesteps, device=noisy_latents.device)
        if timesteps.ndim == 0:
            timesteps = timesteps.expand(num_rows)
        if timesteps.shape != (num_rows,):
            raise ValueError(f"timesteps must be a scalar or ({num_rows},), got shape {tuple(timesteps.shape)}")
        if num_rows and _values_can_be_checked(timesteps):
            low, high = (float(t) for t in timesteps.aminmax())
            if not 0 <= low <= high < config.num_train_timesteps:
                raise ValueError(f"timesteps must be in [0, {config.num_train_timesteps}), got {low:g} to {high:g}")
        if config.class_embedding and class_labels is not None:
            self.check_labels("class_labels", class_labels, num_rows, lowest=-1)
        return timesteps

    def _feature_inputs(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Checked timesteps (N,) and what the class embedding sees: the labels, the null label, or None without one."""
        timesteps = self._check_inputs(noisy_latents, timesteps, class_labels)
        if not self.config.class_embedding:
            return timesteps, None
        if class_labels is None:
            class_labels = torch.full((len(noisy_latents),), -1, dtype=torch.long, device=noisy_latents.device)
        return timesteps, class_labels

    def _check_guidance(self, guidance_labels: torch.Tensor | None, num_rows: int) -> None:
        if self.config.num_classes is None:
            raise ValueError("guidance needs a model with classes, this one has num_classes=None")
        if guidance_labels is None:
            raise ValueError("guidance_scale is not 0 but neither guidance_labels nor class_labels is given")
        self.check_labels("guidance_labels", guidance_labels, num_rows, lowest=0)

    def check_labels(self, name: str, labels: torch.Tensor, num_rows: int, lowest: int) -> None:
        """Raises ValueError unless `labels` is (num_rows,) int64 in [lowest, K)."""
        num_classes = self.config.num_classes
        if labels.shape != (num_rows,) or labels.dtype != torch.long:
            raise ValueError(f"{name} must be ({num_rows},) int64, got {tuple(labels.shape)} {labels.dtype}")
        if num_rows and _values_can_be_checked(labels):
            low, high = (int(label) for label in labels.aminmax())
            if low < lowest or high >= num_classes:
                raise ValueError(f"{name} must be in [{lowest}, {num_classes}), got {low} to {high}")
