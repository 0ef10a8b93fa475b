"""A run whose processes each keep a part of every parameter, its gradient, its moments and its average (FSDP2).

The objective is one unit: whole parameters are gathered before its forward, are there for the energy's input gradient
inside it, and are given up after the backward pass of both. Its inputs need no gradient, so that no hook of FSDP2 fires
in the inner gradient. What leaves the run (checkpoints, validation, samples) is whole, and gathering it takes every
process. On whole tensors, so in runs that shard nothing, these functions do nothing.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor

from latent_egc.models import EnergyModel
from latent_egc.objective import EGCObjective


def shard_parameters(objective: EGCObjective, accelerator: Accelerator) -> EGCObjective:
    """Shards an objective's parameters among the processes, in place, instead of `accelerator.prepare`.

    Every process must hold the same weights. Under autocast the objective runs as `accelerator` says, in the precision
    of its inputs: noise cast to bf16 would be another target.
    """
    objective.forward = accelerator.autocast()(objective.forward)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    return fully_shard(objective, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, on every process; a tensor that is not sharded as it is. For every process to call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, where `other` of the same shape is sharded; else the tensor as it is."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def whole_state(
    objective: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of an unwrapped objective and of its optimiser, whole, on the CPU of the main process alone.

    For every process to call; the others get what is empty.
    """
    main = accelerator.is_main_process

    def gathered(values: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in values.items():
            value = whole(value) if isinstance(value, torch.Tensor) else value
            if main:  # one tensor at a time is whole on the device
                found[key] = value.cpu() if isinstance(value, torch.Tensor) else value
        return found

    weights = gathered(objective.state_dict())
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
        return weights, optimizer.state_dict() if main else {}
    state = optimizer.state_dict()
    return weights, state | {"state": {number: gathered(values) for number, values in state["state"].items()}}


def load_whole_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Loads whole weights, which every process has, into a module. Raises RuntimeError: other names or shapes."""
    own = module.state_dict()
    module.load_state_dict({name: placed_as(value, own.get(name, value)) for name, value in weights.items()})


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimiser's whole state, which every process has."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {key: placed_as(value, parameters[number]) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": parts})


def copy_without_weights(model: EnergyModel) -> EnergyModel:
    """A second network for `averaged_weights`, in eval mode; its parameters are empty, whatever the size of `model`."""
    empty = {id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, empty).eval()


@contextmanager
def averaged_weights(network: EnergyModel, average: EMAModel) -> Iterator[None]:
    """Gives the averaged weights, whole on every process, to a network of `copy_without_weights`; for all to call."""
    for parameter, averaged in zip(network.parameters(), average.shadow_params, strict=True):
        parameter.data = whole(averaged)
    try:
        yield
    finally:
        for parameter in network.parameters():
            parameter.data = parameter.data.new_empty(0)
