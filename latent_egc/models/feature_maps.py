"""A network's blocks by name, and their outputs as maps: what is probed, and what a head on frozen features reads.

Blocks are called "in", then "down.LEVEL.LAYER", "mid.LAYER" and "up.LEVEL.LAYER" (LEVEL 0 is the finest), or
"block.LAYER".
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .energy import EnergyModel
from .heads import EnergyOutput
from .transformer import EGCTransformer


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
