"""Energies of all noise levels as one density: the time score and log Z, against cases that are known."""

import math

import pytest
import torch
from tiny import TINY_BACKBONES, gaussian_potential, tiny_unet

from latent_egc.methods.density import estimated_log_normalizer, one_pass_log_density, time_score
from latent_egc.models import energy_potential
from latent_egc.models.potentials import input_and_time_gradient

TIMESTEPS = torch.tensor([0, 1, 300, 998, 999])


def found_time_score(model, latents, timesteps, labels=None):
    timesteps = timesteps.double()
    epsilon, by_time, (output,) = input_and_time_gradient(energy_potential(model, labels), latents, timesteps)
    by_log_ratio = by_time / model.log_ratio_slopes(timesteps)
    return time_score(output.energy, epsilon, by_log_ratio, latents, model.noise_levels(timesteps))


@pytest.mark.parametrize("head", ["map", "inner"])
@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_a_fresh_network_has_the_time_score_of_white_noise(backbone, head):
    """The Gaussian part alone: sigma^2 (d - |z|^2), from the first timestep to the last; log Z is that of N(0, I)."""
    model = TINY_BACKBONES[backbone](randomise=False, head=head, energy_pooling="logmeanexp").double()
    latents = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    _, sigma = model.noise_levels(TIMESTEPS)
    expected = sigma**2 * (32 - latents.square().sum(dim=(1, 2, 3)))
    torch.testing.assert_close(found_time_score(model, latents, TIMESTEPS), expected, rtol=1e-9, atol=1e-9)
    value, error = estimated_log_normalizer(energy_potential(model), model.noise_levels, latents, 999, batch_size=2)
    assert value == pytest.approx(16 * math.log(2 * math.pi), abs=1e-6)
    assert error == pytest.approx(0, abs=1e-6)


def test_a_logsumexps_constant_is_in_the_way():
    """h w log E alpha / sigma between the noise levels, which no score sees."""
    model = tiny_unet(randomise=False).double()
    latents = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    alpha, sigma = model.noise_levels(TIMESTEPS)
    off = found_time_score(model, latents, TIMESTEPS) - sigma**2 * (32 - latents.square().sum(dim=(1, 2, 3)))
    torch.testing.assert_close(off, 16 * math.log(3) * alpha / sigma, rtol=1e-9, atol=1e-9)


class ExactFrequencies(torch.nn.Module):
    """diffusers' sinusoids of the timestep, which are float32, in float64."""

    def forward(self, timesteps):
        angles = timesteps[:, None].double() * torch.logspace(0, -4, 4, dtype=torch.float64)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("head", ["map", "inner"])
def test_time_score_is_the_derivative_of_f_at_fixed_x(head):
    """Central differences in log s between two timesteps, and at an integer the limit from above."""
    model = tiny_unet(head=head, class_embedding=True).double()
    model.time_frequencies = ExactFrequencies()
    latents, labels = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.tensor([-1, 2, 0, 1])
    timesteps, step = torch.tensor([0.5, 300.5, 700.5, 998.5], dtype=torch.float64), 1e-6
    alpha, _ = model.noise_levels(timesteps)
    x = latents / alpha.view(4, 1, 1, 1)

    def f(log_ratio_step):
        moved = timesteps + log_ratio_step / model.log_ratio_slopes(timesteps)
        alpha, sigma = model.noise_levels(moved)
        energy = model(alpha.view(4, 1, 1, 1) * x, moved, labels).energy
        return energy / sigma - 32 * alpha.log()

    with torch.no_grad():
        expected = (f(step) - f(-step)) / (2 * step)
    torch.testing.assert_close(found_time_score(model, latents, timesteps, labels), expected, rtol=1e-5, atol=1e-4)
    integers = timesteps.floor()
    above = found_time_score(model, latents, integers + 1e-9, labels)
    torch.testing.assert_close(found_time_score(model, latents, integers, labels), above, rtol=1e-5, atol=1e-5)


def test_slopes_and_levels_at_the_last_timestep():
    model = tiny_unet().double()
    timesteps = torch.tensor([998.0, 998.7, 999.0], dtype=torch.float64, requires_grad=True)
    alpha, sigma = model.noise_levels(timesteps)
    log_ratio = (sigma / alpha).log()
    slopes = torch.autograd.grad(log_ratio.sum(), timesteps)[0]
    torch.testing.assert_close(slopes, (log_ratio[2] - log_ratio[0]).expand(3))
    torch.testing.assert_close(model.log_ratio_slopes(timesteps), slopes)
    torch.testing.assert_close(torch.stack([alpha[2], sigma[2]]), torch.stack(model.noise_levels(torch.tensor(999))))


def test_one_pass_of_gaussian_energies():
    """N(0, std^2 I), its energies shifted to be one density up to a constant: what is found is log p, at every t."""
    torch.manual_seed(0)
    model, std = tiny_unet().double(), 1.1
    gaussian = gaussian_potential(model, std)

    def potential(latents, timesteps):
        alpha, sigma = model.noise_levels(timesteps)
        return gaussian(latents, timesteps)[0] + sigma * (16 * (alpha**2 * std**2 + sigma**2).log() + 7), []

    noise = torch.randn(500, 2, 4, 4, dtype=torch.float64)
    log_z, error = estimated_log_normalizer(potential, model.noise_levels, noise, 999, batch_size=200)
    assert abs(log_z - 16 * math.log(2 * math.pi) + 7) < 5 * error + 1e-12 < 0.02
    for timestep in (0, 500):
        alpha, sigma = model.noise_levels(torch.tensor(timestep))
        scale = (alpha**2 * std**2 + sigma**2).sqrt()
        found = one_pass_log_density(potential, model.noise_levels, noise[:4], timestep, log_z)
        expected = torch.distributions.Normal(0.0, scale).log_prob(noise[:4]).sum(dim=(1, 2, 3))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
