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
