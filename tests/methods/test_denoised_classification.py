"""Denoised classification by hand, and its gradient."""

import torch
from tiny import gaussian_potential, tiny_unet

from latent_egc.methods.denoised_classification import denoised, denoised_log_probabilities
from latent_egc.models import energy_potential


def test_one_step_from_gaussian_latents_is_the_posteriors_mean():
    model = tiny_unet().double()
    noisy_latents = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    levels = alpha, sigma = model.noise_levels(torch.tensor(300))
    found = denoised(gaussian_potential(model, 0.5), levels, noisy_latents, 300)
    torch.testing.assert_close(found, alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * noisy_latents)


def test_mean_over_draws_by_hand():
    model = tiny_unet().double()
    latents, noise = (torch.randn(2, *shape, 2, 4, 4, dtype=torch.float64) for shape in ((), (3,)))
    found = denoised_log_probabilities(energy_potential(model), model, latents, noise, 300)
    abar = model.alphas_cumprod[300]
    for i in range(2):
        probabilities = []
        for draw in range(3):
            noisy = abar.sqrt() * latents[i : i + 1] + (1 - abar).sqrt() * noise[i, draw]
            clean = (noisy - (1 - abar).sqrt() * model.epsilon(noisy, 300)) / abar.sqrt()
            probabilities.append(model(clean, 0).logits.softmax(1))
        torch.testing.assert_close(found[i : i + 1], (sum(probabilities) / 3).log())


def test_gradient_is_the_finite_difference():
    """Through the noise prediction, itself a gradient; attention is at both levels of the network."""
    model = tiny_unet(attention_levels=(0, 1)).double()
    noise = torch.randn(1, 2, 2, 4, 4, dtype=torch.float64)
    latents = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: denoised_log_probabilities(energy_potential(model), model, z, noise, 300), latents, fast_mode=True
    )
