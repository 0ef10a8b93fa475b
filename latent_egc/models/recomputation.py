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

from .numerics import is_twice_differentiable, twice_differentiable

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
