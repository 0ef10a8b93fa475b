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

from latent_egc.models.potentials import Potential

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
