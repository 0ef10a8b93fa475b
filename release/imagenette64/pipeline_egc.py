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


# latent_egc/methods/correctors.py
"""Correctors: Markov chains within one noise level, whose density of z is exp(-U(z, t) / sigma_t) up to a constant.

    score      = -grad U / sigma_t,    xi and p standard normal
    ULA        z' = z + h score + sqrt(2 h) xi
    HMC        L leapfrog steps of length sqrt(2 h) from (z, p) to (z', p'), accepted with probability
               min(1, exp(H(z, p) - H(z', p'))),   H = U / sigma_t + |p|^2 / 2
    MALA       HMC with L = 1: the proposal is ULA's, the acceptance takes its bias away

A diffusion model without an energy knows the score alone and has ULA, whose bias grows with h: on N(0, 1) its variance
is 1 / (1 - h / 2). The true energy difference makes MALA and HMC exact for every h. h is given in units of sigma_t^2,
the scale on which noised data vary, so that one number suits all levels.

A row's chain uses its own step size and acceptance, and its own generator where there is one a row: it does not depend
on the rows beside it. Sources: Roberts and Tweedie (Bernoulli 1996, MALA), Neal (2011, HMC), Du et al. (ICML 2023,
arXiv 2302.11552: correctors in compositions of diffusion models).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.utils.torch_utils import randn_tensor


# U(z, t) and what it was read from: a `Potential`, or any other such function.
PotentialFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, list[EnergyOutput]]]
Generators = torch.Generator | list[torch.Generator] | None


def log_density_and_score(
    potential: PotentialFunction, latents: torch.Tensor, timestep: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-U / sigma_t (N,), and its gradient (N, C, h, w). 2 units: one forward and one backward pass."""

    def with_value(noisy_latents: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, list[EnergyOutput]]:
        values, _ = potential(noisy_latents, at)
        return values, [EnergyOutput(energy=values)]

    epsilon, (output,) = input_gradient(with_value, latents, timestep)
    return -output.energy / sigma, -epsilon / sigma


def _by_row(values: float | torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """A number, or one a row, as (N, 1, 1, 1) beside latents."""
    return torch.as_tensor(values, dtype=latents.dtype, device=latents.device).expand(len(latents))[:, None, None, None]


@torch.no_grad()
def ula(
    potential: PotentialFunction,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    sigma: torch.Tensor,
    step_sizes: float | torch.Tensor,
    num_steps: int = 1,
    generator: Generators = None,
) -> torch.Tensor:
    """Unadjusted Langevin steps; `num_steps` times 2 units.

    Args:
        potential: U(z, t).
        latents: (N, C, h, w) at `timestep`, at least float32.
        timestep: a scalar.
        sigma: sigma_t of it, a scalar.
        step_sizes: h / sigma_t^2, one or (N,).
        num_steps: at least 1.
        generator: one, or one a row.

    Returns:
        (N, C, h, w).
    """
    step = _by_row(step_sizes, latents) * sigma**2
    for _ in range(num_steps):
        _, score = log_density_and_score(potential, latents, timestep, sigma)
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        latents = latents + step * score + (2 * step).sqrt() * noise
    return latents


@torch.no_grad()
def hmc(
    potential: PotentialFunction,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    sigma: torch.Tensor,
    step_sizes: float | torch.Tensor,
    num_steps: int = 1,
    num_leapfrog_steps: int = 1,
    generator: Generators = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hamiltonian Monte Carlo, with one leapfrog step MALA; 1 + `num_steps` * `num_leapfrog_steps` times 2 units.

    Args:
        num_leapfrog_steps: L, at least 1.
        potential, latents, timestep, sigma, step_sizes, num_steps, generator: as for `ula`.

    Returns:
        (N, C, h, w), and (N,) the mean over the steps of the probability with which a row's proposal was accepted.
        A proposal whose energy is NaN is not.
    """
    length = (2 * _by_row(step_sizes, latents)).sqrt() * sigma
    options = {"generator": generator, "device": latents.device, "dtype": latents.dtype}
    log_density, score = log_density_and_score(potential, latents, timestep, sigma)
    acceptance = torch.zeros_like(log_density)
    for _ in range(num_steps):
        momentum = randn_tensor(latents.shape, **options)
        # The log of a uniform number, by a normal one: that is what there is a draw of with one generator a row.
        log_uniform = torch.special.log_ndtr(randn_tensor((len(latents), 1), **options)).squeeze(1)
        before = log_density - momentum.square().sum(dim=(1, 2, 3)) / 2
        proposal, there = latents, (log_density, score)
        for _ in range(num_leapfrog_steps):
            momentum = momentum + length / 2 * there[1]
            proposal = proposal + length * momentum
            there = log_density_and_score(potential, proposal, timestep, sigma)
            momentum = momentum + length / 2 * there[1]
        log_ratio = there[0] - momentum.square().sum(dim=(1, 2, 3)) / 2 - before
        accepted = log_uniform < log_ratio
        latents = torch.where(accepted[:, None, None, None], proposal, latents)
        log_density = torch.where(accepted, there[0], log_density)
        score = torch.where(accepted[:, None, None, None], there[1], score)
        acceptance += log_ratio.clamp(max=0).exp().nan_to_num(0.0)
    return latents, acceptance / num_steps


@dataclass(frozen=True)
class Corrector:
    """Which chain runs at each noise level, and how long.

    Args:
        kind: "ula", "mala" or "hmc".
        num_steps: of the chain at each level. A level costs `num_steps` gradients by ULA, 1 + `num_steps` by MALA and
            1 + `num_steps` * `num_leapfrog_steps` by HMC; a gradient is one forward and one backward pass.
        step_size: h / sigma_t^2, at the first level.
        target_acceptance: to which MALA's and HMC's step sizes are adapted, each image's from level to level; within a
            level it is fixed, so that the level's density stays as it is. None: the step size stays. ULA accepts all.
        num_leapfrog_steps: L, of HMC alone.

    Raises:
        ValueError: a value out of its range, by name.
    """

    kind: Literal["ula", "mala", "hmc"] = "mala"
    num_steps: int = 2
    step_size: float = 0.1
    target_acceptance: float | None = 0.6
    num_leapfrog_steps: int = 3

    def __post_init__(self) -> None:
        if self.kind not in ("ula", "mala", "hmc"):
            raise ValueError(f"corrector must be of kind 'ula', 'mala' or 'hmc', got {self.kind!r}")
        for name in ("num_steps", "num_leapfrog_steps"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"corrector: {name} must be an integer of at least 1, got {count!r}")
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"corrector: step_size must be finite and positive, got {self.step_size}")
        if self.target_acceptance is not None and not 0 < self.target_acceptance < 1:
            raise ValueError(f"corrector: target_acceptance must be in (0, 1) or None, got {self.target_acceptance}")

    def __call__(
        self,
        potential: PotentialFunction,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        sigma: torch.Tensor,
        step_sizes: float | torch.Tensor,
        generator: Generators = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Corrected latents and acceptance rates (N,), ones by ULA; arguments as for `ula`."""
        arguments = potential, latents, timestep, sigma, step_sizes, self.num_steps
        if self.kind == "ula":
            return ula(*arguments, generator=generator), torch.ones_like(latents[:, 0, 0, 0])
        num_leapfrog_steps = self.num_leapfrog_steps if self.kind == "hmc" else 1
        return hmc(*arguments, num_leapfrog_steps, generator)

    def adapted(self, step_sizes: torch.Tensor, acceptance_rates: torch.Tensor) -> torch.Tensor:
        """Step sizes (N,) for the next level: larger where more than the target was accepted, smaller where less."""
        if self.kind == "ula" or self.target_acceptance is None:
            return step_sizes
        return step_sizes * (acceptance_rates - self.target_acceptance).exp()


# latent_egc/methods/certification.py
"""Randomised smoothing: the class that most noised copies of an input are given, and how far that is certain to hold.

Whatever a classifier is, the class that it most probably gives to x + sigma eps, eps ~ N(0, I), cannot change within an
l2 distance of sigma Phi^-1(p) of x, if p bounds that class's probability from below. The probability is bounded by
counting votes: a few choose the class, others, which it was not chosen by, say how often it comes.
Source: Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing" (ICML 2019).
"""

from statistics import NormalDist

import torch

# In place of a label, where the votes do not tell one class from the others.
ABSTAIN = -1


def binomial_lower_bound(successes: int, trials: int, alpha: float) -> float:
    """Clopper and Pearson's bound: with confidence 1 - alpha a success is at least so probable.

    It is the p at which `successes` or more have the probability alpha, by bisection over the binomial distribution's
    tail; never above the exact one.

    Args:
        successes: in [0, trials].
        trials: at least 1.
        alpha: in (0, 1).
    """
    if successes == 0:
        return 0.0
    counts = torch.arange(successes, trials + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(trials + 1.0, dtype=torch.float64))
    ways = ways - torch.lgamma(counts + 1) - torch.lgamma(trials - counts + 1)
    low, high = 0.0, 1.0
    for _ in range(50):  # to 1e-15
        p = torch.tensor((low + high) / 2, dtype=torch.float64)
        tail = (ways + counts * p.log() + (trials - counts) * torch.log1p(-p)).logsumexp(dim=0).exp()
        low, high = (low, float(p)) if tail > alpha else (float(p), high)
    return low


def certificate(
    choosing_votes: torch.Tensor, counted_votes: torch.Tensor, sigma: float, alpha: float
) -> tuple[int, float]:
    """The smoothed classifier's class and the l2 radius within which, with confidence 1 - alpha, it does not change.

    Args:
        choosing_votes, counted_votes: (K,) int64 each, from independent draws of the noise.
        sigma: of the noise; the radius is in its units.
        alpha: in (0, 1), the share of certificates that may be wrong.

    Returns:
        The class and the radius, or `ABSTAIN` and 0.
    """
    label = int(choosing_votes.argmax())
    bound = binomial_lower_bound(int(counted_votes[label]), int(counted_votes.sum()), alpha)
    return (label, sigma * NormalDist().inv_cdf(bound)) if bound > 0.5 else (ABSTAIN, 0.0)


def largest_radius(num_votes: int, sigma: float, alpha: float) -> float:
    """What `certificate` says where all of `num_votes` agree; 0 where even these are too few."""
    votes = torch.tensor([num_votes])
    return certificate(votes, votes, sigma, alpha)[1]


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


# latent_egc/methods/denoised_classification.py
"""Classifying what the energy itself denoised: noise the latents, denoise them in one step, classify, average.

    z_t = alpha_t z_0 + sigma_t eps,   z_0' = (z_t - sigma_t epsilon(z_t, t)) / alpha_t,   p(y | z_0' at timestep 0)

An attack that differentiates the average over draws of eps sees its gradient averaged too: expectation over
transformation (Athalye et al., ICML 2018), which a defence by randomness must withstand.
"""

import math

import torch
from diffusers import ModelMixin



def denoised(
    potential: Potential, noise_levels: tuple[torch.Tensor, torch.Tensor], noisy_latents: torch.Tensor, timestep: int
) -> torch.Tensor:
    """Clean latents (N, C, h, w) by one step from noisy ones at the timestep, whose alpha and sigma are given."""
    alpha, sigma = noise_levels
    epsilon, _ = input_gradient(potential, noisy_latents, torch.tensor(timestep, device=noisy_latents.device))
    return (noisy_latents - sigma * epsilon) / alpha


def denoised_log_probabilities(
    potential: Potential, classifier: ModelMixin, latents: torch.Tensor, noise: torch.Tensor, timestep: int
) -> torch.Tensor:
    """log of the mean, over draws of noise, of the class probabilities of denoised latents. Differentiable.

    Args:
        potential: U(z, t), which denoises.
        classifier: the energy model that classifies; its noise schedule is the potential's.
        latents: (N, C, h, w), clean and scaled.
        noise: (N, M, C, h, w), M draws for each of the latents. Costs 3 M units: 2 to denoise, 1 to classify.
        timestep: how much noise, in [0, T).

    Returns:
        (N, K).
    """
    num_draws = noise.shape[1]
    levels = classifier.noise_levels(torch.tensor(timestep, device=latents.device))
    noisy_latents = add_noise(latents.repeat_interleave(num_draws, dim=0), noise.flatten(0, 1), levels)
    logits = classifier(denoised(potential, levels, noisy_latents, timestep), 0).logits
    log_probabilities = logits.log_softmax(dim=1).unflatten(0, (-1, num_draws))  # (N, M, K)
    return log_probabilities.logsumexp(dim=1) - math.log(num_draws)


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


# latent_egc/pipelines/class_names.py
"""Classes by id or by name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

ClassLabels = int | str | Sequence[int | str] | torch.Tensor


def label_ids(class_labels: ClassLabels, id2label: Mapping[int, str], name: str = "class_labels") -> torch.Tensor:
    """Ids or names, one or many -> (L,) int64.

    Args:
        class_labels: ids in [0, K), names, or a tensor or numpy array of ids.
        id2label: the K names; empty for a model without classes.
        name: of the argument, for errors.

    Raises:
        ValueError: an unknown id or name (with a suggestion), no label, or a model without classes.
    """
    if not id2label:
        raise ValueError(f"this model was trained without classes, got {name}={class_labels!r}")
    ids = [_label_id(label, id2label, name) for label in _plain(class_labels)]
    if not ids:
        raise ValueError(f"{name} is empty; None samples without labels")
    return torch.tensor(ids)


def _plain(class_labels: Any) -> list[Any]:
    """A flat list of what may be a tensor, an array, one label, or a list with such entries of one label each."""
    if hasattr(class_labels, "flatten"):  # a tensor, a numpy array or scalar
        return class_labels.flatten().tolist()
    if not isinstance(class_labels, (list, tuple)):
        return [class_labels]
    entries = [_plain(entry) for entry in class_labels]
    return [entry[0] if len(entry) == 1 else entry for entry in entries]


def _label_id(label: Any, id2label: Mapping[int, str], name: str) -> int:
    if isinstance(label, str):
        label2id = {label_name: i for i, label_name in id2label.items()}
        if label in label2id:
            return label2id[label]
        close = difflib.get_close_matches(label, label2id, n=3)
        names = ", ".join(list(label2id)[:20]) + (", ..." if len(label2id) > 20 else "")
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the names are {names}"
        raise ValueError(f"unknown class name {label!r} in {name}; {hint}")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(id2label):
        raise ValueError(f"{name} must be names or ids in [0, {len(id2label)}), got {label!r}")
    return label


# latent_egc/pipelines/guidance.py
"""What guides a step: a label, scales, where they act, and a weaker model, as one potential and as its epsilon.

    U                                               the energy, at the label if the class embedding sees it
    + (s - 1) (U - U at the null label)             classifier-free guidance, `classifier_free_scale` s
    - w sigma_t log p(y | z, t)                     the classifier's gradient, `guidance_scale` w, or w(noise level)
    U_weak + s (U - U_weak)                         autoguidance, `auto_guidance_scale` s

They act where the noise level, the timestep's share of all timesteps, lies in `guidance_interval`; elsewhere a step is
unguided. `guidance_rescale` changes the length of epsilon, so that it is no potential's gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.guiders.guider_utils import rescale_noise_cfg


# A weight, or one for each noise level in [0, 1].
GuidanceScale = float | Callable[[float], float]


def scale_at(scale: GuidanceScale, noise_level: float) -> float:
    """A scale's value at a noise level in [0, 1]."""
    return float(scale(noise_level)) if callable(scale) else scale


@dataclass(frozen=True)
class Guidance:
    """The guidance of the steps of N images; the arguments are those of `EGCPipeline.__call__`, checked there.

    Args:
        energy_model: what is guided.
        class_labels: (N,) int64, or None.
        guidance_scale: of the noise level; asked at every step, so that a callback may change what it says.
        classifier_free_scale, guidance_interval, guidance_rescale, auto_guidance_model, auto_guidance_scale: see there.
    """

    energy_model: ModelMixin
    class_labels: torch.Tensor | None
    guidance_scale: GuidanceScale
    classifier_free_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    auto_guidance_model: Any = None
    auto_guidance_scale: float = 1.0

    def potential(self, timestep: torch.Tensor) -> Potential:
        """U(z, t) at a scheduler's timestep, without the rescale.

        Its gradient costs 2 units, 4 where both the label and the null label are read; a weaker model adds its own 2
        or 4.
        """
        scales = self._scales(timestep)
        return self._with_weaker(lambda model: model.potential(self.class_labels, **scales), timestep)

    def epsilon(self, noisy_latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The potential's gradient (N, C, h, w), rescaled. The rescale adds 2 units in the interval, none outside."""
        scales = self._scales(timestep)
        epsilon = self._with_weaker(
            lambda model: model.epsilon(noisy_latents, timestep, self.class_labels, **scales), timestep
        )
        if self.guidance_rescale == 0 or not self._acts(timestep):
            return epsilon
        unguided = self.energy_model.epsilon(noisy_latents, timestep, self.class_labels, **self._unguided)
        return rescale_noise_cfg(epsilon, unguided, self.guidance_rescale)

    def _noise_level(self, timestep: torch.Tensor) -> float:
        return float(timestep / self.energy_model.config.num_train_timesteps)

    def _acts(self, timestep: torch.Tensor) -> bool:
        return self.guidance_interval[0] <= self._noise_level(timestep) <= self.guidance_interval[1]

    @property
    def _unguided(self) -> dict[str, float]:
        """Scales at which a network is the energy that sees the label, if it was to see one at all."""
        return {"guidance_scale": 0.0, "classifier_free_scale": float(self.classifier_free_scale != 0)}

    def _scales(self, timestep: torch.Tensor) -> dict[str, float]:
        if not self._acts(timestep):
            return self._unguided
        scale = scale_at(self.guidance_scale, self._noise_level(timestep))
        return {"guidance_scale": scale, "classifier_free_scale": self.classifier_free_scale}

    def _with_weaker(self, of_model: Callable[[ModelMixin], Any], timestep: torch.Tensor) -> Any:
        """What a function gives of the network, a potential or a tensor, led away from what it gives of a weaker one.

        Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024.
        """
        own = of_model(self.energy_model)
        if self.auto_guidance_model is None or not self._acts(timestep):
            return own
        weaker = of_model(network_of(self.auto_guidance_model))
        return (1 - self.auto_guidance_scale) * weaker + self.auto_guidance_scale * own


def network_of(model: Any) -> ModelMixin:
    """The energy network itself, of a pipeline or of one that is given as it is."""
    return getattr(model, "energy_model", model)


def candidate_scores(
    energy_model: ModelMixin, latents: torch.Tensor, class_labels: torch.Tensor | None, select_by: str
) -> torch.Tensor:
    """How good clean latents are, (N,): log p(y | z), log p(z) up to a constant, or their sum log p(z, y).

    One forward pass at timestep 0 and the null label, the published convention of classifying.

    Args:
        energy_model: what judges.
        latents: (N, C, h, w), clean and scaled.
        class_labels: (N,) int64 in [0, K), y; for "density" they may be None.
        select_by: "classifier", "density" or "both".
    """
    timestep = torch.tensor(0, device=latents.device)
    output = energy_model(latents, timestep)
    scores = torch.zeros_like(output.energy)
    if select_by != "classifier":
        scores = scores - output.energy / energy_model.noise_levels(timestep)[1]
    if select_by != "density":
        scores = scores + output.logits.log_softmax(dim=1).gather(1, class_labels[:, None]).squeeze(1)
    return scores


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


# latent_egc/pipelines/schedulers.py
"""Which noise scheduler an energy network samples with: one on its own noise schedule; and how it is asked to."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

# Solvers by the names of their papers.
SOLVERS: dict[str, type[SchedulerMixin]] = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++(2M)": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "Heun": HeunDiscreteScheduler,
    "Euler": EulerDiscreteScheduler,
}
# What a trained pipeline samples with, see docs/decisions.md: as good as DDIM in twice as many steps.
DEFAULT_SOLVER = "DPM-Solver++(2M)"


def solver(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """A solver of `SOLVERS` on a scheduler's noise schedule.

    It starts at the last timestep, which few steps with the spacing "leading" of DDIM's leave out.

    Raises:
        ValueError: no such solver.
    """
    if name not in SOLVERS:
        raise ValueError(f"there is no solver {name!r}, only {', '.join(SOLVERS)}")
    return SOLVERS[name].from_config(scheduler.config, timestep_spacing="trailing")


def steps_within(scheduler: SchedulerMixin, budgets: Sequence[int]) -> dict[int, int]:
    """Numbers of steps -> evaluations that they take: the most steps within each budget that allows any."""
    scheduler, found = copy.deepcopy(scheduler), {}
    for budget in sorted(budgets):
        for steps in range(budget, 0, -1):
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) <= budget:
                found[steps] = len(scheduler.timesteps)
                break
    return found


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


def check_scheduler(scheduler: SchedulerMixin, energy_model: ModelMixin) -> None:
    """Raises ValueError where a scheduler predicts something else than epsilon or is on another noise schedule.

    The energy network owns its noise schedule; on another one it would sample nonsense silently.
    """
    name, config = type(scheduler).__name__, scheduler.config
    remedy = "build one with from_config(pipeline.scheduler.config), of DDIMScheduler for example"
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{name} has no alphas_cumprod: it is made for flow matching or EDM's noise levels, on which this network "
            f"was not trained; {remedy}"
        )
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"{name} has prediction_type={config.prediction_type!r}, this pipeline needs 'epsilon'")
    if config.get("use_flow_sigmas"):
        raise ValueError(
            f"{name} has use_flow_sigmas=True: these are flow matching's noise levels, on which this network was not "
            "trained; set it to False"
        )
    own, other = energy_model.alphas_cumprod.float().cpu(), scheduler.alphas_cumprod.float().cpu()
    if own.shape == other.shape and torch.allclose(own, other, atol=1e-5):
        return
    fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    needed = {field: energy_model.config[field] for field in fields} | {
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
    }
    different = [
        f"{field}={config[field]!r}, the network has {value!r}"
        for field, value in needed.items()
        if field in config and config[field] != value
    ]
    raise ValueError(
        f"{name} has another noise schedule than the energy network: {'; '.join(different) or 'other alphas_cumprod'}; "
        f"{remedy}"
    )


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timesteps: Sequence[int] | None,
    sigmas: Sequence[float] | None,
    device: torch.device,
) -> None:
    """Sets a scheduler's steps: a number of them, or its own `timesteps` or `sigmas`.

    Raises:
        ValueError: both are given, or the scheduler takes no such argument.
    """
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if len(given) == 2:
        raise ValueError("timesteps and sigmas exclude each other, got both")
    for name in given:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} takes no {name}; leave it out, or use another scheduler")
    if given:
        scheduler.set_timesteps(**given, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps=num_inference_steps, device=device)


def last_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, strength: float) -> torch.Tensor:
    """The last of a scheduler's timesteps, with which it shall begin.

    Args:
        scheduler: set to `num_inference_steps`.
        num_inference_steps: all of its steps.
        strength: the share of them that is gone, in [0, 1]; above 0 at least one step.

    Returns:
        Descending timesteps; none for strength 0.
    """
    num_steps = max(round(strength * num_inference_steps), 1) if strength > 0 else 0
    first = (num_inference_steps - num_steps) * scheduler.order  # of solvers that look twice in a step
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:] if num_steps > 0 else scheduler.timesteps[:0]


def step_options(
    scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float
) -> dict[str, Any]:
    """What `scheduler.step` takes besides epsilon: deterministic schedulers have no generator, few have an eta.

    Raises:
        ValueError: an `eta` that the scheduler would ignore.
    """
    taken = inspect.signature(scheduler.step).parameters
    if eta != 0 and "eta" not in taken:
        raise ValueError(f"{type(scheduler).__name__} takes no eta, got {eta}; DDIMScheduler does")
    options = {"generator": generator, "eta": eta}
    return {name: value for name, value in options.items() if name in taken}


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


# latent_egc/pipelines/self_contained.py
"""A pipeline whose folder loads with latent_egc installed and without it, and whose components make it again."""

import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline




def _in_package() -> bool:
    """Whether this is latent_egc's own file, not a copy of it from a repository."""
    return __name__.split(".")[0] == "latent_egc"


class SelfContainedPipeline(DiffusionPipeline):
    """Saving puts the code beside the weights; loading uses this package's classes where they are installed."""

    # A folder names its own code files, for use without this package. Where the package is installed its
    # classes are used instead, and no code from the folder is run: two methods rewrite the names, strings only. The
    # pipeline's own is rewritten in the private one because loading from the Hub reads model_index.json through it
    # before anything is downloaded; the energy network's must stay until then, or the Hub's listing would not fit it.

    @classmethod
    def _dict_from_json_file(cls, json_file: str, **options: Any) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file, **options)  # older versions of diffusers have one
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

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> "SelfContainedPipeline":
        """See `DiffusionPipeline.from_pretrained`. Raises ValueError, naming them, on tensors that nothing asks for."""
        pipeline = super().from_pretrained(*arguments, **options)
        if pipeline.vae is not None and options.get("vae") is None:  # the energy network looks at its own
            check_files(pipeline.vae)
        return pipeline

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **options: Any) -> None:
        """See `ConfigMixin.save_config`; saving and pushing a pipeline end with it. Adds the code files."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)
        network = getattr(self.energy_model, "_orig_mod", self.energy_model)  # what torch.compile wraps
        add_code_files(Path(save_directory), type(self), type(network))

    # diffusers' ways to build a pipeline of another's components know these by exact types and forget their names.

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> "SelfContainedPipeline":
        """See `DiffusionPipeline.from_pipe`."""
        shared = {name: part for name, part in pipeline.components.items() if name in ("energy_model", "vae")}
        return super().from_pipe(pipeline, **(shared | options))

    @property
    def components(self) -> dict[str, Any]:
        """All that a pipeline of this class needs to be this one: components, names and scale."""
        return super().components | super().parameters

    @property
    def parameters(self) -> dict[str, Any]:
        """Nothing: `components` has the names and the scale."""
        return {}


# latent_egc/pipelines/energy_pipeline.py
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


# latent_egc/pipelines/sampling_checks.py
"""The arguments of a call that samples: what fits, and what is named where it does not."""

import math
from typing import Any

import torch
from diffusers import ModelMixin



def check_counts(num_images_per_label: int, num_inference_steps: int, batch_size: int | None, num_train: int) -> None:
    """Raises ValueError unless these are positive, and the steps at most `num_train`."""
    for name, count in (("num_images_per_label", num_images_per_label), ("batch_size", batch_size)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be at least 1, got {count!r}")
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= num_train:
        raise ValueError(f"num_inference_steps must be in [1, {num_train}], got {num_inference_steps!r}")


def check_guidance(
    energy_model: ModelMixin,
    labels: torch.Tensor | None,
    guidance_scale: GuidanceScale,
    classifier_free_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    auto_guidance_model: Any = None,
    auto_guidance_scale: float = 1.0,
) -> None:
    """Raises ValueError unless these guide, see `Guidance`; a scale of the noise level is asked at every timestep."""
    if callable(guidance_scale):
        num_timesteps = energy_model.config.num_train_timesteps
        scales = [scale_at(guidance_scale, timestep / num_timesteps) for timestep in range(num_timesteps)]
        wrong = next((scale for scale in scales if not (math.isfinite(scale) and scale >= 0)), None)
        guidance_scale = max(scales) if wrong is None else wrong
    check_scales(energy_model, labels, guidance_scale, classifier_free_scale)
    check_interval(guidance_interval)
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
    check_auto_guidance(energy_model, auto_guidance_model, auto_guidance_scale)


def check_auto_guidance(energy_model: ModelMixin, auto_guidance_model: Any, auto_guidance_scale: float) -> None:
    """Raises ValueError unless there is no weaker model and no scale, or both, and the model fits the stronger one."""
    if not math.isfinite(auto_guidance_scale):
        raise ValueError(f"auto_guidance_scale must be finite, got {auto_guidance_scale}")
    if auto_guidance_model is None:
        if auto_guidance_scale != 1:
            raise ValueError(f"auto_guidance_scale={auto_guidance_scale} needs auto_guidance_model, got None")
        return
    weaker = network_of(auto_guidance_model)
    if not callable(getattr(weaker, "potential", None)):
        kind = type(auto_guidance_model).__name__
        raise ValueError(f"auto_guidance_model must be an EnergyModel or an EGCPipeline, got {kind}")
    if auto_guidance_scale == 1:
        raise ValueError("auto_guidance_scale=1 would ignore auto_guidance_model; more than 1 leads away from it")
    for field in ("num_classes", "class_embedding", "in_channels", "sample_size"):
        own, other = energy_model.config[field], weaker.config[field]
        if own != other:
            raise ValueError(f"auto_guidance_model has {field}={other}, the pipeline's network has {own}")
    own, other = (model.alphas_cumprod.float().cpu() for model in (energy_model, weaker))
    if own.shape != other.shape or not torch.allclose(own, other, atol=1e-5):
        raise ValueError("auto_guidance_model has another noise schedule than the pipeline's network")
    # Offloaded weights come to where they are needed; others stay where they are.
    if not any(hasattr(model, "_hf_hook") for model in (energy_model, weaker)) and energy_model.device != weaker.device:
        raise ValueError(f"auto_guidance_model is on {weaker.device}, the pipeline's network on {energy_model.device}")


def check_selection(
    labels: torch.Tensor | None, latents: torch.Tensor | None, num_candidates: int, select_by: str
) -> None:
    """Raises ValueError unless so many candidates can be drawn for an image, and judged so."""
    if not isinstance(num_candidates, int) or num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates!r}")
    if select_by not in ("classifier", "density", "both"):
        raise ValueError(f"select_by must be 'classifier', 'density' or 'both', got {select_by!r}")
    if num_candidates > 1 and latents is not None:
        raise ValueError(f"num_candidates={num_candidates} draws starting noise of its own, leave latents out")
    if num_candidates > 1 and labels is None and select_by != "density":
        raise ValueError(f"select_by={select_by!r} needs class_labels, got None; 'density' does not")


def check_scales(
    energy_model: ModelMixin, labels: torch.Tensor | None, guidance_scale: float, classifier_free_scale: float
) -> None:
    """Raises ValueError where a scale is out of range, needs labels that are not there, or would ignore those given."""
    class_embedding = energy_model.config.class_embedding
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale must be finite and not negative, got {guidance_scale}")
    if labels is None and guidance_scale != 0:
        raise ValueError(f"guidance_scale={guidance_scale} needs class_labels, got None")
    if labels is not None and guidance_scale == 0 and not class_embedding:
        raise ValueError(
            "guidance_scale=0 would ignore class_labels: this model has no class embedding, only the classifier's "
            "gradient sees a label"
        )
    if labels is not None and guidance_scale == 0 and classifier_free_scale == 0:
        raise ValueError("guidance_scale=0 with classifier_free_scale=0 would ignore class_labels")
    if not math.isfinite(classifier_free_scale):
        raise ValueError(f"classifier_free_scale must be finite, got {classifier_free_scale}")
    if classifier_free_scale != 1 and (labels is None or not class_embedding):
        raise ValueError(
            f"classifier_free_scale={classifier_free_scale} needs class_labels and a model with class embedding"
        )


def check_interval(guidance_interval: tuple[float, float]) -> None:
    """Raises ValueError unless these are two shares in order."""
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise ValueError(f"guidance_interval must be two shares, 0 <= start <= stop <= 1, got {guidance_interval}")


def check_start(
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    num_images: int,
    size: tuple[int | None, int | None],
) -> None:
    """Raises ValueError unless generators and starting latents are as many as the images, finite and of their size.

    Args:
        generator: one, or one an image.
        latents: (N, C, h, w) or None.
        num_images: N.
        size: h and w, where they were asked for.
    """
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"generator must be one or a list of {num_images}, got a list of {len(generator)}")
    if latents is not None:
        if latents.ndim != 4 or len(latents) != num_images:
            raise ValueError(f"latents must be ({num_images}, C, h, w), got shape {tuple(latents.shape)}")
        if any(asked not in (None, found) for asked, found in zip(size, latents.shape[-2:], strict=True)):
            raise ValueError(f"height and width belong to latents of {size}, got latents of {tuple(latents.shape)}")
        if not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or infinite values")


def latent_length(name: str, pixels: int | None, scale_factor: int, size_divisor: int) -> int | None:
    """The `height` or `width` of images in latents; None stays None. Raises ValueError where it does not fit."""
    divisor = scale_factor * size_divisor
    if pixels is None:
        return None
    if not isinstance(pixels, int) or pixels < 1 or pixels % divisor:
        raise ValueError(f"{name} must be a positive multiple of {divisor}, got {pixels!r}")
    return pixels // scale_factor


def check_strength(strength: float) -> None:
    """Raises ValueError unless it is a share."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")


# latent_egc/pipelines/certification.py
"""What the energy network says of images: one pass, the mean over noised and denoised copies, or with a certificate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor




@dataclass
class EGCClassificationOutput(BaseOutput):
    """What the energy network says of N images.

    Args:
        logits: (N, K) at timestep 0; where noise was averaged over, the log of the mean probabilities.
        probabilities: (N, K), softmax of the logits.
        labels: for each image the names of its `top_k` most probable classes, most probable first.
        energy: (N,) at timestep 0, low = likely; comparable between images of one model only.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    labels: list[list[str]]
    energy: torch.Tensor


@dataclass
class EGCCertificationOutput(BaseOutput):
    """What the smoothed classifier says of N images, and how far it is certain to say so.

    Args:
        label_ids: (N,) int64; -1 where it abstains.
        labels: for each image the name of its class; None where it abstains.
        radius: (N,) float64, in l2; 0 where it abstains.
        votes: (N, K) int64, what the classifier said of the `n` noised copies that were counted.
        space: what the radius is a distance of: "pixels" in [0, 1], or scaled "latents".
    """

    label_ids: torch.Tensor
    labels: list[str | None]
    radius: torch.Tensor
    votes: torch.Tensor
    space: str


class CertifyingPipeline(EnergyPipeline):
    """An `EnergyPipeline` that classifies images."""

    @torch.no_grad()
    def classify(
        self,
        images: PipelineImageInput,
        top_k: int = 1,
        batch_size: int | None = None,
        num_noise_samples: int = 1,
        timesteps: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> EGCClassificationOutput:
        """Classifies images by one forward pass of the energy network on their clean latents at timestep 0.

        With `timesteps` that pass gives the energy alone. The class probabilities are the mean over noised copies of
        the latents, each brought to one of the timesteps, denoised by one step of the energy's gradient and classified
        as clean latents are.

        Args:
            images: as in `preprocess_images`: PIL, numpy or torch, one or many, of any size.
            top_k: how many class names to return for each image, in [1, K].
            batch_size: images at once; None: what memory surely holds, by their size.
            num_noise_samples: noised copies at each of the timesteps, two forward and one backward pass each.
            timesteps: one or many in [0, T), how much noise; None: none.
            generator: of the noise; one for all images, or one an image (an image then does not depend on its batch).

        Returns:
            `EGCClassificationOutput` on the CPU.

        Raises:
            ValueError: a model without classes, unusable images, or another argument out of range; by name.
        """
        num_classes, one_by_one = self._num_classes(), single_images(images)
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"top_k must be in [1, {num_classes}], got {top_k}")
        levels = self._check_levels(timesteps, num_noise_samples)
        if batch_size is None:
            batch_size = self._default_image_batch_size()
        check_counts(1, 1, batch_size, 1)
        check_start(generator, None, len(one_by_one), (None, None))
        starts = range(0, len(one_by_one), batch_size)
        logits, energy = [], []
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            rows = slice(start, start + batch_size)
            pixel_values = preprocess_images(one_by_one[rows], self.image_size)
            latents = self.encode(pixel_values.to(self._execution_device))
            output = self.energy_model(latents, 0)
            energy.append(output.energy.cpu())
            if levels:
                own = generator[rows] if isinstance(generator, list) else generator
                logits.append(self._denoised_logits(latents, levels, num_noise_samples, own).cpu())
            else:
                logits.append(output.logits.cpu())
        self.maybe_free_model_hooks()
        logits, id2label = torch.cat(logits), self.id2label
        return EGCClassificationOutput(
            logits=logits,
            probabilities=logits.softmax(dim=-1),
            labels=[[id2label[i] for i in row] for row in logits.topk(top_k, dim=-1).indices.tolist()],
            energy=torch.cat(energy),
        )

    def _denoised_logits(
        self,
        latents: torch.Tensor,
        levels: Sequence[int],
        num_noise_samples: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """log of the mean of the class probabilities (N, K) of noised and denoised latents (N, C, h, w)."""
        potential, options = energy_potential(self.energy_model), {"device": latents.device, "dtype": latents.dtype}
        found = []
        for timestep in levels:
            for _ in range(num_noise_samples):
                noise = randn_tensor(latents.shape, generator, **options)[:, None]
                found.append(denoised_log_probabilities(potential, self.energy_model, latents, noise, timestep))
        return torch.stack(found).logsumexp(dim=0) - math.log(len(found))

    @torch.no_grad()
    def certify(
        self,
        images: PipelineImageInput,
        sigma: float,
        n0: int = 100,
        n: int = 1000,
        alpha: float = 0.001,
        noise: Literal["pixels", "latents"] = "pixels",
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> EGCCertificationOutput:
        """Classifies images by the vote over noised copies, with an l2 radius within which the vote is certain.

        Noised pixels are read by the network itself, at the timestep of that noise: without an autoencoder there is
        nothing to be denoised. With one they are encoded first and read at timestep 0; noise on the latents is read at
        its timestep too, but what it certifies is a distance of latents, not of pixels. The largest radius that can be
        had is sigma Phi^-1(alpha^(1/n)). Source: Cohen et al. (ICML 2019).

        Args:
            images: as in `preprocess_images`: PIL, numpy or torch, one or many, of any size.
            sigma: of the noise, in units of pixels in [0, 1], or of scaled latents.
            n0: noised copies that choose the class, one forward pass each.
            n: further ones that say how often it is chosen, one forward pass each; with noise on pixels before an
                autoencoder each of both is also encoded.
            alpha: in (0, 1), the probability that an image's certificate is wrong.
            noise: on the "pixels", or on the "latents".
            batch_size: noised copies at once; None: what memory surely holds, by their size.
            generator: of the noise; one for all images, or one an image (which then does not depend on the others).

        Returns:
            `EGCCertificationOutput` on the CPU; the radius is in units of pixels in [0, 1], or of scaled latents.

        Raises:
            ValueError: a model without classes, unusable images, a sigma beyond the noise schedule, or another argument
                out of range; by name.
        """
        num_classes, one_by_one = self._num_classes(), single_images(images)
        for name, count in (("n0", n0), ("n", n)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be in (0, 1), got {alpha}")
        if batch_size is None:
            batch_size = self._default_image_batch_size()
        check_counts(1, 1, batch_size, 1)
        check_start(generator, None, len(one_by_one), (None, None))
        self._check_pixel_space()
        read = self._reader(sigma, noise)
        votes, certificates = torch.zeros(2, len(one_by_one), num_classes, dtype=torch.long), []
        with self.progress_bar(total=len(one_by_one) * (n0 + n)) as progress_bar:
            for i, image in enumerate(one_by_one):
                clean = preprocess_images([image], self.image_size).to(self._execution_device)
                clean = self.encode(clean) if noise == "latents" else clean
                clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
                own = generator[i] if isinstance(generator, list) else generator
                for stage, count in enumerate((n0, n)):
                    for first in range(0, count, batch_size):
                        shape = (min(batch_size, count - first), *clean.shape[1:])
                        draws = randn_tensor(shape, own, device=clean.device, dtype=clean.dtype)
                        said = read(clean, draws).argmax(dim=1).cpu()
                        votes[stage, i] += said.bincount(minlength=num_classes)
                        progress_bar.update(len(draws))
                certificates.append(certificate(votes[0, i], votes[1, i], sigma, alpha))
        self.maybe_free_model_hooks()
        label_ids, radius = zip(*certificates, strict=True)
        return EGCCertificationOutput(
            label_ids=torch.tensor(label_ids),
            labels=[None if i == ABSTAIN else self.id2label[i] for i in label_ids],
            radius=torch.tensor(radius, dtype=torch.float64),
            votes=votes[1],
            space=noise,
        )

    def _reader(self, sigma: float, noise: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Pixel values in [-1, 1] or latents (1, C, H, W), and standard normal draws (B, C, H, W) of their noise, to
        logits (B, K). Raises ValueError on what `certify` says.
        """
        if noise not in ("pixels", "latents"):
            raise ValueError(f"noise must be 'pixels' or 'latents', got {noise!r}")
        if noise == "latents" and self.vae is None:
            raise ValueError("noise='latents' needs an autoencoder, this network works on pixels: noise='pixels'")
        in_pixels = 2 if noise == "pixels" else 1  # the network's are in [-1, 1], twice as far apart as in [0, 1]
        if noise == "pixels" and self.vae is not None:
            if not 0 < sigma < math.inf:
                raise ValueError(f"sigma must be positive and finite, got {sigma}")
            return lambda pixels, draws: self.energy_model(self.encode(pixels + in_pixels * sigma * draws), 0).logits
        alphas_cumprod = self.energy_model.alphas_cumprod.cpu().double()
        ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()  # sigma_t / alpha_t
        lowest, highest = (float(ratio) / in_pixels for ratio in (ratios[0], ratios[-1]))
        if not lowest <= sigma <= highest:
            raise ValueError(f"sigma must be in [{lowest:.3g}, {highest:.4g}], the network's noise levels, got {sigma}")
        ratio = in_pixels * sigma
        timestep = float(timesteps_at(alphas_cumprod, torch.tensor([ratio]).log()))
        alpha = 1 / math.hypot(1, ratio)
        return lambda clean, draws: self.energy_model(alpha * (clean + ratio * draws), timestep).logits

    def _num_classes(self) -> int:
        """K. Raises ValueError for a model without classes."""
        num_classes = self.energy_model.config.num_classes
        if num_classes is None:
            raise ValueError("this model was trained without classes, it cannot classify")
        return num_classes

    def _check_levels(self, timesteps: int | Sequence[int] | None, num_noise_samples: int) -> list[int]:
        """The timesteps to noise latents to. Raises ValueError where they or their number of samples do not fit."""
        if not isinstance(num_noise_samples, int) or num_noise_samples < 1:
            raise ValueError(f"num_noise_samples must be an integer of at least 1, got {num_noise_samples!r}")
        if timesteps is None:
            if num_noise_samples != 1:
                raise ValueError(f"num_noise_samples={num_noise_samples} needs timesteps, got None")
            return []
        levels = [timesteps] if isinstance(timesteps, int) else list(timesteps)
        num_timesteps = self.energy_model.config.num_train_timesteps
        if not levels or not all(isinstance(t, int) and 0 <= t < num_timesteps for t in levels):
            raise ValueError(f"timesteps must be integers in [0, {num_timesteps}), got {timesteps!r}")
        return levels


# latent_egc/methods/composition.py
"""Composition: AND, OR and NOT of one network's classes, and of two networks.

With p = p(y | z, t), the classifier at the null label, S a set of classes, and a scale w on each:

    all of S      -w sigma_t sum over S of log p(y)
    any of S      -w sigma_t log sum over S of p(y)
    none of S     -w sigma_t log[ (1 - d) (1 - sum over S of p(y)) + d ]

are terms to be added to a potential of the same network, and share its forward pass. At w = 1 the second is exact: with
the energy it is -sigma_t times the log of the joint summed over S. The third is bounded, between 0 and w sigma_t
log(1 / d): its factor on the density is at most 1, so that what is composed stays a density, and at least d^w, so that
no latents are forbidden for good. (+w sigma_t log p(y), the negated guidance, is neither: it rewards without end
whatever the classifier is surest of not being y.)

Of two networks on one latent space, whose energies each have a constant of their own:

    U_1 + U_2                                                         both: the product of their densities at t
    -sigma_t log[ exp(-U_1 / sigma_t) + exp(v - U_2 / sigma_t) ]      either: their mixture; v sets the constants right

The product of noised densities is not the noised product, except at no noise: its score is not that of any diffusion,
and a sampler that only follows it ends elsewhere. What a corrector samples at each level is the product at that level,
down to the product of the clean densities. The same holds for `all of`, and for any w other than 1; mixtures commute
with noise, and `any of` and `none of` are mixtures at w = 1. Source: Du et al. (ICML 2023, arXiv 2302.11552).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin


NEGATION_FLOOR = 1e-4  # d


def all_classes(model: ModelMixin, class_ids: Sequence[int], scale: float) -> Potential:
    """-scale sigma_t times the sum of log p(y | z, t) over `class_ids`; free beside what reads the null label."""
    return _class_term(model, class_ids, scale, lambda chosen, others: chosen.sum(dim=1))


def any_class(model: ModelMixin, class_ids: Sequence[int], scale: float) -> Potential:
    """-scale sigma_t times the log of the sum of p(y | z, t) over `class_ids`; free as `all_classes` is."""
    return _class_term(model, class_ids, scale, lambda chosen, others: chosen.logsumexp(dim=1))


def no_class(model: ModelMixin, class_ids: Sequence[int], scale: float) -> Potential:
    """-scale sigma_t log[(1 - d) (1 - the sum of p(y | z, t) over `class_ids`) + d]; free as the others are.

    1 - p is summed from the other classes' probabilities, so that its gradient is right where p rounds to 1.
    """

    def log_factor(chosen: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        floor = others.new_tensor(math.log(NEGATION_FLOOR))
        return torch.logaddexp(math.log1p(-NEGATION_FLOOR) + others.logsumexp(dim=1), floor)

    return _class_term(model, class_ids, scale, log_factor)


def _class_term(
    model: ModelMixin,
    class_ids: Sequence[int],
    scale: float,
    log_factor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Potential:
    """-scale sigma_t log_factor, a function of log p(y | z, t) of the classes that are meant, (N, S), and others."""
    num_classes = model.config.num_classes or 0
    chosen = sorted(set(class_ids))
    others = [i for i in range(num_classes) if i not in chosen]
    if not chosen or not others or len(chosen) + len(others) != num_classes:
        raise ValueError(f"class_ids must be some, but not all, of 0 to {num_classes - 1}, got {list(class_ids)}")

    def value(read: Lookup, sigma: torch.Tensor) -> torch.Tensor:
        log_p = F.log_softmax(read(model, None).logits, dim=-1)
        return -scale * sigma * log_factor(log_p[:, chosen], log_p[:, others])

    return Potential([(model, None)], value)


def either_of(first: Potential, second: Potential, log_weight: float | Callable[[torch.Tensor], float]) -> Potential:
    """OR of two networks: -sigma_t log[exp(-U_1 / sigma_t) + exp(log_weight - U_2 / sigma_t)].

    One forward pass a network. (AND is first + second.)

    Args:
        first, second: potentials of networks with the same noise schedule and latent space.
        log_weight: v, which says how much of the second there is, and balances the constants of the two energies, that
            training does not fix; or a function from sigma_t (N,) to it, as those constants differ by noise level.
    """

    def value(read: Lookup, sigma: torch.Tensor) -> torch.Tensor:
        shift = log_weight(sigma) if callable(log_weight) else log_weight
        one, other = (-potential.value(read, sigma) / sigma for potential in (first, second))
        return -sigma * torch.logaddexp(one, other + shift)

    return Potential([*first.readings, *second.readings], value)


# latent_egc/pipelines/composition.py
"""Sampling what classes and networks have in common, in either of them, or not."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch



CLASS_TERMS = {"all_of": all_classes, "any_of": any_class, "none_of": no_class}


def epsilon_of(potential: Potential) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """From noisy latents and a timestep to the potential's gradient: one forward and one backward pass."""
    return lambda noisy_latents, timestep: input_gradient(potential, noisy_latents, timestep)[0]


class ComposingPipeline(EnergyPipeline):
    """An `EnergyPipeline` that samples AND, OR and NOT of its classes, and potentials of several networks."""

    # For who has a pipeline by the code in its folder, and no latent_egc to import them from.
    Corrector = Corrector
    either_of = staticmethod(either_of)

    def composed_potential(
        self,
        all_of: ClassLabels | None = None,
        any_of: ClassLabels | None = None,
        none_of: ClassLabels | None = None,
        guidance_scale: float | None = None,
    ) -> Potential:
        """The energy without labels, and the classifier's terms for classes; `__call__` samples its density.

        Whatever is asked for, one gradient of it is one forward and one backward pass of N rows. Of two networks on the
        same latent space, `first + second` is what both say, and `either_of(first, second, log_weight)` their mixture:

            both = digits.composed_potential(any_of=["3", "8"]) + other.composed_potential()
            images = digits(potential=both, num_images_per_label=8, corrector="mala").images

        Args:
            all_of: ids or names, one or many: the classes that an image is to be of at once, each p(y | z) a factor.
            any_of: of which it is to be one; exactly the summed joint at scale 1.
            none_of: of which it is to be none; the factor is bounded, see `latent_egc/methods/composition.py`.
            guidance_scale: the power of these factors, positive. None: the value stored with the pipeline.

        Raises:
            ValueError: naming the argument, an unknown class, a model without classes, all classes in one, a class that
                is wanted and not, or a scale that is not positive or given without classes.
        """
        named = {"all_of": all_of, "any_of": any_of, "none_of": none_of}
        ids = {
            name: label_ids(classes, self.id2label, name).tolist()
            for name, classes in named.items()
            if classes is not None
        }
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        elif not ids:
            raise ValueError(f"guidance_scale={guidance_scale} needs classes in all_of, any_of or none_of, got none")
        if not 0 < guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be finite and positive, got {guidance_scale}")
        for name in ("all_of", "any_of"):
            contradiction = set(ids.get(name, ())) & set(ids.get("none_of", ()))
            if contradiction:
                raise ValueError(f"none_of excludes classes of {name}: {[self.id2label[i] for i in contradiction]}")
        potential = energy_potential(self.energy_model)
        for name, classes in ids.items():
            if len(set(classes)) == len(self.id2label):
                raise ValueError(f"{name} must leave out a class, got all {len(self.id2label)}")
            potential = potential + CLASS_TERMS[name](self.energy_model, classes, guidance_scale)
        return potential

    def compose(
        self,
        all_of: ClassLabels | None = None,
        any_of: ClassLabels | None = None,
        none_of: ClassLabels | None = None,
        num_images: int = 1,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> Any:
        """Samples images of all, any or none of some classes.

            pipeline.compose(all_of=["3", "8"], num_images=8, corrector="mala").images

        A step costs one forward and one backward pass, a corrector what `Corrector` says on top.

        Args:
            all_of, any_of, none_of, guidance_scale: as for `composed_potential`.
            num_images: how many.
            options: `num_inference_steps`, `corrector`, `generator` and what else `__call__` takes but labels and
                scales.

        Returns:
            As `__call__`.

        Raises:
            ValueError: as `composed_potential` and `__call__`.
        """
        potential = self.composed_potential(all_of, any_of, none_of, guidance_scale)
        return self(potential=potential, num_images_per_label=num_images, **options)

    def _check_potential(
        self, potential: Potential | None, class_labels: ClassLabels | None, guidance: tuple[Any, ...]
    ) -> None:
        """Raises ValueError for a potential that this pipeline cannot sample, or what cannot be given beside one.

        Args:
            potential: as in `EGCPipeline.__call__`.
            class_labels: likewise.
            guidance: the other arguments of a `Guidance`, in their order.
        """
        if potential is None:
            return
        defaults = {field.name: field.default for field in fields(Guidance)}
        excluded = {"class_labels": class_labels is not None}
        for name, value in zip(list(defaults)[-len(guidance) :], guidance, strict=True):
            excluded[name] = (tuple(value) if isinstance(value, list) else value) != defaults[name]
        for name, given in excluded.items():
            if given:
                raise ValueError(f"potential and {name} exclude each other: what is sampled is the potential's density")
        own = self.energy_model
        for model, _ in potential.readings:
            if model.config.in_channels != own.config.in_channels:
                raise ValueError(
                    f"potential: its networks need one latent space, got {model.config.in_channels} and "
                    f"{own.config.in_channels} channels"
                )
            check_scheduler(self.scheduler, model)


# latent_egc/pipelines/correction.py
"""A corrector between a scheduler's steps: at the noise level that a step has led to, in the network's own scale."""

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin


# What a scheduler starts its next step from in place of the latents that it is given.
OWN_LATENTS = ("last_sample", "cur_sample")


def checked_corrector(
    corrector: Corrector | str | None, scheduler: SchedulerMixin, guidance_rescale: float = 0.0
) -> Corrector | None:
    """A corrector, by its kind with the other values as they are by default, or None.

    Raises:
        ValueError: an unknown kind, a scheduler that would forget a correction, or a rescaled guidance, which is no
            potential's gradient.
    """
    if corrector is None:
        return None
    if guidance_rescale != 0:
        raise ValueError(f"corrector and guidance_rescale={guidance_rescale} exclude each other: no density has it")
    name = type(scheduler).__name__
    if any(hasattr(scheduler, attribute) for attribute in OWN_LATENTS):
        raise ValueError(
            f"corrector: {name} steps from latents of its own memory, and would forget what a corrector did; use "
            "DDIMScheduler, DPMSolverMultistepScheduler or EulerDiscreteScheduler for example"
        )
    return corrector if callable(corrector) else Corrector(corrector)  # type: ignore[arg-type]  # it says which it knows


class Correction:
    """What `EnergyPipeline._denoise` does between the steps of one batch where there is a corrector.

    Args:
        corrector: the chain of each level.
        scheduler: of the call, at the first of its steps.
        noise_levels: alpha_t and sigma_t of a timestep, the energy model's.
        potential_at: from a timestep to the potential whose density is sampled there.
        num_images: N.
        generator: one, or one an image.

    Attributes:
        acceptance_rates: (N, L), of each image at each of L levels from noisy to clean; NaN at a level that was not
            reached, or where a scheduler of second order was in the middle of a step.
    """

    def __init__(
        self,
        corrector: Corrector,
        scheduler: SchedulerMixin,
        noise_levels: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        potential_at: Callable[[torch.Tensor], Potential],
        num_images: int,
        generator: Generators,
    ) -> None:
        self.corrector, self.scheduler, self.generator = corrector, scheduler, generator
        self.noise_levels, self.potential_at = noise_levels, potential_at
        self.step_sizes = torch.full((num_images,), corrector.step_size)
        self.acceptance_rates = torch.full((num_images, len(scheduler.timesteps) - 1), float("nan"))

    def __call__(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Latents (N, C, h, w) in the scheduler's scale after its step of that number -> corrected ones.

        After the last step, which leads to clean latents, they stay as they are.
        """
        level = step + 1
        in_the_middle = not getattr(self.scheduler, "state_in_first_order", True)
        if level == len(self.scheduler.timesteps) or in_the_middle:
            return latents
        timestep = self.scheduler.timesteps[level]
        _, sigma = self.noise_levels(timestep)
        scale = self.scheduler.scale_model_input(torch.ones_like(latents[:1, :1, :1, :1]), timestep)
        corrected, rates = self.corrector(
            self.potential_at(timestep), latents * scale, timestep, sigma, self.step_sizes, self.generator
        )
        self.acceptance_rates[:, step] = rates.float().cpu()
        self.step_sizes = self.corrector.adapted(self.step_sizes, self.acceptance_rates[:, step])
        return corrected / scale


# latent_egc/methods/density.py
"""Energies of all noise levels as one normalised density, which one forward pass then reads.

With x = z / alpha_t, s = sigma_t / alpha_t and d dimensions, the density of x is p_s, that of clean latents blurred by
s, and an energy model of log p_t(z) = -energy / sigma_t - log Z, with one log Z for all t, has

    -log p_s(x) = F + log Z,      F = energy / sigma_t - d log alpha_t
    dF / d log s at fixed x  =  [ -sigma_t^2 <epsilon, z> + d energy / d log s ] / sigma_t - energy alpha_t^2 / sigma_t
                                + d sigma_t^2
    its expectation given x  =  d - |eps|^2,        for d log N(x; x_0, s^2 I) / d log s = |eps|^2 - d

so that what is matched beside epsilon = sigma_t grad_z (energy / sigma_t) is this time score. log Z is found where the
density is nearly a standard normal one, at the highest noise level. Source: Guth et al., "Learning normalized image
densities via dual score matching" (arXiv 2506.05310).
"""

import math
from collections.abc import Callable

import torch


# A timestep -> alpha_t and sigma_t; see `EnergyModel.noise_levels`.
NoiseLevels = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def time_score(
    energy: torch.Tensor,
    epsilon: torch.Tensor,
    energy_by_log_ratio: torch.Tensor,
    noisy_latents: torch.Tensor,
    noise_levels: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """dF / d log s at fixed x, (N,); for latents from N(0, I) it is sigma_t^2 (d - |z|^2).

    Args:
        energy: (N,).
        epsilon: (N, C, h, w), its gradient by z.
        energy_by_log_ratio: (N,), its derivative by log s at fixed z.
        noisy_latents: z, (N, C, h, w).
        noise_levels: alpha_t and sigma_t, (N,) each.
    """
    alpha, sigma = noise_levels
    along_z = (epsilon * noisy_latents).sum(dim=(1, 2, 3))
    num_dimensions = noisy_latents[0].numel()
    return (energy_by_log_ratio - sigma**2 * along_z - alpha**2 * energy) / sigma + num_dimensions * sigma**2


@torch.no_grad()
def estimated_log_normalizer(
    potential: Potential, noise_levels: NoiseLevels, noise: torch.Tensor, timestep: int, batch_size: int
) -> tuple[float, float]:
    """log Z, by importance sampling of the highest noise level against N(0, I), and its standard error.

    Args:
        potential: U(z, t).
        noise_levels: alpha_t and sigma_t of a timestep, the energy model's.
        noise: (M, C, h, w), samples of N(0, I). Costs one forward pass of them.
        timestep: T - 1.
        batch_size: of them at once.
    """
    timestep = torch.tensor(timestep, device=noise.device)
    _, sigma = noise_levels(timestep)
    log_weights = []
    for samples in noise.split(batch_size):
        values, _ = potential(samples, timestep)
        squares = samples.double().square().sum(dim=(1, 2, 3))
        log_weights.append(squares / 2 + noise[0].numel() / 2 * math.log(2 * math.pi) - values.double() / sigma)
    log_weights = torch.cat(log_weights)
    log_mean = log_weights.logsumexp(dim=0) - math.log(len(noise))
    return float(log_mean), float((log_weights - log_mean).exp().std() / math.sqrt(len(noise)))


@torch.no_grad()
def one_pass_log_density(
    potential: Potential, noise_levels: NoiseLevels, noisy_latents: torch.Tensor, timestep: int, log_normalizer: float
) -> torch.Tensor:
    """log p_t(z) = -U / sigma_t - log Z, (N,) float64 in nats: one forward pass.

    Args:
        potential: U(z, t), of a network whose time score was matched.
        noise_levels: alpha_t and sigma_t of a timestep, the energy model's.
        noisy_latents: z, (N, C, h, w), at the timestep.
        timestep: in [0, T).
        log_normalizer: log Z.
    """
    timestep = torch.tensor(timestep, device=noisy_latents.device)
    values, _ = potential(noisy_latents, timestep)
    return -values.double() / noise_levels(timestep)[1].double() - log_normalizer


# latent_egc/methods/likelihood.py
"""The density that an energy's flow gives its latents, by the probability-flow ODE.

With x = z / alpha_t and s = sigma_t / alpha_t the flow of the noise is dx/ds = epsilon, along which the log density
changes by -div_x epsilon. Integrated from the lowest noise level to the highest, where z is taken to be N(0, I),

    log p(x_0) = log N(x_T; 0, I / alpha_T^2) + integral of div_x epsilon ds

with Hutchinson's estimate v^T (d epsilon / dx) v of the divergence, whose expectation over random signs v it is. Two
errors come with it: the solver's, from half as many steps, and that of the trace, from several v.
Source: Song et al. (ICLR 2021), in the variables of Karras et al. (NeurIPS 2022).
"""

import math
from typing import NamedTuple

import torch




class LogDensity(NamedTuple):
    """A log density (N,) in nats and what is known of its error, (N,) each, float64.

    Args:
        value: the mean over the probes.
        solver_error: value less the one of infinitely many steps, estimated: Heun's error falls with their square.
        trace_error: standard error of that mean.
    """

    value: torch.Tensor
    solver_error: torch.Tensor
    trace_error: torch.Tensor


def epsilon_and_divergences(
    potential: Potential, alpha: float, latents: torch.Tensor, timestep: float, probes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Epsilon at x = latents / alpha, and Hutchinson's estimates of its divergence by x.

    Args:
        potential: U(z, t).
        alpha: alpha_t of the timestep.
        latents: (N, C, h, w) = alpha x, noisy latents at the timestep.
        timestep: in [0, T).
        probes: (P, N, C, h, w) of zero mean and unit covariance, such as random signs.

    Returns:
        (N, C, h, w) and (P, N).
    """
    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        epsilon, _ = input_gradient(potential, latents, torch.tensor(timestep, device=latents.device))
        products = [torch.autograd.grad(epsilon, latents, probe, retain_graph=True)[0] for probe in probes]
    return epsilon.detach(), alpha * (torch.stack(products) * probes).sum(dim=(2, 3, 4))


def timestep_grid(alphas_cumprod: torch.Tensor, num_steps: int) -> list[float]:
    """num_steps + 1 timesteps from 0 to T - 1, evenly in log(sigma / alpha); alphas_cumprod (T,)."""
    abar = alphas_cumprod.double().cpu()
    log_ratio = 0.5 * (torch.log1p(-abar) - abar.log())
    levels = torch.linspace(log_ratio[0], log_ratio[-1], num_steps + 1, dtype=torch.float64)
    return timesteps_at(alphas_cumprod, levels).tolist()


def log_density(
    potential: Potential,
    noise_levels: NoiseLevels,
    alphas_cumprod: torch.Tensor,
    noisy_latents: torch.Tensor,
    probes: torch.Tensor,
    num_steps: int,
) -> LogDensity:
    """log p_0 of latents at timestep 0, with its errors.

    Costs 1.5 num_steps steps of Heun's method, for it is solved twice; a step is two forward and backward passes, and
    for each probe one more backward pass through the second of them.

    Args:
        potential: U(z, t).
        noise_levels, alphas_cumprod: the energy model's.
        noisy_latents: (N, C, h, w) = alpha_0 z_0 + sigma_0 noise.
        probes: (P, N, C, h, w), random signs for Hutchinson's estimates, P at least 2.
        num_steps: at least 2.
    """
    half = -(-num_steps // 2)
    fine, coarse = (
        solved_log_densities(potential, noise_levels, noisy_latents, probes, timestep_grid(alphas_cumprod, steps))
        for steps in (num_steps, half)
    )
    solver_error = (coarse - fine).mean(dim=0) / ((num_steps / half) ** 2 - 1)  # of a method of second order
    return LogDensity(fine.mean(dim=0), solver_error, fine.std(dim=0) / math.sqrt(len(probes)))


@torch.no_grad()
def solved_log_densities(
    potential: Potential,
    noise_levels: NoiseLevels,
    noisy_latents: torch.Tensor,
    probes: torch.Tensor,
    timesteps: list[float],
) -> torch.Tensor:
    """log p_0 of latents at timestep 0 by each probe, (P, N) float64 in nats.

    The flow is solved by Heun's method in s, where it is nearly straight at high noise; the divergence is integrated by
    the trapezoidal rule in log s, where s div is nearly constant there. On Gaussian latents 20 steps give 0.018 and 40
    steps 0.005 bits per dimension too much.

    Args:
        potential: U(z, t).
        noise_levels: alpha_t and sigma_t of a timestep, the energy model's.
        noisy_latents: (N, C, h, w) = alpha_0 z_0 + sigma_0 noise.
        probes: (P, N, C, h, w), random signs for Hutchinson's estimates.
        timesteps: from `timestep_grid`; each step between them costs one gradient and the divergences.
    """
    levels = [noise_levels(torch.tensor(t, device=noisy_latents.device)) for t in timesteps]
    alphas, ratios = zip(*((float(alpha), float(sigma / alpha)) for alpha, sigma in levels), strict=True)
    x = noisy_latents / alphas[0]
    epsilon, divergences = epsilon_and_divergences(potential, alphas[0], noisy_latents, timesteps[0], probes)
    integrals = torch.zeros(probes.shape[:2], dtype=torch.float64, device=x.device)
    for i in range(len(timesteps) - 1):
        step, half_log_step = ratios[i + 1] - ratios[i], math.log(ratios[i + 1] / ratios[i]) / 2
        integrals += half_log_step * ratios[i] * divergences.double()
        later = torch.tensor(timesteps[i + 1], device=x.device)
        ahead, _ = input_gradient(potential, alphas[i + 1] * (x + step * epsilon), later)
        x = x + step * (epsilon + ahead) / 2
        epsilon, divergences = epsilon_and_divergences(
            potential, alphas[i + 1], alphas[i + 1] * x, timesteps[i + 1], probes
        )
        integrals += half_log_step * ratios[i + 1] * divergences.double()
    num_dimensions, variance = x[0].numel(), alphas[-1] ** -2
    prior = -x.double().square().sum(dim=(1, 2, 3)) / (2 * variance)
    prior -= num_dimensions / 2 * math.log(2 * math.pi * variance)
    # The density of alpha x, not of x.
    return prior + integrals - num_dimensions * math.log(alphas[0])


# latent_egc/pipelines/density.py
"""The density of images: by the flow of the energy, with an error, or where it was trained for it, in one pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor




@dataclass
class EGCDensityOutput(BaseOutput):
    """The density of the latents of N images, noised to timestep 0: float64, on the CPU.

    Args:
        log_density: (N,), natural logarithm.
        bits_per_dimension: (N,), -log2 of the density over the number of dimensions; low = likely. Of continuous
            values, so that it may be negative, and does not compare with another autoencoder's.
        solver_error: (N,) in nats, what log_density is too much because the ODE was solved in finite steps, estimated;
            None for method "one_pass".
        trace_error: (N,) in nats, the standard error from the random estimates of the divergence; None likewise.
    """

    log_density: torch.Tensor
    bits_per_dimension: torch.Tensor
    solver_error: torch.Tensor | None = None
    trace_error: torch.Tensor | None = None


class DensityPipeline(EnergyPipeline):
    """Reads densities off the energy; see `methods/likelihood.py` and `methods/density.py`."""

    @torch.no_grad()
    def log_density(
        self,
        images: PipelineImageInput,
        method: Literal["ode", "one_pass"] = "ode",
        *,
        class_labels: ClassLabels | None = None,
        num_steps: int = 40,
        num_probes: int = 4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
    ) -> EGCDensityOutput:
        """log p of the images' latents, which are noised to timestep 0 first.

        Args:
            images: as in `preprocess_images`: PIL, numpy or torch, one or many, of any size.
            method: "ode", the probability-flow ODE of any network: 3 num_steps forward and backward passes, and for
                each probe 1.5 num_steps backward passes through the backward ones. Or "one_pass", one forward pass, for
                a network that was trained with `objective.time_score_weight`.
            class_labels: ids or names, one for all images or one each: log p(z | c) instead of log p(z), by the ODE of
                a network with a class embedding.
            num_steps: of Heun's method, at least 2; solved again with half as many for the error.
            num_probes: random estimates of the divergence an image, at least 2.
            generator: of the noise and the probes; one for all images, or one each (an image then does not depend on
                its batch).
            batch_size: images at once; None: what memory surely holds, by their size.

        Raises:
            ValueError: an unknown method, "one_pass" with a network that was not trained for it or with labels, labels
                without class embedding, or another argument out of range, by name.
        """
        model, device = self.energy_model, self._execution_device
        pixel_values = preprocess_images(images, self.image_size)
        num_images = len(pixel_values)
        labels = self._check_density(method, class_labels, num_steps, num_probes, batch_size, num_images)
        check_start(generator, None, num_images, (None, None))
        batch_size = batch_size or self._default_image_batch_size()
        starts = range(0, num_images, batch_size)
        found: list[Sequence[torch.Tensor]] = []
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            rows = slice(start, start + batch_size)
            latents = self.encode(pixel_values[rows].to(device))
            latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
            own = generator[rows] if isinstance(generator, list) else generator
            noise = partial(randn_tensor, latents.shape, own, device, latents.dtype)
            noisy_latents = add_noise(latents, noise(), model.noise_levels(torch.tensor(0, device=device)))
            potential = energy_potential(model, None if labels is None else labels[rows].to(device))
            if method == "one_pass":
                constant = self.config.log_normalizer
                found.append([one_pass_log_density(potential, model.noise_levels, noisy_latents, 0, constant)])
            else:
                probes = torch.stack([noise().sign() for _ in range(num_probes)])
                levels = model.noise_levels, model.alphas_cumprod
                found.append(log_density(potential, *levels, noisy_latents, probes, num_steps))
        self.maybe_free_model_hooks()
        value, *errors = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        bits = -value / (latents[0].numel() * math.log(2))
        return EGCDensityOutput(value, bits, *errors)

    @torch.no_grad()
    def fit_log_normalizer(self, num_samples: int = 1024) -> tuple[float, float]:
        """Estimates log Z at the highest noise level and keeps it with the pipeline; training with the time score does.

        For a network that was trained with `objective.time_score_weight`: of another its energies are not one density,
        whatever this finds.

        Args:
            num_samples: of N(0, I), each one forward pass of a row; they are the same every time.

        Returns:
            log Z in nats and its standard error.
        """
        model = self.energy_model
        config, device = model.config, self._execution_device
        shape = (num_samples, config.in_channels, config.sample_size, config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        last, batch_size = config.num_train_timesteps - 1, self._default_batch_size()
        value, error = estimated_log_normalizer(energy_potential(model), model.noise_levels, noise, last, batch_size)
        self.maybe_free_model_hooks()
        self.register_to_config(log_normalizer=value)
        return value, error

    def _check_density(
        self,
        method: str,
        class_labels: ClassLabels | None,
        num_steps: int,
        num_probes: int,
        batch_size: int | None,
        num_images: int,
    ) -> torch.Tensor | None:
        """Raises ValueError as `log_density`; returns the labels, (N,) int64, or None."""
        if method not in ("ode", "one_pass"):
            raise ValueError(f"method must be 'ode' or 'one_pass', got {method!r}")
        for name, count, fewest in (("num_steps", num_steps, 2), ("num_probes", num_probes, 2)):
            if not isinstance(count, int) or count < fewest:
                raise ValueError(f"{name} must be at least {fewest}, got {count!r}")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if method == "one_pass" and self.config.log_normalizer is None:
            raise ValueError(
                "method='one_pass' needs a network that was trained with objective.time_score_weight above 0: this "
                "pipeline has log_normalizer=None; method='ode' works with every network"
            )
        labels = self.label_ids(class_labels)
        if labels is None:
            return None
        if method == "one_pass":
            raise ValueError("method='one_pass' gives log p(z) without class_labels: log Z is that of the null label")
        if not self.energy_model.config.class_embedding:
            raise ValueError("class_labels need a model with class embedding, the density of this one sees no label")
        if len(labels) not in (1, num_images):
            raise ValueError(f"class_labels must be one or {num_images}, got {len(labels)}")
        return labels.expand(num_images)


# latent_egc/methods/editing.py
"""Editing by the probability flow: images to noise and back without chance, between two images, and near to one.

Between two noise levels DDIM moves latents, up as well as down, by

    z' = alpha' (z - sigma epsilon) / alpha + sigma' epsilon

Down, epsilon is read where the step starts. Its exact inverse reads it where the step up ends, which is found by a
fixed-point iteration. Source: Song et al. (ICLR 2021); Pan et al. (ICCV 2023, arXiv 2309.04907).
"""

from collections.abc import Callable, Iterable

import torch


# Noisy latents (N, C, h, w) and a timestep, a 0-d tensor, to epsilon.
EpsilonAt = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ddim_step(
    latents: torch.Tensor,
    epsilon: torch.Tensor,
    noise_levels: tuple[torch.Tensor | float, torch.Tensor | float],
    next_noise_levels: tuple[torch.Tensor | float, torch.Tensor | float],
) -> torch.Tensor:
    """Latents (N, C, h, w) from one noise level, alpha and sigma, to another, lower or higher, along epsilon."""
    (alpha, sigma), (next_alpha, next_sigma) = noise_levels, next_noise_levels
    return next_alpha * (latents - sigma * epsilon) / alpha + next_sigma * epsilon


def ddim_inversion(
    epsilon_at: EpsilonAt,
    noise_levels: NoiseLevels,
    latents: torch.Tensor,
    timesteps: Iterable[torch.Tensor],
    num_refinements: int = 1,
) -> torch.Tensor:
    """The noisy latents from which DDIM comes back to clean ones.

    Without refinement epsilon is read where a step starts, at the timestep where it ends: the usual DDIM inversion.
    Each refinement reads it again where the step was found to end.

    Args:
        epsilon_at: is asked 1 + `num_refinements` times a timestep.
        noise_levels: alpha_t and sigma_t of a timestep, the energy model's.
        latents: (N, C, h, w), clean and scaled.
        timesteps: ascending; those of DDIM, backwards.
        num_refinements: of each step, at least 0.

    Returns:
        (N, C, h, w) at the last of the timesteps.
    """
    levels = (1.0, 0.0)
    for timestep in timesteps:
        next_levels, end = noise_levels(timestep), latents
        for _ in range(1 + num_refinements):
            end = ddim_step(latents, epsilon_at(end, timestep), levels, next_levels)
        latents, levels = end, next_levels
    return latents


def slerp(first: torch.Tensor, second: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of each row with its partner: directions along the arc, lengths along the line.

    Along the line noise would become shorter than noise is. Rows whose directions are the same or opposite have no
    arc, and are interpolated along the line.

    Args:
        first, second: (N, C, h, w).
        shares: (M,) in [0, 1], of the second.

    Returns:
        (N, M, C, h, w).
    """
    shares = shares.to(first)[:, None, None, None]
    lengths = [rows.flatten(1).norm(dim=1)[:, None, None, None, None] for rows in (first, second)]
    a, b = (rows[:, None] / length for rows, length in zip((first, second), lengths, strict=True))
    angle = (a * b).sum(dim=(2, 3, 4), keepdim=True).clamp(-1, 1).acos()
    arc = (((1 - shares) * angle).sin() * a + (shares * angle).sin() * b) / angle.sin()
    line = (1 - shares) * first[:, None] + shares * second[:, None]
    return torch.where(angle.sin() > 1e-3, torch.lerp(lengths[0], lengths[1], shares) * arc, line)


def held_near(
    epsilon: torch.Tensor,
    noisy_latents: torch.Tensor,
    noise_levels: tuple[torch.Tensor, torch.Tensor],
    original: torch.Tensor,
    distance_scale: float,
) -> torch.Tensor:
    """Epsilon with the gradient of a potential of the distance from clean latents to an original.

        U(z_t) = sigma_t |z_0' - original|^2 / (2 (sigma_t^2 + 1 / distance_scale))
        z_0' = (z_t - sigma_t epsilon) / alpha_t

    which is -sigma_t log p(original | z_t) of an original seen under noise of variance 1 / distance_scale, where z_0 is
    known from z_t up to the variance sigma_t^2. d z_0' / d z_t is taken to be alpha_t: both hold for data of unit
    variance, and no second derivative is needed. However large the scale, z_0' is not pulled beyond the original.
    Source: pseudoinverse-guided diffusion, Song et al. (ICLR 2023).

    Args:
        epsilon: (N, C, h, w), with whatever guidance.
        noisy_latents: (N, C, h, w).
        noise_levels: alpha and sigma.
        original: (N, C, h, w), clean and scaled.
        distance_scale: at least 0; 0 changes nothing.
    """
    alpha, sigma = noise_levels
    clean = (noisy_latents - sigma * epsilon) / alpha
    return epsilon + distance_scale * alpha * sigma / (1 + distance_scale * sigma**2) * (clean - original)


# latent_egc/pipelines/editing_steps.py
"""What the ways of editing share: images to latents and back, guidance of many rows, DDIM up to noise and down."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines import ImagePipelineOutput




@dataclass(frozen=True)
class EditingGuidance:
    """What rows shall become, (N,) int64 or None, and by how much; see `EGCPipeline.__call__`."""

    labels: torch.Tensor | None
    scale: float
    classifier_free_scale: float
    interval: tuple[float, float]

    def of(self, rows: slice | torch.Tensor) -> "EditingGuidance":
        """The guidance of some of the rows."""
        return self if self.labels is None else replace(self, labels=self.labels[rows])


class EditingSteps(EnergyPipeline):
    """The steps of `EditingPipeline`; `EGCPipeline` gives it a step's `_guided_epsilon`, and `classify`."""

    def _begin(
        self,
        images: PipelineImageInput,
        output_type: str,
        num_inference_steps: int,
        batch_size: int | None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """Images to scaled latents (N, C, h, w) on the device, at least float32, once the arguments fit."""
        check_strength(strength)
        check_counts(1, num_inference_steps, batch_size, self.energy_model.config.num_train_timesteps)
        self._check_outputs(output_type, ())
        pixel_values = preprocess_images(images, self.image_size)
        dtype = torch.promote_types(self.energy_model.dtype, torch.float32)
        parts = pixel_values.split(batch_size or self._default_image_batch_size())
        return torch.cat([self.encode(part.to(self._execution_device)).to(dtype) for part in parts])

    def _editing_guidance(
        self,
        num_images: int,
        class_labels: ClassLabels | None = None,
        guidance_scale: float | None = None,
        classifier_free_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> EditingGuidance:
        """Labels for all images, one or one each, and scales; without labels and scale unguided."""
        labels = self.label_ids(class_labels)
        if guidance_scale is None:
            guidance_scale = 0.0 if labels is None else self.config.default_guidance_scale
        check_scales(self.energy_model, labels, guidance_scale, classifier_free_scale)
        check_interval(guidance_interval)
        if labels is not None:
            if len(labels) not in (1, num_images):
                raise ValueError(f"class_labels must be one or one for each of {num_images} images, got {len(labels)}")
            labels = labels.expand(num_images).to(self._execution_device)
        return EditingGuidance(labels, guidance_scale, classifier_free_scale, guidance_interval)

    def _guided(self, call: EnergyPipeline, guidance: EditingGuidance) -> Callable[..., torch.Tensor]:
        """What gives a call's steps their epsilon."""
        call._guidance_scale = self._guidance_scale = guidance.scale
        return call._guided_epsilon(guidance.labels, guidance.classifier_free_scale, guidance.interval)

    def _in_batches(
        self, edited: Callable[[slice], torch.Tensor], num_images: int, batch_size: int | None
    ) -> torch.Tensor:
        """(num_images, ...) from a function of rows, for so many at once as memory surely holds."""
        size = batch_size or self._default_batch_size()
        return torch.cat([edited(slice(start, start + size)) for start in range(0, num_images, size)])

    def _ddim(self, num_inference_steps: int, strength: float) -> tuple["EditingSteps", torch.Tensor]:
        """A call that goes by DDIM, whatever the pipeline's scheduler, and the descending timesteps that it goes."""
        call = self._own_call()
        call.scheduler = default_scheduler(self.energy_model)
        call.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps = last_timesteps(call.scheduler, num_inference_steps, strength)
        call._num_timesteps = self._num_timesteps = len(timesteps)
        return call, timesteps

    def _up(
        self,
        latents: torch.Tensor,
        guidance: EditingGuidance,
        num_inference_steps: int,
        strength: float,
        batch_size: int | None,
        num_refinements: int = 1,
    ) -> torch.Tensor:
        """Clean latents (N, C, h, w) to those at a share of the noise levels from which `_down` comes back to them."""

        def inverted(rows: slice) -> torch.Tensor:
            call, timesteps = self._ddim(num_inference_steps, strength)
            epsilon_at, ascending = self._guided(call, guidance.of(rows)), self.progress_bar(timesteps.flip(0))
            levels = self.energy_model.noise_levels
            return ddim_inversion(epsilon_at, levels, latents[rows], ascending, num_refinements)

        return self._in_batches(inverted, len(latents), batch_size)

    def _down(
        self,
        noisy_latents: torch.Tensor,
        guidance: EditingGuidance,
        num_inference_steps: int,
        strength: float,
        batch_size: int | None,
        held: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        """Latents (N, C, h, w) from there to clean ones; `held` near to others (N, C, h, w) by a `distance_scale`."""

        def denoised(rows: slice) -> torch.Tensor:
            call, timesteps = self._ddim(num_inference_steps, strength)
            epsilon_at = self._guided(call, guidance.of(rows))

            def held_epsilon_at(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                epsilon, levels = epsilon_at(latents, timestep), self.energy_model.noise_levels(timestep)
                return held_near(epsilon, latents, levels, held[0][rows], held[1])

            return call._denoise(
                noisy_latents[rows], epsilon_at if held is None else held_epsilon_at, {}, timesteps=timesteps
            )

        return self._in_batches(denoised, len(noisy_latents), batch_size)

    def _decode_to_unit_range(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents to images (N, 3, H, W) in [0, 1], float32."""
        return (self._decode_in_slices(latents) / 2 + 0.5).clamp(0, 1)

    def _finish(
        self, latents: torch.Tensor, output_type: str, return_dict: bool, images: torch.Tensor | None = None
    ) -> ImagePipelineOutput | tuple:
        """What a call returns, of latents or of images (N, 3, H, W) in [0, 1] that were made of them."""
        result: Any = latents
        if output_type != "latent":
            images = self._decode_to_unit_range(latents) if images is None else images
            unchanged = [False] * len(images)
            result = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=unchanged)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)


# latent_egc/pipelines/counterfactual.py
"""Counterfactuals: the smallest change of an image after which the classifier says another class."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput



@dataclass
class EGCCounterfactualOutput(BaseOutput):
    """N images, changed until the classifier says another class, and how far they are from what they were.

    Distances are l2, of the pixels with values in [0, 1]. The pixels' holds what the autoencoder alone changes, which
    is given beside it. Whether another classifier agrees is not known here: the suite `counterfactual` asks one.

    Args:
        images: as the call's `output_type` says.
        labels_before: what the classifier says of the originals.
        labels_asked: what it shall say.
        labels_after: what it says of the images, decoded and encoded again.
        flipped: (N,) bool, whether it says what was asked for now and did not before.
        guidance_scales: (N,), with which each was made.
        latent_distance: (N,) between the originals' latents and those that were decoded.
        pixel_distance: (N,) between the originals and the images.
        autoencoder_distance: (N,) between the originals and these through the autoencoder; 0 in pixel space.
    """

    images: Any
    labels_before: list[str]
    labels_asked: list[str]
    labels_after: list[str]
    flipped: torch.Tensor
    guidance_scales: torch.Tensor
    latent_distance: torch.Tensor
    pixel_distance: torch.Tensor
    autoencoder_distance: torch.Tensor


class Counterfactuals(EditingSteps):
    """One way of editing; see `EditingPipeline`."""

    @torch.no_grad()
    def counterfactual(
        self,
        images: PipelineImageInput,
        class_labels: ClassLabels | None = None,
        strength: float = 0.8,
        distance_scale: float = 0.3,
        guidance_scale: float | None = None,
        num_doublings: int = 4,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        batch_size: int | None = None,
    ) -> EGCCounterfactualOutput:
        """The smallest change that is found after which the classifier says another class. No chance in it.

        As `edit_class`, with a potential that holds the image near to the original (`methods.editing.held_near`). The
        weakest guidance that flips it is taken: the scale is doubled for the images that have not flipped.
        (3 + num_doublings) * strength * num_inference_steps network passes at most, and 2 + num_doublings forward
        passes of the classifier.

        Args:
            images: one or many.
            class_labels: what the classifier shall say; None: what is second to it now.
            strength: the share of the way to noise, in [0, 1].
            distance_scale: how strongly it is held near; 0 is not at all.
            guidance_scale: the first one that is tried, above 0; None: the one stored with the pipeline.
            num_doublings: how often it is doubled at most.
            num_inference_steps: of DDIM, for the whole way.
            output_type, batch_size: as for `image_to_image`.

        Returns:
            `EGCCounterfactualOutput`, its tensors on the CPU. Images that never flipped are those of the last scale.

        Raises:
            ValueError: an argument that does not fit, by name, or a model without classes.
        """
        if not (distance_scale >= 0 and math.isfinite(distance_scale)):
            raise ValueError(f"distance_scale must be finite and not negative, got {distance_scale}")
        if not isinstance(num_doublings, int) or num_doublings < 0:
            raise ValueError(f"num_doublings must be at least 0, got {num_doublings!r}")
        original = self._begin(images, output_type, num_inference_steps, batch_size, strength)
        pixels = crop_images(images, self.image_size).float().cpu()
        before = self.classify(pixels, batch_size=batch_size).logits
        asked = before.topk(2).indices[:, 1] if class_labels is None else class_labels
        guidance = self._editing_guidance(len(original), asked, guidance_scale)
        asked, before = guidance.labels.cpu(), before.argmax(dim=1)
        unguided = self._editing_guidance(len(original))
        noise = self._up(original, unguided, num_inference_steps, strength, batch_size)

        autoencoder_distance = l2_distance(self._decode_to_unit_range(original).cpu(), pixels)
        edited, found, after = original.clone(), torch.empty_like(pixels), before.clone()
        scales, left = torch.zeros(len(original)), torch.arange(len(original))
        for doubling in range(num_doublings + 1):
            stronger = replace(guidance.of(left), scale=guidance.scale * 2**doubling)
            edited[left] = self._down(
                noise[left], stronger, num_inference_steps, strength, batch_size, (original[left], distance_scale)
            )
            found[left] = self._decode_to_unit_range(edited[left]).cpu()
            after[left] = self.classify(found[left], batch_size=batch_size).logits.argmax(dim=1)
            scales[left] = stronger.scale
            left = left[after[left] != asked[left]]
            if len(left) == 0:
                break

        names = self.id2label
        return EGCCounterfactualOutput(
            images=self._finish(edited, output_type, True, found).images,
            labels_before=[names[i] for i in before.tolist()],
            labels_asked=[names[i] for i in asked.tolist()],
            labels_after=[names[i] for i in after.tolist()],
            flipped=(after == asked) & (before != asked),
            guidance_scales=scales,
            latent_distance=l2_distance(edited, original),
            pixel_distance=l2_distance(found, pixels),
            autoencoder_distance=autoencoder_distance,
        )


def l2_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Between the rows of two tensors (N, ...): (N,) on the CPU."""
    return (first - second).flatten(1).norm(dim=1).cpu()


# latent_egc/pipelines/editing.py
"""EditingPipeline: what an energy network does with images that there are already.

Two ways lead from an image to noise. Drawn noise brings variety: `image_to_image` and `inpaint`, by whatever scheduler
the pipeline has. The probability flow's own noise, found by DDIM inversion, brings the image back: `invert`,
`reconstruct`, `interpolate`, `edit_class` and `counterfactual`, by DDIM up and down, whatever the scheduler.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor




class EditingPipeline(Counterfactuals):
    """Edits images.

    Images are as `preprocess_images` takes them, one or many, and come back at the pipeline's `image_size`. Labels are
    one for all images or one each. A network pass is one forward and one backward pass of all images in it; each
    method says how many it takes.
    """

    # --- drawn noise ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def image_to_image(
        self,
        image: PipelineImageInput,
        class_labels: ClassLabels | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        classifier_free_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple:
        """Noises images and denoises them. SDEdit, Meng et al. (ICLR 2022).

        strength * num_inference_steps network passes.

        Args:
            image: one or many; an image is given several times to have it in several forms.
            class_labels: what it shall be; None leaves that open, without guidance.
            strength: how much of the image is given up, in [0, 1]: 0 leaves what the autoencoder makes of it, 1 is
                sampling, from noise alone.
            num_inference_steps: of the whole way from noise; the last share `strength` of them is gone.
            guidance_scale, classifier_free_scale, guidance_interval: as for sampling, see `EGCPipeline.__call__`.
            generator: one for all images, or one an image (an image then does not depend on its batch).
            output_type: "pil", "np", "pt" (images in [0, 1]) or "latent" (scaled latents).
            return_dict: False returns a tuple.
            batch_size: images at once; None: what memory surely holds, by their size.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: an argument that does not fit, by name.
        """
        original = self._begin(image, output_type, num_inference_steps, batch_size, strength)
        guidance = self._editing_guidance(
            len(original), class_labels, guidance_scale, classifier_free_scale, guidance_interval
        )
        edited = self._renoise(original, None, guidance, strength, num_inference_steps, generator, batch_size)
        return self._finish(edited, output_type, return_dict)

    @torch.no_grad()
    def inpaint(
        self,
        image: PipelineImageInput,
        mask_image: Any,
        class_labels: ClassLabels | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        classifier_free_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        paste: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple:
        """Paints anew what a mask marks; before each step the rest is the original, noised to that step.

        strength * num_inference_steps network passes. A latent position is painted anew if the mask marks any of its
        pixels.

        Args:
            image: one or many.
            mask_image: as large as the image, white where it is painted anew; one for all or one each, see
                `crop_masks`.
            class_labels, strength, num_inference_steps: as for `image_to_image`; the strength is that of the marked
                part.
            paste: the pixels that are not marked are those of the image, to the bit, cropped as `crop_images` does;
                else they are what the autoencoder makes of them. Latents are never pasted.
            guidance_scale, classifier_free_scale, guidance_interval, generator, output_type, return_dict, batch_size:
                as for `image_to_image`.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: an argument that does not fit, by name, as a mask of another size than its image.
        """
        masks = crop_masks(mask_image, image, self.image_size)
        original = self._begin(image, output_type, num_inference_steps, batch_size, strength)
        guidance = self._editing_guidance(
            len(original), class_labels, guidance_scale, classifier_free_scale, guidance_interval
        )
        marked = F.max_pool2d(masks.float(), self.vae_scale_factor).to(original.device) > 0
        edited = self._renoise(original, marked, guidance, strength, num_inference_steps, generator, batch_size)
        if not paste or output_type == "latent":
            return self._finish(edited, output_type, return_dict)
        pixels = crop_images(image, self.image_size).to(edited.device, torch.float32)
        pasted = torch.where(masks.to(edited.device), self._decode_to_unit_range(edited), pixels)
        return self._finish(edited, output_type, return_dict, pasted)

    def _renoise(
        self,
        original: torch.Tensor,
        marked: torch.Tensor | None,
        guidance: EditingGuidance,
        strength: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        batch_size: int | None,
    ) -> torch.Tensor:
        """Latents (N, C, h, w), noised and denoised; only those that are `marked` (N, 1, h, w), None: all."""
        check_start(generator, None, len(original), (None, None))
        check_scheduler(self.scheduler, self.energy_model)
        call = self._own_call()
        noise = randn_tensor(original.shape, generator=generator, device=original.device, dtype=original.dtype)

        def denoised(rows: slice) -> torch.Tensor:
            self._set_steps(call, num_inference_steps)
            scheduler, clean, drawn = call.scheduler, original[rows], noise[rows]
            timesteps = last_timesteps(scheduler, num_inference_steps, strength)

            def noised(step: int) -> torch.Tensor:
                """The original, as it stands before a step; clean before the one that there is not."""
                return scheduler.add_noise(clean, drawn, timesteps[step, None]) if step < len(timesteps) else clean

            def with_known(latents: torch.Tensor, step: int) -> torch.Tensor:
                return torch.where(marked[rows], latents, noised(step + 1))

            start = drawn * scheduler.init_noise_sigma if strength == 1 else noised(0)
            of_each = generator[rows] if isinstance(generator, list) else generator
            return call._denoise(
                start if marked is None else with_known(start, -1),
                self._guided(call, guidance.of(rows)),
                step_options(scheduler, of_each, 0.0),
                timesteps=timesteps,
                between=None if marked is None else with_known,
            )

        return self._in_batches(denoised, len(original), batch_size)

    # --- the flow's own noise ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def invert(
        self,
        images: PipelineImageInput,
        num_inference_steps: int = 50,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 0.0,
        num_refinements: int = 1,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """The noise of which images are made: the latents from which DDIM comes back to them.

        (1 + num_refinements) * num_inference_steps network passes. With the same labels, scale and steps,
        `pipeline(latents=...)` with `default_scheduler` gives the images back, up to the autoencoder and to what the
        refinements leave; other schedulers and steps, up to their own error too. There is no chance in it.

        Args:
            images: one or many.
            num_inference_steps: of DDIM.
            class_labels, guidance_scale: along which energy; None and 0: the unguided one's.
            num_refinements: of each step, see `ddim_inversion`; 0 is the usual inversion.
            batch_size: images at once; None: what memory surely holds, by their size.

        Returns:
            (N, C, h, w) at DDIM's highest noise level, nearly standard normal, on the pipeline's device.

        Raises:
            ValueError: an argument that does not fit, by name.
        """
        if not isinstance(num_refinements, int) or num_refinements < 0:
            raise ValueError(f"num_refinements must be at least 0, got {num_refinements!r}")
        original = self._begin(images, "latent", num_inference_steps, batch_size)
        guidance = self._editing_guidance(len(original), class_labels, guidance_scale)
        noise = self._up(original, guidance, num_inference_steps, 1.0, batch_size, num_refinements)
        self.maybe_free_model_hooks()
        return noise

    @torch.no_grad()
    def reconstruct(
        self,
        images: PipelineImageInput,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Images to their noise and back, unguided: what the inversion keeps of them.

        3 * num_inference_steps network passes, two thirds of them up. Arguments, result and errors are those of
        `invert` and `image_to_image`.
        """
        original = self._begin(images, output_type, num_inference_steps, batch_size)
        unguided = self._editing_guidance(len(original))
        noise = self._up(original, unguided, num_inference_steps, 1.0, batch_size)
        edited = self._down(noise, unguided, num_inference_steps, 1.0, batch_size)
        return self._finish(edited, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: PipelineImageInput,
        image_b: PipelineImageInput,
        num_images: int = 8,
        class_labels: ClassLabels | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """From one image to another: the images of the noise between their noises (slerp). No chance in it.

        4 * num_inference_steps network passes of the N pairs' images up, num_inference_steps of all images down.

        Args:
            image_a, image_b: one or many, as many of each.
            num_images: of each pair, at least 2; the first and the last are the pair, reconstructed.
            class_labels: what all images of a pair shall be on the way down; None: unguided, which alone brings the
                pair itself back.
            num_inference_steps: of DDIM.
            guidance_scale: as for sampling.
            output_type, return_dict, batch_size: as for `image_to_image`.

        Returns:
            `ImagePipelineOutput` with N * num_images `images`, pair by pair, or `(images,)`.

        Raises:
            ValueError: an argument that does not fit, by name.
        """
        if not isinstance(num_images, int) or num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {num_images!r}")
        ends = [self._begin(images, output_type, num_inference_steps, batch_size) for images in (image_a, image_b)]
        num_pairs = len(ends[0])
        if len(ends[1]) != num_pairs:
            raise ValueError(f"image_b must be as many images as image_a, {num_pairs}, got {len(ends[1])}")
        guidance, unguided = (
            self._editing_guidance(num_pairs, class_labels, guidance_scale),
            self._editing_guidance(num_pairs),
        )
        guidance = guidance.of(torch.arange(num_pairs).repeat_interleave(num_images))
        first, second = (self._up(latents, unguided, num_inference_steps, 1.0, batch_size) for latents in ends)
        between = slerp(first, second, torch.linspace(0, 1, num_images)).flatten(0, 1)
        edited = self._down(between, guidance, num_inference_steps, 1.0, batch_size)
        return self._finish(edited, output_type, return_dict)

    @torch.no_grad()
    def edit_class(
        self,
        image: PipelineImageInput,
        class_labels: ClassLabels,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """The image as one of another class: to its own noise unguided, and back guided. No chance in it.

        Of its noise comes what the image has besides its class, as its slant and stroke. Unlike `image_to_image` it
        gives the image back where guidance has nothing to change, and unlike `counterfactual` nothing holds it near.
        3 * strength * num_inference_steps network passes.

        Args:
            image: one or many.
            class_labels: what it shall become.
            strength: the share of the way to noise, in [0, 1].
            num_inference_steps: of DDIM, for the whole way.
            guidance_scale: as for sampling.
            output_type, return_dict, batch_size: as for `image_to_image`.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: an argument that does not fit, by name.
        """
        if class_labels is None:
            raise ValueError("edit_class needs class_labels, got None")
        original = self._begin(image, output_type, num_inference_steps, batch_size, strength)
        guidance = self._editing_guidance(len(original), class_labels, guidance_scale)
        unguided = self._editing_guidance(len(original))
        noise = self._up(original, unguided, num_inference_steps, strength, batch_size)
        edited = self._down(noise, guidance, num_inference_steps, strength, batch_size)
        return self._finish(edited, output_type, return_dict)


# latent_egc/pipelines/pipeline_egc.py
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


