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
