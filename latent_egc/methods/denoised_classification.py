"""Classifying what the energy itself denoised: noise the latents, denoise them in one step, classify, average.

    z_t = alpha_t z_0 + sigma_t eps,   z_0' = (z_t - sigma_t epsilon(z_t, t)) / alpha_t,   p(y | z_0' at timestep 0)

An attack that differentiates the average over draws of eps sees its gradient averaged too: expectation over
transformation (Athalye et al., ICML 2018), which a defence by randomness must withstand.
"""

import math

import torch
from diffusers import ModelMixin

from latent_egc.models.noise_schedule import add_noise
from latent_egc.models.potentials import Potential, input_gradient


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
