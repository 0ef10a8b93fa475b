"""The density of the probability-flow ODE, against Gaussian data whose density is known."""

import math

import pytest
import torch
from tiny import gaussian_potential, tiny_unet

from latent_egc.methods.likelihood import epsilon_and_divergences, log_density, solved_log_densities, timestep_grid
from latent_egc.models import energy_potential


def density(model, potential, latents, probe, num_steps):
    timesteps = timestep_grid(model.alphas_cumprod, num_steps)
    return solved_log_densities(potential, model.noise_levels, latents, probe[None], timesteps)[0]


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_density_of_gaussian_latents(std):
    torch.manual_seed(0)
    model = tiny_unet(beta_start=0.003).double()  # so that alpha_0 is not nearly 1
    alpha, sigma = (float(level) for level in model.noise_levels(torch.tensor(0)))
    variance = alpha**2 * std**2 + sigma**2
    latents = variance**0.5 * torch.randn(5, 2, 4, 4, dtype=torch.float64)
    probe = torch.randint(0, 2, latents.shape) * 2.0 - 1
    expected = -latents.square().sum(dim=(1, 2, 3)) / (2 * variance) - 16 * math.log(2 * math.pi * variance)
    coarse, fine = (density(model, gaussian_potential(model, std), latents, probe, steps) for steps in (20, 40))
    torch.testing.assert_close(fine, expected, rtol=0, atol=0.2)
    # Heun's error falls with the square of the step, so this extrapolates it away.
    torch.testing.assert_close((4 * fine - coarse) / 3, expected, rtol=0, atol=0.03)


def test_errors_are_what_is_off():
    """Of a Gaussian potential, whose trace is exact for signs, all error is the solver's, and known."""
    torch.manual_seed(0)
    model = tiny_unet(beta_start=0.003).double()
    alpha, sigma = (float(level) for level in model.noise_levels(torch.tensor(0)))
    variance = alpha**2 * 0.25 + sigma**2
    latents = variance**0.5 * torch.randn(4, 2, 4, 4, dtype=torch.float64)
    probes = torch.randint(0, 2, (3, *latents.shape)) * 2.0 - 1
    found = log_density(gaussian_potential(model, 0.5), model.noise_levels, model.alphas_cumprod, latents, probes, 40)
    expected = -latents.square().sum(dim=(1, 2, 3)) / (2 * variance) - 16 * math.log(2 * math.pi * variance)
    assert found.trace_error.max() < 1e-6
    off = found.value - expected
    assert off.abs().min() > 0.05
    torch.testing.assert_close(found.solver_error, off, rtol=0.15, atol=0)


def test_trace_error_is_the_standard_error_over_probes():
    """On a real network: the means of many sets of probes scatter by about what each set says of itself."""
    torch.manual_seed(0)
    model = tiny_unet(num_classes=None, energy_channels=2)
    latents = torch.randn(1, 2, 4, 4).expand(30, -1, -1, -1)
    probes = torch.randint(0, 2, (4, *latents.shape)) * 2.0 - 1
    levels = model.noise_levels, model.alphas_cumprod
    found = log_density(energy_potential(model), *levels, latents, probes, 4)
    assert found.value.std().item() == pytest.approx(found.trace_error.square().mean().sqrt().item(), rel=0.3)


def test_untrained_gaussian_part_is_a_standard_normal():
    """A real network whose share is zero: the energy is white noise's at every timestep."""
    model = tiny_unet(randomise=False, gaussian_part=True, head="inner", num_classes=None).double()
    latents = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    potentials = (energy_potential(model), gaussian_potential(model, 1.0))
    found, expected = (density(model, p, latents, torch.ones_like(latents), 5) for p in potentials)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_divergence_is_the_jacobians_trace():
    """Over every unit probe in turn, Hutchinson's products sum to alpha times the trace of d epsilon / d z."""
    model = tiny_unet().double()
    latents = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: model.epsilon(z, 300), latents).reshape(32, 32)
    alpha, _ = model.noise_levels(torch.tensor(300))
    probes = torch.eye(32, dtype=torch.float64).reshape(32, 1, 2, 4, 4)
    _, products = epsilon_and_divergences(energy_potential(model), float(alpha), latents, 300, probes)
    torch.testing.assert_close(products.sum(), alpha * jacobian.trace(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 10, 2000])
def test_grid_spans_the_schedule_evenly_in_the_log_of_the_noise(num_steps):
    model = tiny_unet().double()
    grid = timestep_grid(model.alphas_cumprod, num_steps)
    assert grid[0] == 0
    assert grid[-1] == pytest.approx(999)
    assert grid == sorted(grid)
    alpha, sigma = model.noise_levels(torch.tensor(grid, dtype=torch.float64))
    steps = (sigma / alpha).log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(num_steps))
