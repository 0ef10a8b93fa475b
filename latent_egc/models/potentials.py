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

from .heads import EnergyOutput
from .numerics import twice_differentiable
from .recomputation import only_input_gradients

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
