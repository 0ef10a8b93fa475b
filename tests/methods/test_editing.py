"""Inversion, interpolation and nearness, where the answer is known."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler
from tiny import gaussian_potential, generator, tiny_unet

from latent_egc.methods.editing import ddim_inversion, ddim_step, held_near, slerp
from latent_egc.models import input_gradient
from latent_egc.pipelines.schedulers import default_scheduler

STD = 0.5


@pytest.fixture
def model():
    return tiny_unet().double()


def latents(rows=2):
    return torch.randn(rows, 2, 4, 4, generator=generator(), dtype=torch.float64)


def epsilon_of(model):
    """Epsilon of latents from N(0, STD^2 I)."""
    potential = gaussian_potential(model, STD)
    return lambda noisy_latents, timestep: input_gradient(potential, noisy_latents, timestep)[0].detach()


def ascending(num_steps):
    return torch.arange(num_steps) * (1000 // num_steps)


def there_and_back(model, num_steps, num_refinements):
    """Relative errors of the noise, against the flow's, and of what DDIM makes of it, against the start."""
    epsilon_at, timesteps, start = epsilon_of(model), ascending(num_steps), STD * latents()
    noise = ddim_inversion(epsilon_at, model.noise_levels, start, timesteps, num_refinements)
    alpha, sigma = model.noise_levels(timesteps[-1])
    exact = start * (alpha**2 * STD**2 + sigma**2).sqrt() / STD
    scheduler, end = default_scheduler(model), noise
    scheduler.set_timesteps(num_steps)
    assert torch.equal(scheduler.timesteps.flip(0), timesteps)
    for timestep in scheduler.timesteps:
        end = scheduler.step(epsilon_at(end, timestep), timestep, end).prev_sample
    return float((noise - exact).norm() / exact.norm()), float((end - start).norm() / start.norm())


def test_inversion_and_sampling_return_to_the_start_the_better_the_more_steps(model):
    """The noise comes nearer to the flow's own too, where each step is refined."""
    for num_refinements, lowest in ((0, 0.04), (1, 0.004)):
        errors = [there_and_back(model, num_steps, num_refinements) for num_steps in (8, 24, 72)]
        for coarse, fine in pairwise(errors):
            assert fine[1] < 0.5 * coarse[1]
            assert num_refinements == 0 or fine[0] < 0.7 * coarse[0]
        assert errors[-1][1] < lowest
        assert errors[-1][0] < 0.05


def test_refinements_come_to_the_exact_inverse(model):
    returned = [there_and_back(model, 10, num_refinements)[1] for num_refinements in (0, 1, 3, 15)]
    assert returned == sorted(returned, reverse=True)
    assert returned[1] < 0.5 * returned[0]
    assert returned[-1] < 1e-3


def test_unrefined_it_is_the_usual_inversion(model):
    epsilon_at, scheduler = epsilon_of(model), DDIMInverseScheduler.from_config(default_scheduler(model).config)
    scheduler.set_timesteps(8)
    expected = start = latents()
    for timestep in scheduler.timesteps:
        expected = scheduler.step(epsilon_at(expected, timestep), timestep, expected).prev_sample
    found = ddim_inversion(epsilon_at, model.noise_levels, start, scheduler.timesteps, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_there_and_one_back_along_the_same_epsilon(model):
    low, high = (model.noise_levels(torch.tensor(t)) for t in (100, 300))
    start, epsilon = latents(), latents().flip(0)
    torch.testing.assert_close(ddim_step(ddim_step(start, epsilon, low, high), epsilon, high, low), start)


def test_slerp():
    first, second = latents(), 3 * latents(4)[2:]
    found = slerp(first, second, torch.tensor([0.0, 0.25, 1.0]))
    assert found.shape == (2, 3, 2, 4, 4)
    torch.testing.assert_close(found[:, 0], first)
    torch.testing.assert_close(found[:, 2], second)
    lengths = found.flatten(2).norm(dim=2)
    torch.testing.assert_close(lengths[:, 1], 0.75 * lengths[:, 0] + 0.25 * lengths[:, 2])
    of_angle = torch.nn.functional.cosine_similarity
    whole, part = (of_angle(first.flatten(1), found[:, i].flatten(1)).acos() for i in (2, 1))
    torch.testing.assert_close(part, 0.25 * whole)


@pytest.mark.parametrize("factor", [2.0, -2.0])
def test_slerp_of_rows_without_an_arc_is_a_line(factor):
    rows = latents()
    torch.testing.assert_close(slerp(rows, factor * rows, torch.tensor([0.5]))[:, 0], (1 + factor) / 2 * rows)


@pytest.mark.parametrize("scale", [0.3, 1.2])
def test_nearness_is_the_gradient_of_its_potential(model, scale):
    """On unit-variance Gaussian latents, where z_0' = alpha z_t and nothing is approximate: the exact posterior's."""
    noisy_latents, original = latents().requires_grad_(), latents(4)[2:]
    alpha, sigma = levels = model.noise_levels(torch.tensor(400))
    near = sigma * (alpha * noisy_latents - original).square().sum() / (2 * (sigma**2 + 1 / scale))
    (gradient,) = torch.autograd.grad(near, noisy_latents)
    epsilon = sigma * noisy_latents.detach()
    found = held_near(epsilon, noisy_latents.detach(), levels, original, scale)
    torch.testing.assert_close(found, epsilon + gradient)
    # log p(original | z_t) of a normal variable with mean alpha z_t and variance sigma^2 + 1 / scale.
    normal = torch.distributions.Normal(alpha * noisy_latents, (sigma**2 + 1 / scale).sqrt())
    (score,) = torch.autograd.grad(normal.log_prob(original).sum(), noisy_latents)
    torch.testing.assert_close(found, epsilon - sigma * score)


def test_held_loosely_nothing_changes_and_held_fast_the_original_comes_back(model):
    noisy_latents, original = latents(), latents(4)[2:]
    alpha, sigma = levels = model.noise_levels(torch.tensor(400))
    assert torch.equal(held_near(original, noisy_latents, levels, original, 0.0), original)
    epsilon = held_near(noisy_latents, noisy_latents, levels, original, 1e9)
    torch.testing.assert_close((noisy_latents - sigma * epsilon) / alpha, original, rtol=1e-5, atol=1e-5)
