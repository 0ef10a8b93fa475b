# latent_egc/models/heads.py
"""The energy heads: how a network's output is read as an energy and as class logits.

    map     energy = -sum over positions of logsumexp_e f,   logits = attention pool of f        f (N, E, h, w)
    inner   energy = <z, h> / 2 - sigma_t logsumexp(logits)                                      h (N, C, h, w)

with the Gaussian part, sigma_t |z|^2 / 2 + alpha_t times the map's energy, or times inner's <z, h> / 2. Where the
logsumexp is a logmeanexp, a network whose outputs are zero adds nothing: epsilon and logits are the same, and the
energies of different noise levels then start without h w log E alpha_t / sigma_t (inner: log K) between them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class EnergyOutput(BaseOutput):
    """What an energy network says of a batch.

    Args:
        energy: (N,), low = likely, at least float32. Comparable at equal timesteps only; across them divide by sigma_t.
        logits: (N, K), at least float32; None for a model without classes.
    """

    energy: torch.Tensor
    logits: torch.Tensor | None = None


def logmeanexp(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The logarithm of the mean of exponentials: the logsumexp less the logarithm of their number."""
    return values.logsumexp(dim=dim) - math.log(values.shape[dim])


# How a head pools over channels or classes -> the function.
ENERGY_POOLINGS: dict[str, Callable[..., torch.Tensor]] = {"logsumexp": torch.logsumexp, "logmeanexp": logmeanexp}


def map_energy(energy_map: torch.Tensor, pooling: str = "logsumexp") -> torch.Tensor:
    """Minus the sum over positions of one of `ENERGY_POOLINGS` over channels: (N, E, h, w) -> (N,)."""
    return -ENERGY_POOLINGS[pooling](energy_map, dim=1).sum(dim=(1, 2))


def inner_energy(latents: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """<z, h> / 2: latents (N, C, h, w), field (N, C, h, w) -> (N,).

    Where h is linear and symmetric in z its gradient is h, so a noise predictor's weights are a warm start.
    """
    return (latents * field).sum(dim=(1, 2, 3)) / 2


def with_gaussian_part(
    energy: torch.Tensor, latents: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The network's share (N,) weighted by alpha_t, beside sigma_t |z|^2 / 2: its gradient then learns v."""
    return sigma * latents.square().sum(dim=(1, 2, 3)) / 2 + alpha * energy


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


# latent_egc/models/noise_schedule.py
"""The noise schedule, and noising by it: z_t = alpha_t z_0 + sigma_t eps, alpha_t = sqrt(abar_t)."""

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar


def noise_schedule(
    num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str, dtype: torch.dtype
) -> torch.Tensor:
    """abar_t, the share of signal left at each timestep; the schedules and names are diffusers'.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: first and last beta; "squaredcos_cap_v2" ignores them.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        dtype: float32 gives the very numbers of diffusers' schedulers.

    Returns:
        (T,) on the CPU, decreasing.

    Raises:
        ValueError: unknown `beta_schedule`, or betas not in 0 < beta_start <= beta_end < 1.
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    # The device is named so that a model built on the meta device (to count its parameters) still has its schedule.
    options: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
    if beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, **options)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, **options) ** 2
    elif beta_schedule == "squaredcos_cap_v2":
        with torch.device("cpu"):
            betas = betas_for_alpha_bar(num_train_timesteps).to(dtype)
    else:
        raise ValueError(
            f"beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', got {beta_schedule!r}"
        )
    return torch.cumprod(1 - betas, dim=0)


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, noise_levels: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Noisy latents alpha z_0 + sigma eps.

    Args:
        latents: (N, C, h, w), clean and scaled.
        noise: (N, C, h, w), standard normal.
        noise_levels: alpha and sigma, (N,) each or scalars; see `EnergyModel.noise_levels`.

    Returns:
        (N, C, h, w).
    """
    alpha, sigma = (level[..., None, None, None] for level in noise_levels)
    return alpha * latents + sigma * noise


def interpolated_levels(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t (N,) at timesteps (N,) between the integers, where log(sigma_t / alpha_t) is linear.

    Args:
        alphas_cumprod: (T,).
        timesteps: (N,) floats in [0, T).
    """
    lower, start, end = _intervals(alphas_cumprod, timesteps)
    ratio = torch.lerp(start, end, (timesteps - lower).to(start.dtype).clamp(max=1)).exp()
    alpha = (1 + ratio**2).rsqrt()
    return alpha, ratio * alpha


def log_ratio_slopes(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """d log(sigma_t / alpha_t) / dt (N,) of `interpolated_levels`, and what autograd finds there.

    An integer's is that of the interval above it; T - 1, above which there is none, has that of the last one.

    Args:
        alphas_cumprod: (T,), T at least 2.
        timesteps: (N,) in [0, T - 1], integers or floats.
    """
    _, start, end = _intervals(alphas_cumprod, timesteps)
    return end - start


def timesteps_at(alphas_cumprod: torch.Tensor, log_ratios: torch.Tensor) -> torch.Tensor:
    """The inverse of `interpolated_levels`: timesteps (N,) float64 at which log(sigma_t / alpha_t) is as wanted.

    Args:
        alphas_cumprod: (T,).
        log_ratios: (N,); beyond the schedule they are its first or last.

    Returns:
        In [0, T - 1], on the CPU.
    """
    abar, wanted = alphas_cumprod.cpu().double(), log_ratios.cpu().double()
    schedule = 0.5 * (torch.log1p(-abar) - abar.log())
    upper = torch.searchsorted(schedule, wanted).clamp(1, len(schedule) - 1)
    below, above = schedule[upper - 1], schedule[upper]
    return upper - 1 + ((wanted - below) / (above - below)).clamp(0, 1)


def _intervals(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The integer at or below each timestep, at most T - 2, and log(sigma_t / alpha_t) there and at the next one."""
    log_ratio = 0.5 * ((1 - alphas_cumprod).log() - alphas_cumprod.log())
    lower = timesteps.floor().long().clamp(0, max(len(alphas_cumprod) - 2, 0))
    return lower, log_ratio[lower], log_ratio[(lower + 1).clamp(max=len(alphas_cumprod) - 1)]


# latent_egc/models/numerics.py
"""In which precision the running pass computes, and how often it will be differentiated.

Training an energy differentiates twice, and fused kernels have no second derivative; sampling and classification
differentiate at most once, and want the fused kernels. The energy model says which of the two it is for the time of a
pass, in the thread that runs it, and whoever has a choice of kernels asks.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Upcasts half types to float32; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """A context in which operations on the tensor's device keep its precision."""
    # There is no autocast on the meta device, where a network only counts what it would need.
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


class _Pass(threading.local):
    """What holds in the pass that this thread runs."""

    def __init__(self) -> None:
        # Of the instance from the start: compiled code is guarded by which attributes it has.
        self.twice_differentiable = False


_PASS = _Pass()


@contextmanager
def twice_differentiable(enabled: bool) -> Iterator[None]:
    """Within it, this thread's passes run on kernels with second derivatives, or on fused ones where not `enabled`."""
    before = _PASS.twice_differentiable
    _PASS.twice_differentiable = enabled
    try:
        yield
    finally:
        _PASS.twice_differentiable = before


def is_twice_differentiable() -> bool:
    """Whether the running pass will be differentiated twice."""
    return _PASS.twice_differentiable


# latent_egc/models/recomputation.py
"""Activation checkpointing of a block that is differentiated twice.

torch's own checkpointing is exact here, but saves little: what the input gradient recomputes is kept for the second
backward pass. Below, each of the passes (forward, gradient, gradient of the gradient) recomputes the block for itself,
and nothing of a block outlives a pass but its inputs and the gradient of its output.

In forward passes of a block, a training step's denoising part costs 12 instead of 6: forward 1, input gradient 1 + 1,
its backward pass 1 + 1 + 4, the forward's backward pass 1 + 2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable


# Not one a thread: backward passes may run in threads of their own.
_ONLY_INPUT_GRADIENTS = False


@contextmanager
def only_input_gradients() -> Iterator[None]:
    """Within it, a backward pass that records a graph leaves out the parameters' gradients: nobody asks for them."""
    global _ONLY_INPUT_GRADIENTS
    before = _ONLY_INPUT_GRADIENTS
    _ONLY_INPUT_GRADIENTS = True
    try:
        yield
    finally:
        _ONLY_INPUT_GRADIENTS = before


def recomputed(
    block: Callable[..., torch.Tensor],
    parameters: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """block(*inputs), with first and second derivatives for which the block is run again.

    Args:
        block: a deterministic function of its inputs and parameters; no randomness, which would differ when run again.
        parameters: what it depends on besides its inputs.
        inputs: tensors or None.

    Returns:
        The block's output. A third derivative raises RuntimeError.
    """
    device_type = next(tensor.device.type for tensor in inputs if tensor is not None)
    # Backward passes may run in another thread, where autocast is off and nobody has said how often to differentiate.
    autocast = (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))
    run = _Block(block, len(inputs), autocast, is_twice_differentiable())
    return _Recomputed.apply(run, *inputs, *parameters)


class _Block:
    """How to run a block again: on leaves that share memory with the tensors of the pass before."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        num_inputs: int,
        autocast: tuple[str, torch.dtype, bool],
        twice: bool,
    ) -> None:
        self.function, self.num_inputs = function, num_inputs
        self.autocast, self.twice = autocast, twice

    def __call__(self, tensors: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Inputs and parameters -> the output with its graph, and what to differentiate it by (None where not)."""
        device_type, dtype, enabled = self.autocast
        inputs = [
            None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
            for tensor in tensors[: self.num_inputs]
        ]
        with torch.enable_grad(), torch.autocast(device_type, dtype, enabled), twice_differentiable(self.twice):
            output = self.function(*inputs)
        leaves = [*inputs, *tensors[self.num_inputs :]]
        return output, [leaf if leaf is not None and leaf.requires_grad else None for leaf in leaves]


def _gradients(
    outputs: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor | None],
    grad_outputs: Sequence[torch.Tensor],
    create_graph: bool = False,
) -> list[torch.Tensor | None]:
    """torch.autograd.grad, None for leaves that are None or do not matter."""
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True, create_graph=create_graph))
    return [None if leaf is None else next(found) for leaf in leaves]


class _Recomputed(torch.autograd.Function):
    """(inputs, parameters) -> output."""

    @staticmethod
    def forward(ctx: Any, block: _Block, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.block = block
        ctx.save_for_backward(*tensors)
        return block.function(*tensors[: block.num_inputs])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        all_wanted = not (torch.is_grad_enabled() and _ONLY_INPUT_GRADIENTS)
        num_wanted = len(tensors) if all_wanted else ctx.block.num_inputs
        gradients = _RecomputedBackward.apply(ctx.block, num_wanted, grad_output, *tensors)
        return None, *gradients, *[None] * (len(tensors) - num_wanted)


class _RecomputedBackward(torch.autograd.Function):
    """(gradient of the output, inputs, parameters) -> gradients of the first `num_wanted` inputs and parameters."""

    @staticmethod
    def forward(
        ctx: Any, block: _Block, num_wanted: int, grad_output: torch.Tensor, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.block, ctx.num_wanted = block, num_wanted
        ctx.save_for_backward(grad_output, *tensors)
        output, leaves = block(tensors)
        return tuple(_gradients([output], leaves[:num_wanted], [grad_output]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad_output, *tensors = ctx.saved_tensors
        grad_output = grad_output.detach().requires_grad_()
        output, leaves = ctx.block(tensors)
        with torch.enable_grad():
            first = _gradients([output], leaves[: ctx.num_wanted], [grad_output], create_graph=True)
        pairs = [
            (gradient, cotangent)
            for gradient, cotangent in zip(first, cotangents, strict=True)
            if gradient is not None and cotangent is not None and gradient.requires_grad
        ]
        if not pairs:
            return None, None, *[None] * (1 + len(tensors))
        gradients, given = zip(*pairs, strict=True)
        return None, None, *_gradients(gradients, [grad_output, *leaves], given)


# latent_egc/models/potentials.py
"""Potentials: scalar functions U(z, t) whose input gradient is epsilon.

    U = energy(z, t)                                                    plain
    U = energy(z, t, c)                                                 at a label that the class embedding sees
    U = energy(z, t) + s (energy(z, t, c) - energy(z, t))               classifier-free guidance
    U = -w sigma_t log p(y | z, t)                                      the classifier, to be added to one of these

A potential says beforehand which labels it wants to see a network at, and sums of potentials say it together; so that
whatever is asked of one network is one forward pass, and the gradient one backward pass.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin


# An energy network, and what its class embedding sees: labels (N,) with -1 for null, or None, the null label alone.
Reading = tuple[ModelMixin, torch.Tensor | None]
# Looks up what was read of a network at labels.
Lookup = Callable[[ModelMixin, torch.Tensor | None], EnergyOutput]


class Potential:
    """U(z, t), one number a row; rows do not see each other. Potentials add up, and take factors.

    Args:
        readings: what it reads.
        value: from a lookup of what was read, and sigma_t (N,), to U (N,).
    """

    def __init__(self, readings: Sequence[Reading], value: Callable[[Lookup, torch.Tensor], torch.Tensor]) -> None:
        self.readings, self.value = list(readings), value

    def __call__(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, list[EnergyOutput]]:
        """U, and the outputs that it was read from.

        One forward pass a network, of N rows for each set of labels that it is seen at.

        Args:
            noisy_latents: (N, C, h, w), scaled latents at `timesteps`.
            timesteps: (N,) or a scalar, in [0, num_train_timesteps), integer or float.

        Returns:
            U (N,), at least float32, and an `EnergyOutput` for each distinct reading, in their order, its logits at
            the reading's labels.

        Raises:
            ValueError: a shape, label or timestep does not fit a network.
        """
        readings: list[Reading] = []
        for model, labels in self.readings:
            labels = labels if model.config.class_embedding else None  # or it makes no difference
            if _position(readings, model, labels) is None:
                readings.append((model, labels))
        outputs: list[EnergyOutput | None] = [None] * len(readings)
        for first, (model, _) in enumerate(readings):
            if outputs[first] is None:
                own = [i for i, (other, _) in enumerate(readings) if other is model]
                for i, output in zip(
                    own, model.read_at(noisy_latents, timesteps, [readings[i][1] for i in own]), strict=True
                ):
                    outputs[i] = output

        def lookup(model: ModelMixin, labels: torch.Tensor | None) -> EnergyOutput:
            return outputs[_position(readings, model, labels if model.config.class_embedding else None)]

        timesteps = torch.as_tensor(timesteps, device=noisy_latents.device).expand(len(noisy_latents))
        _, sigma = readings[0][0].noise_levels(timesteps)
        return self.value(lookup, sigma), outputs

    def __add__(self, other: "Potential") -> "Potential":
        return Potential(
            [*self.readings, *other.readings], lambda read, sigma: self.value(read, sigma) + other.value(read, sigma)
        )

    def __rmul__(self, factor: float) -> "Potential":
        return Potential(self.readings, lambda read, sigma: factor * self.value(read, sigma))


def _position(readings: Sequence[Reading], model: ModelMixin, labels: torch.Tensor | None) -> int | None:
    """Where a reading stands among others; None where it does not. Labels are compared as objects, not by value."""
    return next((i for i, reading in enumerate(readings) if reading[0] is model and reading[1] is labels), None)


def energy_potential(model: ModelMixin, class_labels: torch.Tensor | None = None) -> Potential:
    """The energy at `class_labels` (N,), or at the null label. 2 units: one forward and one backward pass."""
    return Potential([(model, class_labels)], lambda read, sigma: read(model, class_labels).energy)


def classifier_free_potential(model: ModelMixin, class_labels: torch.Tensor, scale: float) -> Potential:
    """The energy at the null label moved by `scale` towards and past the one at `class_labels` (N,). 4 units."""

    def value(read: Lookup, sigma: torch.Tensor) -> torch.Tensor:
        null = read(model, None).energy
        return null + scale * (read(model, class_labels).energy - null)

    return Potential([(model, class_labels), (model, None)], value)


def classifier_potential(model: ModelMixin, guidance_labels: torch.Tensor, scale: float) -> Potential:
    """-scale sigma_t log p(y | z, t) at the null label, y = `guidance_labels` (N,) int64 in [0, K).

    Added to a potential that reads the null label, or to one of a network without class embedding, it is free.
    """

    def value(read: Lookup, sigma: torch.Tensor) -> torch.Tensor:
        model.check_labels("guidance_labels", guidance_labels, len(sigma), lowest=0)
        log_p_y = F.log_softmax(read(model, None).logits, dim=-1).gather(1, guidance_labels[:, None]).squeeze(1)
        return -scale * sigma * log_p_y

    return Potential([(model, None)], value)


def input_gradient(
    potential: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, list[EnergyOutput]]],
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
) -> tuple[torch.Tensor, list[EnergyOutput]]:
    """epsilon = grad_z U(z, t), and the outputs of the forward pass that it differentiated.

    Args:
        potential: U, such as a `Potential`.
        noisy_latents: (N, C, h, w), scaled latents at `timesteps`; need not require grad.
        timesteps: (N,) or a scalar.

    Returns:
        (N, C, h, w), the dtype of `noisy_latents`, and the potential's outputs. Differentiable by the parameters where
        gradients are on; works under `torch.no_grad()` and `torch.inference_mode()`.
    """
    (epsilon,), outputs = _gradients_by(lambda latents: potential(latents, timesteps), noisy_latents)
    return epsilon, outputs


def input_and_time_gradient(
    potential: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, list[EnergyOutput]]],
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, list[EnergyOutput]]:
    """grad_z U(z, t), dU/dt (N,) and the outputs, of one backward pass: see `input_gradient`.

    dU/dt is taken at fixed z, by the network's timestep, alpha_t and sigma_t together; at an integer it is the slope of
    the interpolated noise schedule above it. `timesteps` are (N,) floats.
    """
    (epsilon, by_time), outputs = _gradients_by(potential, noisy_latents, timesteps)
    return epsilon, by_time, outputs


def _gradients_by(
    function: Callable[..., tuple[torch.Tensor, list[EnergyOutput]]], *inputs: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], list[EnergyOutput]]:
    """Of a function of rows that do not see each other, the gradient by each input, and its outputs."""
    twice, positions = torch.is_grad_enabled(), tuple(range(len(inputs)))

    def total(*inputs: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
        with twice_differentiable(twice):
            values, outputs = function(*inputs)
        # So the gradient of the sum is every row's own gradient.
        return values.sum(), [output.to_tuple() for output in outputs]

    if torch.compiler.is_compiling():  # the one form that compiles
        gradients, outputs = torch.func.grad(total, positions, has_aux=True)(*inputs)
        return gradients, [EnergyOutput(*output) for output in outputs]
    if torch.is_inference_mode_enabled():
        # And the one that takes inference tensors; inside that mode torch 2.11 gives zeros, in silence.
        with torch.inference_mode(False), torch.no_grad():
            gradients, outputs = torch.func.grad(total, positions, has_aux=True)(*inputs)
        return gradients, [EnergyOutput(*output) for output in outputs]
    # Elsewhere autograd: the same gradient, without the graph of the gradient where nobody will ask for it.
    with torch.enable_grad():
        leaves = [x if twice and x.requires_grad else x.detach().requires_grad_() for x in inputs]
        value, outputs = total(*leaves)
        with only_input_gradients():
            gradients = torch.autograd.grad(value, leaves, create_graph=twice)
    if not twice:
        outputs = [tuple(tensor.detach() for tensor in output) for output in outputs]
    return gradients, [EnergyOutput(*output) for output in outputs]


# latent_egc/models/weights.py
"""Loaded weights: all there, none besides, finite, and where CPU kernels want them.

diffusers logs a line where a file lacks a tensor and goes on with whatever is in memory.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.models.model_loading_utils import load_state_dict
from torch import nn


def check_loaded(module: nn.Module, report: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError, naming the tensors, where a file did not hold just what `module` needs; see `check_weights`.

    Args:
        module: what was loaded.
        report: of `from_pretrained(..., output_loading_info=True)`.
    """
    mis_shaped = [f"{name} ({found} for {needed})" for name, found, needed in report["mismatched_keys"]]
    faults = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"], "mis-shaped": mis_shaped}
    _refuse(module, faults)
    check_weights(module)


def check_weights(module: nn.Module) -> None:
    """Raises ValueError, naming the tensors, where weights were never read from a file, or are NaN or infinite."""
    tensors = module.state_dict()
    offloaded = any(hasattr(part, "_hf_hook") for part in module.modules())  # then they lie elsewhere
    missing = [] if offloaded else [name for name, tensor in tensors.items() if tensor.is_meta]
    not_finite = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
    ]
    _refuse(module, {"missing": missing, "NaN or infinite": not_finite})


def check_files(module: ModelMixin) -> None:
    """Raises ValueError, naming them, where the files that a component was loaded from hold tensors that it lacks.

    For components of other classes than this package's, which `DiffusionPipeline.from_pretrained` loads by itself.
    """
    folder = Path(module.config.get("_name_or_path") or "")
    ignored = module._keys_to_ignore_on_load_unexpected or []
    for file in sorted(
        [*folder.glob("diffusion_pytorch_model*.safetensors"), *folder.glob("diffusion_pytorch_model*.bin")]
    ):
        tensors = load_state_dict(file)
        module._fix_state_dict_keys_on_load(tensors)  # names of former versions of diffusers
        unexpected = tensors.keys() - module.state_dict().keys()
        _refuse(module, {"unexpected": [name for name in unexpected if not any(re.search(i, name) for i in ignored)]})


def align_weights(module: nn.Module) -> None:
    """Copies weights that a file was mapped to at odd addresses, where CPU kernels are slower and round differently.

    A loaded pipeline then gives, bit for bit, what the saved one gave.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _refuse(module: nn.Module, faults: Mapping[str, Sequence[str]]) -> None:
    parts = []
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            parts.append(f"{fault}: {', '.join(sorted(names)[:20])}{more}")
    if parts:
        raise ValueError(f"the weights do not fit this {type(module).__name__}; " + "; ".join(parts))


# latent_egc/models/energy.py
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


# latent_egc/models/attention.py
"""Attention that can be differentiated twice, or that is fused: by what the running pass needs, see numerics.py.

Over many tokens the twice differentiable kernel works on one chunk of queries after the other and recomputes the
attention weights in every pass, so that its memory grows linearly with the number of tokens. In the formulas, for the
queries q of a chunk and all keys k and values v, with s = 1 / sqrt(d):

    P = softmax(s q k^T)          o = P v                                                                   forward
    A = do v^T,  m = rowsum(P A),  R = P (A - m)                    dq = s R k,  dk = s R^T q,  dv = P^T do     backward

and for cotangents a, b, c of dq, dk, dv (double backward), with W = s (a k^T + q b^T), n = rowsum(P W), U = P (W - n):

    X = W (A - m) - n A + do c^T,   Y = P (X - rowsum(P X))         (cotangents of P and of the scores)
    q += s (R b + Y k),   k += s (R^T a + Y^T q),   v += U^T do,   do += P c + U v
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


# From this many scores a query row on, the twice differentiable kernel is the chunked one: see `latent-egc benchmark`.
CHUNKED_FROM_TOKENS = 1024
# Queries worked on at once. The chunk's scores are the only thing in memory that is larger than the tokens themselves.
QUERIES_PER_CHUNK = 128


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention, softmax(query key^T / sqrt(d)) value.

    Within `twice_differentiable(True)` it runs a kernel with second derivatives, `chunked_attention` over many tokens
    and `math_attention` over few; elsewhere the kernel that diffusers' `attention_backend` names, by default torch's
    fused one, which has only the first.

    Args:
        query: (N, heads, T, d).
        key, value: (N, heads, S, d).

    Returns:
        (N, heads, T, d).
    """
    if not is_twice_differentiable():
        return dispatch_attention_fn(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    if min(query.shape[-2], key.shape[-2]) >= CHUNKED_FROM_TOKENS:
        return chunked_attention(query, key, value)
    return math_attention(query, key, value)


def math_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`attention` as matrix products and a softmax: derivatives of every order, memory quadratic in the tokens."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (N, heads, T, S)
    return scores.softmax(dim=-1).to(value.dtype) @ value


def chunked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`attention` whose first and second derivatives need memory linear in the tokens (a third: quadratic)."""
    return _Attention.apply(query, key, value)


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors' next queries, (N, heads, T', d) each."""
    return zip(*(tensor.split(QUERIES_PER_CHUNK, dim=-2) for tensor in tensors), strict=True)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right^T, at least float32."""
    return at_least_float32(left @ right.transpose(-2, -1))


def _weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """P of a chunk, at least float32: (N, heads, T', S)."""
    return (_product(query, key) * query.shape[-1] ** -0.5).softmax(dim=-1)


def _row_sum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.sum(dim=-1, keepdim=True)


class _Attention(torch.autograd.Function):
    """(q, k, v) -> o."""

    @staticmethod
    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with without_autocast(query):
            return torch.cat([_weights(q, key).to(value.dtype) @ value for (q,) in _chunks(query)], dim=-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _AttentionBackward.apply(*ctx.saved_tensors, grad_output)


class _AttentionBackward(torch.autograd.Function):
    """(q, k, v, do) -> (dq, dk, dv), itself differentiable."""

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, dtype = query.shape[-1] ** -0.5, query.dtype
        grad_query, grad_key, grad_value = [], 0.0, 0.0
        with without_autocast(query):
            for q, do in _chunks(query, grad_output):
                P, A = _weights(q, key), _product(do, value)
                R = (P * (A - _row_sum(P * A))).to(dtype)
                grad_query.append(scale * (R @ key))
                grad_key = grad_key + scale * at_least_float32(R.transpose(-2, -1) @ q)
                grad_value = grad_value + at_least_float32(P.to(dtype).transpose(-2, -1) @ do)
            return torch.cat(grad_query, dim=-2), grad_key.to(dtype), grad_value.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, grad_output = ctx.saved_tensors
        scale, dtype = query.shape[-1] ** -0.5, query.dtype
        grad_query, grad_key, grad_value, grad_grad_output = [], 0.0, 0.0, []
        with without_autocast(query):
            for q, do, a_chunk in _chunks(query, grad_output, a):
                P, A = _weights(q, key), _product(do, value)
                W = scale * (_product(a_chunk, key) + _product(q, b))
                centred, n = A - _row_sum(P * A), _row_sum(P * W)
                X = W * centred - n * A + _product(do, c)
                U, Y = (P * (W - n)).to(dtype), (P * (X - _row_sum(P * X))).to(dtype)
                P, R = P.to(dtype), (P * centred).to(dtype)
                grad_query.append(scale * (R @ b + Y @ key))
                from_this = scale * (R.transpose(-2, -1) @ a_chunk + Y.transpose(-2, -1) @ q)
                grad_key = grad_key + at_least_float32(from_this)
                grad_value = grad_value + at_least_float32(U.transpose(-2, -1) @ do)
                grad_grad_output.append(P @ c + U @ value)
            return (
                torch.cat(grad_query, dim=-2),
                grad_key.to(dtype),
                grad_value.to(dtype),
                torch.cat(grad_grad_output, dim=-2),
            )


class MultiHeadAttention(nn.Module):
    """Multi-head attention of tokens to a context; without a context, to themselves.

    Args:
        width: channels of the tokens, in and out.
        num_heads: heads; must divide `width`.
        context_width: channels of the context's tokens; None: `width`.
        bias: whether queries, keys and values have biases.
        qk_norm: RMS norm of every head's queries and keys, which bounds the scores (Dehghani et al., 2023).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        context_width: int | None = None,
        *,
        bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        context_width = width if context_width is None else context_width
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.norm_q = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else None
        self.to_out = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """tokens (N, T, width), context (N, S, context_width) or None -> (N, T, width)."""
        context = tokens if context is None else context
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T or S, d)
            for projected in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        if self.norm_q is not None:
            # In the weights' precision also under autocast; the products that follow are in the values'.
            query = self.norm_q(query.to(self.norm_q.weight.dtype)).to(value.dtype)
            key = self.norm_k(key.to(self.norm_k.weight.dtype)).to(value.dtype)
        return self.to_out(attention(query, key, value).transpose(1, 2).flatten(2))


# latent_egc/models/transformer.py
"""EGCTransformer: a diffusion transformer whose output is read as an energy.

Patches of the latents are tokens; every block sees the timestep (and the label, for a model with a class embedding)
through adaptive layer norms that start as the identity, as in DiT (Peebles and Xie, ICCV 2023, arXiv 2212.09748).
Optional are QK-norm (Dehghani et al., ICML 2023, arXiv 2302.05442) and long skips from the first half of the blocks to
the second (U-ViT, Bao et al., CVPR 2023, arXiv 2209.12152). Embeddings and feed-forward layers are diffusers'.
"""

import torch
from diffusers import ModelMixin  # noqa: F401  (diffusers' remote loading looks for this name)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from torch import nn


TIME_FREQUENCIES = 256  # channels of the sinusoidal timestep embedding, DiT's number


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, each shifted, scaled and gated by the conditioning.

    Args:
        width: channels of the tokens.
        num_heads: attention heads; must divide `width`.
        qk_norm: see `MultiHeadAttention`.
        skip: whether an earlier block's output is joined in at the entry.
    """

    def __init__(self, width: int, num_heads: int, qk_norm: bool, skip: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if skip else None
        # The two eps are those of diffusers' DiT, whose weights can be loaded here.
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = MultiHeadAttention(width, num_heads, bias=True, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)
        self.ff = FeedForward(width, activation_fn="gelu-approximate")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, hidden: torch.Tensor, conditioning: torch.Tensor, skipped: torch.Tensor | None) -> torch.Tensor:
        """hidden (N, T, D), conditioning (N, D), skipped (N, T, D) or None -> (N, T, D)."""
        if self.skip is not None:
            hidden = self.skip(torch.cat([hidden, skipped], dim=-1))  # (N, T, D)
        modulation = self.modulation(conditioning)[:, None]  # (N, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (N, 1, D) each
        hidden = hidden + gate1 * self.attn(self.norm1(hidden) * (1 + scale1) + shift1)  # (N, T, D)
        return hidden + gate2 * self.ff(self.norm2(hidden) * (1 + scale2) + shift2)  # (N, T, D)


class EGCTransformer(EnergyModel):
    """A transformer energy network over latents (or pixels): energy, class logits and, by its input gradient, noise.

    Args:
        sample_size: height and width of the latents it is made for; others work where `patch_size` divides them (the
            positions are then interpolated).
        in_channels: C, channels of the latents.
        num_classes: K; None for unlabelled data.
        head, energy_channels, energy_pooling, gaussian_part: as in `EGCUNet`.
        class_embedding: whether the energy can see a label, added to the timestep's embedding.
        num_train_timesteps, beta_start, beta_end, beta_schedule: the noise schedule, in diffusers' terms.
        patch_size: height and width of a token's patch.
        width: D, channels of the tokens.
        num_layers: blocks.
        num_attention_heads: heads of every block.
        qk_norm: RMS norm of queries and keys, for stability.
        long_skips: joins the output of each block of the first half into its counterpart of the second.

    Raises:
        ValueError: fields that contradict each other, by name.

    Source: EGC (ICCV 2023); DiT (ICCV 2023, arXiv 2212.09748).
    """

    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        num_classes: int | None = 1000,
        head: str = "map",
        energy_channels: int | None = None,
        energy_pooling: str = "logsumexp",
        gaussian_part: bool = True,
        class_embedding: bool = False,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        patch_size: int = 2,
        width: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        qk_norm: bool = True,
        long_skips: bool = False,
    ) -> None:
        super().__init__()
        energy_channels = self.check_energy_config()
        self._check_transformer_config()

        self.patch_embedding = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width)
        self.time_frequencies = Timesteps(TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(TIME_FREQUENCIES, width)
        if class_embedding:
            self.label_embedding = nn.Embedding(num_classes + 1, width)  # the last row is the null label
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_attention_heads, qk_norm, skip=long_skips and layer >= (num_layers + 1) // 2)
            for layer in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        out_channels = energy_channels if head == "map" else in_channels
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        if head == "inner" and num_classes is not None:
            self.class_out = nn.Linear(width, num_classes)
        self._init_weights()

    def _check_transformer_config(self) -> None:
        c = self.config
        for name in ("sample_size", "in_channels", "patch_size", "width", "num_layers", "num_attention_heads"):
            if c[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {c[name]}")
        if c.width % c.num_attention_heads:
            raise ValueError(f"num_attention_heads={c.num_attention_heads} must divide width, got width={c.width}")
        if c.width % 4:
            raise ValueError(f"width must be divisible by 4 (sines and cosines of two coordinates), got {c.width}")
        if c.sample_size % c.patch_size:
            raise ValueError(f"sample_size must be divisible by patch_size={c.patch_size}, got {c.sample_size}")

    @property
    def size_divisor(self) -> int:
        """What the height and width of the latents must be divisible by."""
        return self.config.patch_size

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer too, once a patch is seen as one vector.
        nn.init.xavier_uniform_(self.patch_embedding.proj.weight.view(self.config.width, -1))
        nn.init.zeros_(self.patch_embedding.proj.bias)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        if self.config.class_embedding:
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        for block in self.blocks:
            # Every gate starts at zero, so that a block starts as the identity.
            nn.init.zeros_(block.modulation.weight)
            if block.skip is not None:  # ... and a skip starts shut
                with torch.no_grad():
                    block.skip.weight.copy_(torch.eye(*block.skip.weight.shape))
        nn.init.zeros_(self.modulation_out.weight)
        # A flat energy at the start, see EGCUNet.
        if self.config.num_classes is None and self.config.head == "map":
            nn.init.normal_(self.proj_out.weight, std=1e-3)
        else:
            nn.init.zeros_(self.proj_out.weight)
        if hasattr(self, "class_out"):
            nn.init.zeros_(self.class_out.weight)

    def network(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `EnergyModel.network`."""
        hidden, conditioning = self._trunk(noisy_latents, timesteps, embedded_labels)  # (N, T, D), (N, D)
        # The output layers run in the weights' precision also under autocast: energies are sums over all positions.
        with without_autocast(hidden):
            dtype = self.proj_out.weight.dtype
            shift, scale = self.modulation_out(conditioning.to(dtype))[:, None].chunk(2, dim=-1)  # (N, 1, D) each
            hidden = self.norm_out(hidden.to(dtype)) * (1 + scale) + shift  # (N, T, D)
            output = self._unpatchify(self.proj_out(hidden), noisy_latents.shape[-2:])  # (N, E or C, h, w)
            logits = self.class_out(hidden.mean(dim=1)) if hasattr(self, "class_out") else None  # (N, K)
        return output, logits

    def _trunk(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, T, D) before the output layers, T = h w / patch_size^2, and the conditioning (N, D)."""
        conditioning = self.time_embedding(self.time_frequencies(timesteps).to(self.dtype))  # (N, D)
        if embedded_labels is not None:
            rows = torch.where(embedded_labels < 0, self.config.num_classes, embedded_labels)  # the last row is null
            conditioning = conditioning + self.label_embedding(rows)  # (N, D)
        conditioning = nn.functional.silu(conditioning)

        hidden = self.patch_embedding(noisy_latents.to(self.dtype))  # (N, T, D)
        skips: list[torch.Tensor] = []
        for layer, block in enumerate(self.blocks):
            skipped = skips.pop() if block.skip is not None else None
            hidden = self.run_block(block, hidden, conditioning, skipped)  # (N, T, D)
            if layer < len(self.blocks) // 2:
                skips.append(hidden)
        return hidden, conditioning

    def _unpatchify(self, tokens: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """(N, T, p * p * E) -> (N, E, h, w)."""
        patch_size, (height, width) = self.config.patch_size, size
        grid = tokens.unflatten(1, (height // patch_size, width // patch_size))
        grid = grid.unflatten(3, (patch_size, patch_size, -1))  # (N, h', w', p, p, E)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height, width)


# latent_egc/models/feature_maps.py
"""A network's blocks by name, and their outputs as maps: what is probed, and what a head on frozen features reads.

Blocks are called "in", then "down.LEVEL.LAYER", "mid.LAYER" and "up.LEVEL.LAYER" (LEVEL 0 is the finest), or
"block.LAYER".
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn



def named_blocks(network: EnergyModel) -> dict[str, nn.Module]:
    """An energy network's blocks in the order of the forward pass: name -> the module whose output is the block's."""
    if isinstance(network, EGCTransformer):
        return numbered_blocks(network.patch_embedding, network.blocks)
    return levelled_blocks(network.conv_in, network.down_blocks, network.mid_blocks, network.up_blocks)


def numbered_blocks(first: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """As `named_blocks`, of a transformer's parts."""
    return {"in": first} | {f"block.{i}": block for i, block in enumerate(blocks)}


def levelled_blocks(
    first: nn.Module,
    down: Sequence[Iterable[nn.Module]],
    mid: Iterable[nn.Module],
    up: Sequence[Iterable[nn.Module]],
) -> dict[str, nn.Module]:
    """As `named_blocks`, of a U-Net's parts: `down` begins with the finest level, `up` ends with it."""
    blocks = {"in": first}
    blocks |= {f"down.{level}.{i}": block for level, layers in enumerate(down) for i, block in enumerate(layers)}
    blocks |= {f"mid.{i}": block for i, block in enumerate(mid)}
    finest_last = zip(reversed(range(len(up))), up, strict=True)
    return blocks | {f"up.{level}.{i}": block for level, layers in finest_last for i, block in enumerate(layers)}


def as_map(output: torch.Tensor) -> torch.Tensor:
    """A block's output as a map (N, D, h, w); tokens (N, T, D) are those of a square, row by row."""
    if output.ndim == 4:
        return output
    return output.transpose(1, 2).unflatten(2, (int(output.shape[1] ** 0.5), -1))


def block_map(
    network: EnergyModel, block: str, noisy_latents: torch.Tensor, timestep: int | torch.Tensor
) -> tuple[torch.Tensor, EnergyOutput]:
    """What a block says of noisy latents, without a label, and what the network says, in one pass.

    Args:
        network: of which `block` is the name of a block, see `named_blocks`.
        block: its name.
        noisy_latents: (N, C, h, w), scaled latents at `timestep`.
        timestep: in [0, T), a scalar or (N,).

    Returns:
        The block's map (N, D, h', w'), differentiable, and what the network says.
    """
    maps = []
    hook = named_blocks(network)[block].register_forward_hook(lambda module, inputs, output: maps.append(output))
    try:
        output = network(noisy_latents, timestep)
    finally:
        hook.remove()
    return as_map(maps[0]), output


# latent_egc/models/unet.py
"""EGCUNet: a diffusion U-Net whose output is read as an energy.

The layout is the latent-diffusion U-Net's, which the published EGC uses: ResNet blocks that see the timestep, a spatial
transformer behind each of them at the attended levels and in the middle, and, for a model with a class embedding, one
class token that the transformers attend to. ResNet blocks, resampling and feed-forward layers are diffusers'.
"""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin  # noqa: F401  (diffusers' remote loading looks for this name)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn



class SpatialTransformer(nn.Module):
    """One transformer block over a map's positions: self-attention, attention to the class token, feed-forward.

    Args:
        channels: of the map, in and out.
        width: inside the block; divisible by `num_heads`, independent of `channels`.
        num_heads: attention heads.
        context_width: channels of the class token; None: no attention to one.
        norm_num_groups: of the group norm at the entry.
    """

    def __init__(
        self, channels: int, width: int, num_heads: int, context_width: int | None, norm_num_groups: int
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, width, kernel_size=1)
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = MultiHeadAttention(width, num_heads)
        if context_width is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = MultiHeadAttention(width, num_heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, activation_fn="geglu")
        self.proj_out = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, hidden: torch.Tensor, class_token: torch.Tensor | None) -> torch.Tensor:
        """hidden (N, channels, h, w), class_token (N, 1, context_width) or None -> (N, channels, h, w)."""
        projected = self.proj_in(self.norm(hidden))  # (N, width, h, w)
        tokens = projected.flatten(2).transpose(1, 2)  # (N, h*w, width)
        tokens = tokens + self.attn1(self.norm1(tokens))
        if class_token is not None:
            tokens = tokens + self.attn2(self.norm2(tokens), class_token)
        tokens = tokens + self.ff(self.norm3(tokens))
        return hidden + self.proj_out(tokens.transpose(1, 2).unflatten(2, hidden.shape[-2:]))  # (N, channels, h, w)


class UNetBlock(nn.Module):
    """A ResNet block and, at an attended level, a spatial transformer."""

    def __init__(self, resnet: ResnetBlock2D, attention: SpatialTransformer | None) -> None:
        super().__init__()
        self.resnet = resnet
        self.attention = attention

    def forward(
        self, hidden: torch.Tensor, time_embedding: torch.Tensor, class_token: torch.Tensor | None
    ) -> torch.Tensor:
        """hidden (N, D_in, h, w), time_embedding (N, D_time) -> (N, D_out, h, w)."""
        hidden = self.resnet(hidden, time_embedding)  # (N, D_out, h, w)
        return hidden if self.attention is None else self.attention(hidden, class_token)


class EGCUNet(EnergyModel):
    """A U-Net energy network over latents (or pixels): energy, class logits and, by its input gradient, noise.

    Args:
        sample_size: height and width of the latents it is made for; others work where `size_divisor` divides them.
        in_channels: C, channels of the latents.
        num_classes: K; None for unlabelled data.
        head: "map" (energy is minus the sum over positions of the logsumexp over an output map's channels, logits are
            the map's attention pool) or "inner" (energy is <z, h(z)> / 2 - sigma_t logsumexp(logits)).
        energy_channels: E, channels of the map head's output; None: `num_classes`. Must be set without classes.
        energy_pooling: "logsumexp" over the map's channels, or inner's logits; or "logmeanexp", less the logarithm of
            their number, with which a fresh network's energies of all noise levels are one density's.
        gaussian_part: adds sigma_t |z|^2 / 2 and weighs the network's share by alpha_t, so that the network's gradient
            learns v (eps = sigma_t z + alpha_t v).
        class_embedding: whether the energy can see a label, as a class token that the transformers attend to.
        num_train_timesteps, beta_start, beta_end, beta_schedule: the noise schedule, in diffusers' terms.
        block_out_channels: width of each level, finest first.
        layers_per_block: ResNet blocks a level on the way down (one more on the way up).
        attention_levels: levels with spatial transformers, 0 is the finest; the middle always has one. None: the two
            deepest, but not the finest, whose many positions cost more time and memory than all other levels.
        num_attention_heads: heads of every transformer.
        attention_head_dim: width of a head, the same at every level; None: the level's width / num_attention_heads.
        class_embedding_dim: width of the class token; None: the timestep embedding's, 4 * block_out_channels[0].
        norm_num_groups: groups of the group norms; must divide every width.

    Raises:
        ValueError: fields that contradict each other, by name.

    Source: EGC (ICCV 2023); latent-diffusion U-Net of Rombach et al. (CVPR 2022, arXiv 2112.10752).
    """

    _no_split_modules = ["UNetBlock"]
    _repeated_blocks = ["UNetBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        num_classes: int | None = 1000,
        head: str = "map",
        energy_channels: int | None = None,
        energy_pooling: str = "logsumexp",
        gaussian_part: bool = True,
        class_embedding: bool = False,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        block_out_channels: tuple[int, ...] = (128, 256, 512),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] | None = None,
        num_attention_heads: int = 4,
        attention_head_dim: int | None = None,
        class_embedding_dim: int | None = None,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        energy_channels = self.check_energy_config()
        attention_levels = self._check_unet_config()
        time_width = 4 * block_out_channels[0]
        context_width = (class_embedding_dim or time_width) if class_embedding else None

        def make_block(channels_in: int, channels_out: int, attended: bool) -> UNetBlock:
            resnet = ResnetBlock2D(
                in_channels=channels_in,
                out_channels=channels_out,
                temb_channels=time_width,
                groups=norm_num_groups,
                eps=1e-5,
            )
            if not attended:
                return UNetBlock(resnet, None)
            head_width = attention_head_dim or channels_out // num_attention_heads
            width = head_width * num_attention_heads
            transformer = SpatialTransformer(channels_out, width, num_attention_heads, context_width, norm_num_groups)
            return UNetBlock(resnet, transformer)

        self.time_frequencies = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], time_width)
        if class_embedding:
            self.class_tokens = nn.Embedding(num_classes + 1, context_width)  # the last row is the null label

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        channels, skip_channels = block_out_channels[0], [block_out_channels[0]]
        for level, width in enumerate(block_out_channels):
            blocks = nn.ModuleList()
            for _ in range(layers_per_block):
                blocks.append(make_block(channels, width, level in attention_levels))
                channels = width
                skip_channels.append(channels)
            self.down_blocks.append(blocks)
            if level < len(block_out_channels) - 1:
                # The name leaves diffusers' historical alias Conv2d_0 out of the checkpoint.
                self.downsamplers.append(Downsample2D(channels, use_conv=True, name="op"))
                skip_channels.append(channels)

        self.mid_blocks = nn.ModuleList([make_block(channels, channels, True), make_block(channels, channels, False)])

        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(block_out_channels))):
            blocks = nn.ModuleList()
            for _ in range(layers_per_block + 1):
                blocks.append(make_block(channels + skip_channels.pop(), width, level in attention_levels))
                channels = width
            self.up_blocks.append(blocks)
            if level > 0:
                self.upsamplers.append(Upsample2D(channels, use_conv=True))

        self.norm_out = nn.GroupNorm(norm_num_groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, energy_channels or in_channels, kernel_size=3, padding=1)
        if head == "inner" and num_classes is not None:
            self.class_out = nn.Linear(channels, num_classes)
        self._init_weights()

    def _check_unet_config(self) -> Sequence[int]:
        """Raises ValueError as the constructor; returns the attended levels."""
        c = self.config
        num_levels = len(c.block_out_channels)
        counts = ("sample_size", "in_channels", "layers_per_block", "num_attention_heads", "norm_num_groups")
        for name in counts:
            if c[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {c[name]}")
        if num_levels < 1 or min(c.block_out_channels) < 1:
            raise ValueError(f"block_out_channels must hold positive widths, got {c.block_out_channels}")
        for width in c.block_out_channels:
            if width % c.norm_num_groups:
                raise ValueError(f"norm_num_groups={c.norm_num_groups} must divide every width, got {width}")
            if c.attention_head_dim is None and width % c.num_attention_heads:
                raise ValueError(f"num_attention_heads={c.num_attention_heads} must divide every width, got {width}")
        attended = range(max(1, num_levels - 2), num_levels) if c.attention_levels is None else c.attention_levels
        for level in attended:
            if not 0 <= level < num_levels:
                raise ValueError(f"attention_levels must be in [0, {num_levels}), got {level}")
        if c.sample_size % self.size_divisor:
            raise ValueError(f"sample_size must be divisible by {self.size_divisor}, got {c.sample_size}")
        return attended

    @property
    def size_divisor(self) -> int:
        """What the height and width of the latents must be divisible by."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def _init_weights(self) -> None:
        for module in self.modules():
            # Every residual branch starts at zero, so that the network starts as its skip connections.
            if isinstance(module, ResnetBlock2D):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
            elif isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        # A flat energy at the start: epsilon is then 0, or the Gaussian part's sigma_t z. Without classes nothing but
        # the initial values could tell the map's channels apart (a logsumexp treats them alike), so these are tiny.
        if self.config.num_classes is None and self.config.head == "map":
            nn.init.normal_(self.conv_out.weight, std=1e-3)
        else:
            nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        if hasattr(self, "class_out"):
            nn.init.zeros_(self.class_out.weight)
            nn.init.zeros_(self.class_out.bias)

    def network(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `EnergyModel.network`."""
        hidden = self._trunk(noisy_latents, timesteps, embedded_labels)  # (N, D_0, h, w)
        # The output layers run in the weights' precision also under autocast: energies are sums over all positions.
        with without_autocast(hidden):
            hidden = nn.functional.silu(self.norm_out(hidden.to(self.norm_out.weight.dtype)))
            output = self.conv_out(hidden)  # (N, E or C, h, w)
            logits = self.class_out(hidden.mean(dim=(2, 3))) if hasattr(self, "class_out") else None  # (N, K)
        return output, logits

    def _trunk(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The network up to its output layers; D_l is the width of level l, of size h / 2^l."""
        time_embedding = self.time_embedding(self.time_frequencies(timesteps).to(self.dtype))  # (N, 4 D_0)
        class_token = None
        if embedded_labels is not None:
            rows = torch.where(embedded_labels < 0, self.config.num_classes, embedded_labels)  # the last row is null
            class_token = self.class_tokens(rows)[:, None]  # (N, 1, D_class)

        hidden = self.conv_in(noisy_latents.to(self.dtype))  # (N, D_0, h, w)
        skips = [hidden]
        for level, blocks in enumerate(self.down_blocks):
            for block in blocks:
                hidden = self.run_block(block, hidden, time_embedding, class_token)  # (N, D_l, h_l, w_l)
                skips.append(hidden)
            if level < len(self.downsamplers):
                hidden = self.downsamplers[level](hidden)  # (N, D_l, h_l / 2, w_l / 2)
                skips.append(hidden)
        for block in self.mid_blocks:
            hidden = self.run_block(block, hidden, time_embedding, class_token)  # (N, D_L, h_L, w_L)
        for step, blocks in enumerate(self.up_blocks):
            for block in blocks:
                hidden = torch.cat([hidden, skips.pop()], dim=1)  # (N, D_(l+1) or D_l, and the skip's, h_l, w_l)
                hidden = self.run_block(block, hidden, time_embedding, class_token)  # (N, D_l, h_l, w_l)
            if step < len(self.upsamplers):
                hidden = self.upsamplers[step](hidden)  # (N, D_l, 2 h_l, 2 w_l)
        return hidden  # (N, D_0, h, w)


# latent_egc/pipelines/code_files.py
"""The code beside a pipeline's weights, with which a folder loads where latent_egc is not installed."""

import inspect
import json
import re
import sys
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path


def add_code_files(folder: Path, pipeline_class: type, network_class: type) -> None:
    """Puts the code files beside the weights and names them in model_index.json as diffusers wants it.

    The folders of this machine that parts were loaded from are left out.

    Does nothing for a class of somebody else's: that is loaded where it can be imported.

    Args:
        folder: with a model_index.json.
        pipeline_class: of this package, or of a repository's own code that diffusers has loaded.
        network_class: likewise.
    """
    places = {pipeline_class: folder, network_class: folder / "energy_model"}
    if not all(kind.__module__.split(".")[0] in ("latent_egc", "diffusers_modules") for kind in places):
        return
    for kind, place in places.items():
        place.mkdir(exist_ok=True)
        (place / f"{_stem(kind)}.py").write_text(code_file(kind.__module__))
    index_file = folder / "model_index.json"
    for file in (index_file, *folder.glob("*/config.json")):
        config = json.loads(file.read_text())
        if Path(config.get("_name_or_path") or "").is_absolute():  # where it was loaded from is no stranger's business
            del config["_name_or_path"]
        if file == index_file:
            config["_class_name"] = [_stem(pipeline_class), pipeline_class.__name__]
            config["energy_model"] = [_stem(network_class), network_class.__name__]
        file.write_text(json.dumps(config, indent=2) + "\n")


def _stem(kind: type) -> str:
    return kind.__module__.rpartition(".")[2]


def code_file(module: str) -> str:
    """The text of a module's code file; a repository's own, which is one already, travels on as it is."""
    if module.split(".")[0] == "latent_egc":
        return bundle(module)
    return Path(sys.modules[module].__file__).read_text()


def bundle(module: str, included: set[str] | None = None) -> str:
    """A module's source, behind that of the modules of this package that it imports, each once, in order of need.

    One file, because diffusers downloads none but the one that model_index.json names. A test keeps such imports to
    two forms, of names from `.x` and of names from `latent_egc.ROOM.x`, one line each.

    Args:
        module: its dotted name.
        included: modules that are there already; those that are added here join them.
    """
    included = set() if included is None else included
    included.add(module)
    own, bundled = [], ""
    for line in inspect.getsource(import_module(module)).splitlines(keepends=True):
        imported = re.match(r"from (\.\w+|latent_egc\.[\w.]+) import ", line)
        if imported is None:
            own.append(line)
        elif (name := resolve_name(imported[1], module.rpartition(".")[0])) not in included:
            bundled += bundle(name, included)
    return bundled + f"# {module.replace('.', '/')}.py\n" + "".join(own) + "\n\n"


# latent_egc/pipelines/images.py
"""Images to pixel values."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import load_image

EXIF_ORIENTATION = 0x0112
# Of the part of an image that is resized.
MAX_ASPECT_RATIO = 4


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
    return 2 * crop_images(images, size) - 1


def crop_images(images: PipelineImageInput, size: int) -> torch.Tensor:
    """As `preprocess_images`, in [0, 1]; 8-bit images of this size are their bytes over 255."""
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError("images must hold at least one image, got none")
    return torch.cat([_crop_one(image, size) for image in images])


def crop_masks(masks: Any, images: PipelineImageInput, size: int) -> torch.Tensor:
    """Masks as large as their images -> what of the cropped images they mark.

    Args:
        masks: one for all images or one each: a PIL image (any mode), an array or tensor (H, W), (1, H, W) or
            (N, 1, H, W) in [0, 1], uint8 or bool; or a list of them. From one half on, white, a pixel is marked.
        images: as for `preprocess_images`.
        size: height and width of the result.

    Returns:
        (N, 1, size, size) bool, on the CPU.

    Raises:
        ValueError: a mask of another size than its image, or neither one mask nor one each.
    """
    images = single_images(images)
    masks = [_as_channels_first(mask) for mask in single_images(masks)]
    if len(masks) not in (1, len(images)):
        raise ValueError(f"mask_image must be one or one for each of {len(images)} images, got {len(masks)}")
    masks = masks * len(images) if len(masks) == 1 else masks
    for mask, image in zip(masks, images, strict=True):
        found, wanted = tuple(mask.shape[-2:]), _height_and_width(image)
        if found != wanted:
            raise ValueError(f"mask_image must be as large as its image, {wanted} (height, width), got {found}")
    return crop_images([mask.expand(3, -1, -1) for mask in masks], size)[:, :1] >= 0.5


def single_images(images: Any) -> list[Any]:
    """What may be one image, a batch, or a list of either, as a list of single images. Raises ValueError on none."""
    given = images if isinstance(images, (list, tuple)) else [images]
    one_by_one = [image for entry in given for image in (entry if getattr(entry, "ndim", 3) == 4 else [entry])]
    if not one_by_one:
        raise ValueError("images must hold at least one image, got none")
    return one_by_one


def _as_channels_first(mask: Any) -> torch.Tensor:
    """A mask as (1, H, W) on the CPU, uint8 or float."""
    if hasattr(mask, "convert"):
        mask = VaeImageProcessor.pil_to_numpy(load_rgb(mask).convert("L"))[0]
    mask = torch.as_tensor(mask).cpu()
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or mask.shape[0] != 1:
        raise ValueError(f"mask_image must be (H, W) or (1, H, W), got shape {tuple(mask.shape)}")
    return mask.float() if mask.dtype == torch.bool else mask


def _height_and_width(image: Any) -> tuple[int, int]:
    """Of one image, upright."""
    if hasattr(image, "convert"):
        return load_rgb(image).size[::-1]
    height, width = image.shape[-2:] if torch.is_tensor(image) else image.shape[:2]
    return height, width


def load_rgb(image: Any) -> Any:
    """A PIL image of any mode as an upright RGB image: EXIF orientation applied, 16-bit grey and floats as 8 bits.

    One that is RGB and upright is returned itself, since a copy of a large one takes half a gigabyte.

    Raises:
        ValueError: a float image whose values are neither in [0, 1] nor in [0, 255].
    """
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert would clip to white
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode == "F":  # Pillow's convert takes them as 0 to 255, which makes those in [0, 1] black
        lowest, highest = image.getextrema()
        if not 0 <= lowest <= highest <= 255:
            raise ValueError(f"a float image must be in [0, 1] or [0, 255], got {lowest:g} to {highest:g}")
        if highest <= 1:
            image = image.point(lambda value: value * 255 + 0.5)
        image = image.convert("L")
    if image.getexif().get(EXIF_ORIENTATION, 1) == 1:
        return image if image.mode == "RGB" else image.convert("RGB")
    return load_image(image)


def central_crop(image: Any, size: int) -> Any:
    """A PIL image of any mode and size -> (size, size) RGB: shorter side resized, centre cropped.

    Raises ValueError as `load_rgb`.
    """
    image = load_rgb(image)
    box = _central_box(*image.size)
    image = image if box == (0, 0, *image.size) else image.crop(box)
    return VaeImageProcessor(resample="lanczos").resize(image, size, size, resize_mode="crop")


def _central_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is resized: all, or the middle of an image that is very long, whose other parts
    would be enlarged (a 1 x 60000 image to gigabytes) and cut off.
    """
    longest = MAX_ASPECT_RATIO * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return left, top, min(width, left + longest), min(height, top + longest)


def _crop_one(image: Any, size: int) -> torch.Tensor:
    if hasattr(image, "convert"):  # a PIL image
        processor = VaeImageProcessor()
        return processor.numpy_to_pt(processor.pil_to_numpy(central_crop(image, size)))
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
    left, top, right, bottom = _central_box(batch.shape[-1], batch.shape[-2])
    batch = batch[..., top:bottom, left:right]
    height, width = batch.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        resized = (max(size, round(height * scale)), max(size, round(width * scale)))
        batch = F.interpolate(batch, resized, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
        batch = batch[..., top : top + size, left : left + size]
    return batch


# latent_egc/pipelines/latents.py
"""An autoencoder's latents: their channels, size and scale, which each kind of autoencoder says in words of its own."""

import torch
from diffusers import ModelMixin


def latent_channels(vae: ModelMixin | None) -> int:
    """C of the latents; the 3 of pixels without an autoencoder."""
    return 3 if vae is None else vae.config.get("latent_channels") or vae.config.z_dim


def vae_scale_factor(vae: ModelMixin | None) -> int:
    """Pixels per latent, in height and width; 1 in pixel space."""
    if vae is None:
        return 1
    ratio = getattr(vae, "spatial_compression_ratio", None)  # AutoencoderDC, Qwen's, Wan's, ...
    return 2 ** (len(vae.config.block_out_channels) - 1) if ratio is None else int(ratio)


def latent_moments(vae: ModelMixin, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images to unscaled moments, mean and log variance of the posterior, or to plain latents where there is none.

    Args:
        vae: the autoencoder.
        pixel_values: (N, 3, H, W) in [-1, 1].

    Returns:
        (N, 2C, h, w), or (N, C, h, w) without a posterior, at least float32. Differentiable.
    """
    encoded = vae.encode(_as_frames(vae, pixel_values.to(vae.dtype)))[0]
    moments = _as_images(vae, getattr(encoded, "parameters", encoded))  # a distribution has them
    return moments.to(torch.promote_types(moments.dtype, torch.float32))


def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (N, C, h, w) to images (N, 3, H, W), about in [-1, 1]. Differentiable."""
    latents = _as_frames(vae, unscale_latents(vae, latents).to(vae.dtype))
    return _as_images(vae, vae.decode(latents).sample)


def scale_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents (N, C, h, w) -> about unit variance, by its own numbers or those of its channels.

    Source: diffusers' pipelines, (z - shift_factor) scaling_factor, or (z - latents_mean) scaling_factor / latents_std.
    """
    shift, scale = _shift_and_scale(vae, latents)
    return (latents - shift) * scale


def unscale_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale_latents`."""
    shift, scale = _shift_and_scale(vae, latents)
    return latents / scale + shift


def _shift_and_scale(vae: ModelMixin, latents: torch.Tensor) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """A number, or (1, C, 1, 1) for an autoencoder that scales by channel, each."""
    config = vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None:
        shift = latents.new_tensor(config.latents_mean)[None, :, None, None]
    if config.get("latents_std") is not None:
        scale = scale / latents.new_tensor(config.latents_std)[None, :, None, None]
    return shift, scale


def _takes_frames(vae: ModelMixin) -> bool:
    """Whether it is a video autoencoder, as Qwen's and Wan's, for which an image is a video of one frame."""
    return vae.config.get("temperal_downsample") is not None


def _as_frames(vae: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    return images[:, :, None] if _takes_frames(vae) else images


def _as_images(vae: ModelMixin, frames: torch.Tensor) -> torch.Tensor:
    return frames[:, :, 0] if _takes_frames(vae) else frames


# latent_egc/pipelines/named_autoencoder.py
"""An autoencoder by where it lies, a folder or a Hub id; a pipeline may name it so, in place of holding its weights.

It is of one of diffusers' own classes, so that no code from there is run.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin



def read_autoencoder(source: str, subfolder: str | None = None, **options: Any) -> ModelMixin:
    """Any of diffusers' autoencoders that `latents.py` can scale, in eval mode.

    Args:
        source: a folder or a Hub id.
        subfolder: where in it.
        **options: of `ModelMixin.from_pretrained`.

    Raises:
        ValueError: another network, an autoencoder that is not supported, or weights that do not fit it, by name. What
            diffusers raises where nothing can be read is as various as what may be wrong.
    """
    hub = {name: value for name, value in options.items() if name != "use_safetensors"}
    class_name = AutoencoderKL.load_config(source, subfolder=subfolder, **hub).get("_class_name")
    kind = getattr(diffusers, class_name or "", None)
    if not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise ValueError(f"it is a {class_name}, not an autoencoder")
    vae, report = kind.from_pretrained(source, subfolder=subfolder, output_loading_info=True, **options)
    check_loaded(vae, report)
    for needed in (("latent_channels", "z_dim"), ("scaling_factor", "latents_std")):
        if all(vae.config.get(field) is None for field in needed):
            raise ValueError(f"{class_name} has neither {' nor '.join(needed)}, it is not supported")
    return vae


def named_autoencoder(name: str, **hub_options: Any) -> ModelMixin:
    """The autoencoder that a pipeline names, in float32, from safetensors alone.

    Args:
        name: a folder or a Hub id, of the autoencoder by itself or of a pipeline, whose `vae` is meant.
        **hub_options: how files are found on the Hub, such as `cache_dir` and `token`.

    Raises:
        ValueError: it cannot be loaded; says what to do.
    """
    folder = Path(name).expanduser()
    source, subfolder = str(folder) if folder.is_dir() else name, None
    try:
        if not folder.is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            raise ValueError("there is no such folder")  # and it is no Hub id
        with suppress(OSError):  # else it is no pipeline
            DiffusionPipeline.load_config(source, **hub_options)
            subfolder = "vae"
        return read_autoencoder(source, subfolder, use_safetensors=True, **hub_options)
    except Exception as error:  # diffusers has no common error for what cannot be reached or is damaged
        raise ValueError(
            f"autoencoder={name!r} cannot be loaded: {error}; say where it is by "
            "autoencoder=..., or give the pipeline the autoencoder itself by vae=..."
        ) from error


# latent_egc/exchange/image_classification.py
"""An exported folder as transformers sees it: an image classifier, and a backbone that gives features.

The weights are the pipeline's own, read from its component folders: the energy network's and, of the autoencoder's,
those of its encoder. This file travels to the Hub beside them, so it imports torch, diffusers, transformers and the
standard library only; where latent_egc is installed, importing it registers its classes with transformers' Auto
classes, and no code from a folder is run.
"""

import json
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.models.embeddings import PatchEmbed
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BatchFeature,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, cached_file


CODE_FILE = "image_classification.py"
AUTO_MAP = {
    "AutoConfig": "image_classification.EGCConfig",
    "AutoModel": "image_classification.EGCModel",
    "AutoModelForImageClassification": "image_classification.EGCForImageClassification",
    "AutoImageProcessor": "image_classification.EGCImageProcessor",
}
LINEAR_FILE = "linear.safetensors"  # of a folder with component folders, its linear head's weights
COMPONENT_WEIGHTS = "diffusion_pytorch_model.safetensors"
DECODER_PARTS = ("decoder", "post_quant_conv")
# What says where on the Hub, and how, files are found.
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


class EGCConfig(PretrainedConfig):
    """What an energy network is as an image classifier.

    Args:
        energy_model: the energy network's configuration, as diffusers saves it.
        vae: likewise the autoencoder's; None in pixel space.
        classifier: "energy" reads the energy network's own logits at clean latents and timestep 0; "linear" is a linear
            layer on the pooled features below.
        block: whose features are read, see `models/feature_maps.py`; None: the last one's.
        timestep: to which the latents are noised for it, in [0, T).
        pooling: p, its map is averaged to p x p.
        noise_seed: of the one draw of noise, the same for every image.
        weights_in_components: whether the folder's weights are those in its component folders, not model.safetensors.
        autoencoder: Hub id or folder of the autoencoder's weights, where the component folders have none.
        **options: transformers' own, such as `id2label`.
    """

    model_type = "egc"
    keys_to_ignore_at_inference = ["energy"]  # a Trainer's predictions are the logits

    def __init__(
        self,
        energy_model: Mapping[str, Any] | None = None,
        vae: Mapping[str, Any] | None = None,
        classifier: str = "energy",
        block: str | None = None,
        timestep: int = 0,
        pooling: int = 1,
        noise_seed: int = 0,
        weights_in_components: bool = False,
        autoencoder: str | None = None,
        **options: Any,
    ) -> None:
        self.energy_model, self.vae = dict(energy_model or {}), None if vae is None else dict(vae)
        self.classifier, self.block, self.timestep, self.pooling = classifier, block, timestep, pooling
        self.noise_seed, self.weights_in_components = noise_seed, weights_in_components
        self.autoencoder = autoencoder
        options.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**options)

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """See `PretrainedConfig.save_pretrained`; saving a model calls it. Adds this file."""
        super().save_pretrained(save_directory, **options)
        (Path(save_directory) / CODE_FILE).write_text(code_file(__name__))


class EGCImageProcessor(BaseImageProcessor):
    """Images of any size to pixel values, exactly as `EGCPipeline.classify` prepares them.

    Args:
        image_size: height and width of the network's images, in pixels.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.image_size = image_size

    def preprocess(self, images: PipelineImageInput, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """See `preprocess_images`: `images` as there, `pixel_values` (N, 3, image_size, image_size) in [-1, 1].

        Raises ValueError as there, and on options, of which there are none.
        """
        if options:
            raise ValueError(f"EGCImageProcessor takes images and return_tensors, got {', '.join(options)}")
        return BatchFeature({"pixel_values": preprocess_images(images, self.image_size)}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What is saved, without the class: config.json names it, and by a name that stands here transformers would
        look for a video processor too, and ask whether it may run its code.
        """
        return {k: v for k, v in super().to_dict().items() if k not in ("image_processor_type", "auto_map")}


@dataclass
class EGCClassifierOutput(ModelOutput):
    """What the classifier says of N images.

    Args:
        loss: the mean cross-entropy, where labels were given.
        logits: (N, K).
        energy: (N,) of the latents that were read, low = likely: clean ones at timestep 0, as `classify`, or for a
            linear head noised ones at its timestep.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    energy: torch.Tensor | None = None


class EGCPreTrainedModel(PreTrainedModel):
    """The energy network and the autoencoder's encoder, which is frozen, and how their weights are found.

    Raises ValueError for a configuration that does not fit them, by name.
    """

    config_class = EGCConfig
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = ["^linear[.]"]  # features of a classifier

    def __init__(self, config: EGCConfig) -> None:
        super().__init__(config)
        self.config.weights_in_components, self.config.autoencoder = False, None  # in memory, and saved as one file
        networks = {"EGCUNet": EGCUNet, "EGCTransformer": EGCTransformer}
        self.energy_model = networks[config.energy_model["_class_name"]].from_config(config.energy_model)
        self.vae = None
        if config.vae is not None:
            self.vae = getattr(diffusers, config.vae["_class_name"]).from_config(config.vae)
            for part in DECODER_PARTS:
                if hasattr(self.vae, part):
                    setattr(self.vae, part, nn.Identity())
            self.vae.eval().requires_grad_(False)
        # Skip connections join layers that are far apart: a network stays whole on one device.
        self._no_split_modules = [type(network).__name__ for network in self.children()]
        blocks = named_blocks(self.energy_model)
        self.block = [*blocks][-1] if config.block is None else config.block
        if self.block not in blocks:
            raise ValueError(f"block must be one of {', '.join(blocks)}, got {config.block!r}")
        num_timesteps = self.energy_model.config.num_train_timesteps
        if not 0 <= config.timestep < num_timesteps:
            raise ValueError(f"timestep must be in [0, {num_timesteps}), got {config.timestep}")
        if config.pooling < 1:
            raise ValueError(f"pooling must be at least 1, got {config.pooling}")

    @property
    def feature_width(self) -> int:
        """D p^2 of the pooled features."""
        network = self.energy_model.config
        with torch.device("meta"):
            twin = type(self.energy_model).from_config(network)
            latents = torch.empty(1, network.in_channels, network.sample_size, network.sample_size)
        with torch.no_grad():
            features, _ = block_map(twin, self.block, latents, torch.zeros(1, dtype=torch.long, device="meta"))
        return features.shape[1] * self._pooled_size(features) ** 2

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1] to scaled latents (N, C, h, w), by the posterior mean. Differentiable."""
        if self.vae is None:
            return pixel_values
        mean = latent_moments(self.vae, pixel_values)[:, : latent_channels(self.vae)]
        return scale_latents(self.vae, mean)

    def features(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, EnergyOutput]:
        """The block's map (N, D, h', w') of noised latents, its pooled features (N, D p^2), and the pass's energy.

        Where the map is smaller than p x p it is as it is. Source: Mukhopadhyay et al., arXiv 2307.08702.
        """
        timestep = torch.tensor([self.config.timestep])
        levels = [level.to(latents.device) for level in self.energy_model.noise_levels(timestep)]
        generator = torch.Generator().manual_seed(self.config.noise_seed)
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents)
        noisy_latents = add_noise(latents, noise.expand_as(latents), levels)
        features, output = block_map(self.energy_model, self.block, noisy_latents, self.config.timestep)
        pooled = F.adaptive_avg_pool2d(features, self._pooled_size(features)).flatten(1)
        return features, pooled, output

    def _pooled_size(self, features: torch.Tensor) -> int:
        return min(self.config.pooling, features.shape[-1])

    def _init_weights(self, module: nn.Module) -> None:
        """What no file holds: positions, which follow from the configuration, and a new linear head. The networks have
        initialised themselves.
        """
        if isinstance(module, PatchEmbed):
            size, patch_size = self.energy_model.config.sample_size, self.energy_model.config.patch_size
            fresh = PatchEmbed(size, size, patch_size, 1, self.energy_model.config.width)
            module.pos_embed.copy_(fresh.pos_embed)
        elif module is getattr(self, "linear", None):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *arguments: Any,
        config: EGCConfig | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """See `PreTrainedModel.from_pretrained`. Reads an exported folder's component folders, or a saved model.

        Raises:
            ValueError: naming the tensors that are missing, unexpected, NaN or infinite, or a named autoencoder that
                cannot be loaded. A linear head may be missing, and is then a new one.
        """
        source: str | os.PathLike | None = pretrained_model_name_or_path
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        if not isinstance(config, PretrainedConfig):
            config = EGCConfig.from_pretrained(config or source, subfolder=options.get("subfolder", ""), **hub)
            own = [name for name in options if name in config.to_dict() and name not in ("dtype", "torch_dtype")]
            config.update({name: options.pop(name) for name in own})
        if config.weights_in_components:
            options["state_dict"] = cls._read_components(source, config, options.pop("subfolder", ""), hub)
            source = None
        model, report = super().from_pretrained(source, *arguments, config=config, output_loading_info=True, **options)
        missing = [name for name in report["missing_keys"] if not name.startswith("linear.")]
        check_loaded(model, dict(report, missing_keys=missing, mismatched_keys=[]))  # transformers looks at shapes
        if model.vae is not None:
            model.vae.requires_grad_(False)  # loading makes parameters of its own
        align_weights(model)
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model, report) if output_loading_info else model

    @classmethod
    def _read_components(
        cls, source: str | os.PathLike, config: EGCConfig, subfolder: str, hub: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The weights that lie in the component folders, or where an autoencoder is named, by their names here."""
        files = {"energy_model": (posixpath.join(subfolder, "energy_model"), COMPONENT_WEIGHTS)}
        if config.vae is not None and config.autoencoder is None:
            files["vae"] = (posixpath.join(subfolder, "vae"), COMPONENT_WEIGHTS)
        if config.classifier == "linear":
            files["linear"] = (subfolder, LINEAR_FILE)
        found = {}
        for part, (folder, file) in files.items():
            weights = _read_weights(source, file, folder, hub, may_be_missing=part == "linear")
            found |= {f"{part}.{name}": tensor for name, tensor in weights.items()}
        if config.autoencoder is not None:
            hub = {name: value for name, value in hub.items() if name != "revision"}  # that is of another repository
            weights = named_autoencoder(config.autoencoder, **hub).state_dict()
            found |= {f"vae.{name}": tensor for name, tensor in weights.items() if _is_read(name)}
        return found


class EGCModel(EGCPreTrainedModel):
    """Features of the energy network, at the configuration's block, timestep and pooling."""

    def __init__(self, config: EGCConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, **options: Any
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """pixel_values (N, 3, H, W) in [-1, 1] -> the block's map (N, D, h, w), its pooled features (N, D p^2)."""
        features, pooled, _ = self.features(self.encode(pixel_values))
        output = BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)
        return output.to_tuple() if return_dict is False else output


class EGCForImageClassification(EGCPreTrainedModel):
    """The energy network as an image classifier, by its own logits or by a linear layer on its features.

    Raises ValueError, by name, where the energy network's own classes are not those of the configuration.
    """

    def __init__(self, config: EGCConfig) -> None:
        super().__init__(config)
        if config.classifier == "linear":
            self.linear = nn.Linear(self.feature_width, config.num_labels)
        elif config.classifier != "energy":
            raise ValueError(f"classifier must be 'energy' or 'linear', got {config.classifier!r}")
        elif config.num_labels != self.energy_model.config.num_classes:
            raise ValueError(
                f"the energy network has {self.energy_model.config.num_classes or 'no'} classes, got num_labels="
                f"{config.num_labels}; classifier='linear' puts a new linear head for other classes on its features"
            )
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> EGCClassifierOutput | tuple[torch.Tensor, ...]:
        """Class logits, the energy, and a loss where there are labels.

        Args:
            pixel_values: (N, 3, H, W) in [-1, 1].
            labels: (N,) int64 in [0, K).
            return_dict: False returns a tuple.

        Returns:
            `EGCClassifierOutput`.
        """
        latents = self.encode(pixel_values)
        if self.config.classifier == "energy":
            output = self.energy_model(latents, 0)
            logits = output.logits
        else:
            _, pooled, output = self.features(latents)
            logits = self.linear(pooled)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        found = EGCClassifierOutput(loss=loss, logits=logits, energy=output.energy)
        return found.to_tuple() if return_dict is False else found


def _read_weights(
    source: str | os.PathLike, file: str, subfolder: str, hub: Mapping[str, Any], may_be_missing: bool
) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors, or those of the shards that its index names, without a decoder's; {} where the file
    is missing and may be.
    """

    def find(name: str, required: bool = True) -> str | None:
        return cached_file(source, name, subfolder=subfolder, _raise_exceptions_for_missing_entries=required, **hub)

    paths = [find(file, required=False)]
    if paths == [None]:
        index = find(f"{file}.index.json", required=not may_be_missing)
        shards = [] if index is None else set(json.loads(Path(index).read_text())["weight_map"].values())
        paths = [find(shard) for shard in sorted(shards)]
    tensors = {}
    for path in paths:
        with safe_open(path, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if _is_read(name)}  # noqa: SIM118
    return tensors


def _is_read(name: str) -> bool:
    """Whether a tensor of this name is one of a component without its decoder."""
    return name.split(".")[0] not in DECODER_PARTS


# Releases of transformers before 5 make no pipeline of a folder's code without it.
AutoImageProcessor.register(EGCConfig, slow_image_processor_class=EGCImageProcessor, exist_ok=True)
if __name__.split(".")[0] == "latent_egc":
    AutoConfig.register(EGCConfig.model_type, EGCConfig)
    AutoModel.register(EGCConfig, EGCModel)
    AutoModelForImageClassification.register(EGCConfig, EGCForImageClassification)


