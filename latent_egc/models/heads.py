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
