"""The suite likelihood, against Gaussian data whose density is known."""

import math

import pytest
import torch
from conftest import tiny_unet

from latent_egc.evaluation.likelihood import epsilon_and_divergence, evaluate_likelihood, log_density, timestep_grid


def gaussian_model(std: float):
    """A model whose epsilon is exact for latents from N(0, std^2 I)."""
    model = tiny_unet().double()

    def epsilon(latents, timestep):
        alpha, sigma = model.noise_levels(torch.as_tensor(timestep))
        return sigma * latents / (alpha**2 * std**2 + sigma**2)

    model.epsilon = epsilon
    return model


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_density_of_gaussian_latents(std):
    torch.manual_seed(0)
    model = gaussian_model(std)
    alpha, sigma = (float(level) for level in model.noise_levels(torch.tensor(0)))
    variance = alpha**2 * std**2 + sigma**2
    latents = variance**0.5 * torch.randn(5, 2, 4, 4, dtype=torch.float64)
    probe = torch.randint(0, 2, latents.shape) * 2.0 - 1
    expected = -latents.square().sum(dim=(1, 2, 3)) / (2 * variance) - 16 * math.log(2 * math.pi * variance)
    found = log_density(model, latents, probe, num_steps=200)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-2)


def test_untrained_gaussian_part_is_a_standard_normal():
    """A real model: the network's share is zero, so the energy is white noise's at every timestep."""
    model = tiny_unet(randomise=False, gaussian_part=True, head="inner", num_classes=None).double()
    latents = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    expected = -latents.square().sum(dim=(1, 2, 3)) / 2 - 16 * math.log(2 * math.pi)
    found = log_density(model, latents, torch.ones_like(latents), num_steps=200)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-2)


def test_divergence_is_the_jacobians_trace():
    """Over every unit probe in turn, Hutchinson's products sum to alpha times the trace of d epsilon / d z."""
    model = tiny_unet().double()
    latents = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: model.epsilon(z, 300), latents).reshape(32, 32)
    alpha, _ = model.noise_levels(torch.tensor(300))
    probes = torch.eye(32, dtype=torch.float64).reshape(32, 2, 4, 4)
    _, products = epsilon_and_divergence(model, latents.expand(32, -1, -1, -1), 300, probes)
    torch.testing.assert_close(products.sum(), alpha * jacobian.trace(), rtol=1e-6, atol=1e-9)


def test_grid_spans_the_schedule():
    grid = timestep_grid(tiny_unet(), 10)
    assert grid[0] == 0
    assert grid[-1] == pytest.approx(999)
    assert grid == sorted(grid)


def test_suite(evaluation_context):
    result = evaluate_likelihood(evaluation_context("likelihood.num_steps=2", "likelihood.num_images=5"))
    assert result.num_samples == 5
    assert math.isfinite(result.metrics["bits per dimension"].value)
    other = evaluate_likelihood(evaluation_context("likelihood.num_steps=2", "likelihood.num_images=5", "batch_size=2"))
    assert other.metrics["bits per dimension"].value == pytest.approx(
        result.metrics["bits per dimension"].value, rel=1e-4
    )
