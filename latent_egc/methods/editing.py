"""Editing by the probability flow: images to noise and back without chance, between two images, and near to one.

Between two noise levels DDIM moves latents, up as well as down, by

    z' = alpha' (z - sigma epsilon) / alpha + sigma' epsilon

Down, epsilon is read where the step starts. Its exact inverse reads it where the step up ends, which is found by a
fixed-point iteration. Source: Song et al. (ICLR 2021); Pan et al. (ICCV 2023, arXiv 2309.04907).
"""

from collections.abc import Callable, Iterable

import torch

from .density import NoiseLevels

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
