"""The suite likelihood, against Gaussian data whose density is known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import tiny_unet
from tiny_studies import measure

from latent_egc.measuring.suites import likelihood
from latent_egc.measuring.suites.likelihood import (
    epsilon_and_divergence,
    log_density,
    timestep_grid,
)


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
    coarse, fine = (log_density(model, latents, probe, num_steps) for num_steps in (20, 40))
    torch.testing.assert_close(fine, expected, rtol=0, atol=0.2)
    # Heun's error falls with the square of the step, so this extrapolates it away.
    torch.testing.assert_close((4 * fine - coarse) / 3, expected, rtol=0, atol=0.03)


def test_untrained_gaussian_part_is_a_standard_normal():
    """A real network whose share is zero: the energy is white noise's at every timestep."""
    model = tiny_unet(randomise=False, gaussian_part=True, head="inner", num_classes=None).double()
    latents = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found, expected = (log_density(m, latents, torch.ones_like(latents), 5) for m in (model, gaussian_model(1.0)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


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


def test_suite_of_a_standard_normal(evaluation_context):
    """The untrained Gaussian part again, end to end."""
    options = {"randomise": False, "gaussian_part": True, "head": "inner", "num_classes": None}
    context = evaluation_context("likelihood.num_images=4", "likelihood.num_steps=10", **options)
    metrics = measure(likelihood, context).metrics
    positions = context.choose(np.arange(7), 4)
    alpha, sigma = context.model.noise_levels(torch.tensor(0))
    noisy = (alpha * context.latents[positions] + sigma * context.noise(context.rows[positions])).double()
    bits = -scipy.stats.norm.logpdf(noisy).sum() / (4 * 32 * math.log(2))
    assert metrics["bits per dimension under N(0, I)"].value == pytest.approx(bits, rel=1e-5)
    solved = -log_density(gaussian_model(1.0), noisy, torch.ones_like(noisy), 10).sum() / (4 * 32 * math.log(2))
    assert metrics["bits per dimension"].value == pytest.approx(float(solved), rel=1e-4)


def test_batches_change_nothing(evaluation_context):
    settings = ("likelihood.num_steps=2", "likelihood.num_images=5")
    whole = measure(likelihood, evaluation_context(*settings))
    parts = measure(likelihood, evaluation_context(*settings, "batch_size=2"))
    assert whole.num_samples == 5
    for name, metric in whole.metrics.items():
        assert parts.metrics[name].value == pytest.approx(metric.value, rel=1e-4)
