"""Correctors: their stationary laws against formulas, rows that do not see each other, and what they cost."""

import math

import pytest
import torch
from tiny import generator

from latent_egc.methods.correctors import Corrector, hmc, log_density_and_score, ula

T, SIGMA = torch.tensor(0), torch.tensor(0.5, dtype=torch.float64)


def potential_of(log_density):
    """U(z, t) whose density at sigma_t = SIGMA is exp(log_density), a function of points (N, D)."""
    return lambda latents, timestep: (-SIGMA * log_density(latents.flatten(1)), [])


def standard_normal(points):
    return -points.square().sum(dim=1) / 2


MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.6]], dtype=torch.float64)
WEIGHTS, DEVIATION = torch.tensor([0.3, 0.7], dtype=torch.float64), 0.6


def mixture(points):
    return (WEIGHTS.log() - (points[:, None] - MEANS).square().sum(dim=2) / (2 * DEVIATION**2)).logsumexp(dim=1)


def chains(count, size, scale=1.0):
    return scale * torch.randn(count, size, 1, 1, dtype=torch.float64, generator=generator(1))


def test_ula_has_its_known_bias_and_the_others_have_none():
    """From N(0, 1) on, 40 steps at h = 0.5; SIGMA only sets the unit of the step."""
    potential, start, h = potential_of(standard_normal), chains(20_000, 1), 0.5
    arguments = potential, start, T, SIGMA, h / float(SIGMA) ** 2, 40
    biased = ula(*arguments, generator=generator())
    assert float(biased.var()) == pytest.approx(1 / (1 - h / 2), abs=0.05)
    for leapfrog_steps in (1, 2):  # 3 of this length would be half a turn, and stay on the circle that they start from
        exact, acceptance = hmc(*arguments, leapfrog_steps, generator())
        assert float(exact.mean()) == pytest.approx(0, abs=0.03)
        assert float(exact.var()) == pytest.approx(1, abs=0.04)
        assert 0.5 < float(acceptance.mean()) < 1


@pytest.mark.parametrize("leapfrog_steps", [1, 2])
def test_mala_and_hmc_sample_a_mixture(leapfrog_steps):
    """Mean, covariance and weights of the modes, from a start that knows none of them."""
    step_size = 0.5 / float(SIGMA) ** 2 / leapfrog_steps
    found, _ = hmc(
        potential_of(mixture), chains(4000, 2), T, SIGMA, step_size, 120 // leapfrog_steps, leapfrog_steps, generator()
    )
    points, mean = found.flatten(1), WEIGHTS @ MEANS
    covariance = DEVIATION**2 * torch.eye(2) + (MEANS - mean).T @ (WEIGHTS[:, None] * (MEANS - mean))
    torch.testing.assert_close(points.mean(dim=0), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(points.T.cov(), covariance, atol=0.07, rtol=0)
    logits = -(points[:, None] - MEANS).square().sum(dim=2) / (2 * DEVIATION**2) + WEIGHTS.log()
    torch.testing.assert_close(logits.softmax(dim=1).mean(dim=0), WEIGHTS, atol=0.03, rtol=0)


def test_one_leapfrog_step_is_malas_proposal_and_acceptance():
    """By the textbook: q(z | z') / q(z' | z) of Langevin proposals, at the very draws that the function makes."""
    potential, start, h = potential_of(mixture), chains(50, 2), 0.4
    found, acceptance = hmc(potential, start, T, SIGMA, h / float(SIGMA) ** 2, generator=generator())
    draws = generator()
    noise = torch.randn(start.shape, generator=draws, dtype=torch.float64)
    log_uniform = torch.special.log_ndtr(torch.randn(50, 1, generator=draws, dtype=torch.float64))[:, 0]
    before, score = log_density_and_score(potential, start, T, SIGMA)
    proposal = start + h * score + math.sqrt(2 * h) * noise
    after, back = log_density_and_score(potential, proposal, T, SIGMA)
    forth = -(proposal - start - h * score).square().sum(dim=(1, 2, 3)) / (4 * h)
    log_ratio = after - before - (start - proposal - h * back).square().sum(dim=(1, 2, 3)) / (4 * h) - forth
    torch.testing.assert_close(acceptance, log_ratio.clamp(max=0).exp())
    accepted = log_uniform < log_ratio
    assert 0 < accepted.sum() < 50
    torch.testing.assert_close(found, torch.where(accepted[:, None, None, None], proposal, start))


@pytest.mark.parametrize(("kind", "gradients"), [("ula", 5), ("mala", 6), ("hmc", 11)])
def test_gradients_are_counted_and_types_kept(kind, gradients):
    calls, start = [], chains(3, 2).float()

    def counted(latents, timestep):
        calls.append(len(latents))
        return potential_of(mixture)(latents.double(), timestep)[0].float(), []

    corrector = Corrector(kind, num_steps=5, num_leapfrog_steps=2)
    found, acceptance = corrector(counted, start, T, SIGMA.float(), 0.1, generator())
    assert calls == [3] * gradients
    assert found.dtype == acceptance.dtype == torch.float32
    assert found.shape == start.shape
    assert acceptance.shape == (3,)
    assert not found.requires_grad


@pytest.mark.parametrize("kind", ["ula", "mala", "hmc"])
def test_a_row_does_not_depend_on_the_others(kind):
    start, sizes = chains(3, 2), torch.tensor([0.1, 2.0, 0.5])
    corrector = Corrector(kind, num_steps=4)
    together, rates = corrector(
        potential_of(mixture), start, T, SIGMA, sizes, generator=[generator(i) for i in range(3)]
    )
    for i in range(3):
        alone, rate = corrector(
            potential_of(mixture), start[i : i + 1], T, SIGMA, sizes[i : i + 1], generator=[generator(i)]
        )
        torch.testing.assert_close(alone, together[i : i + 1])
        torch.testing.assert_close(rate, rates[i : i + 1])


@pytest.mark.parametrize("kind", ["mala", "hmc"])
@pytest.mark.parametrize("step_size", [0.01, 20.0])
def test_step_sizes_are_adapted_to_the_target(kind, step_size):
    corrector = Corrector(kind, num_steps=1, step_size=step_size, target_acceptance=0.7)
    latents, sizes, rates = chains(30, 8), torch.full((30,), step_size), []
    for _ in range(120):
        latents, acceptance = corrector(potential_of(standard_normal), latents, T, SIGMA, sizes, generator(len(rates)))
        sizes = corrector.adapted(sizes, acceptance)
        rates.append(float(acceptance.mean()))
    assert sum(rates[60:]) / 60 == pytest.approx(0.7, abs=0.03)
    fixed = Corrector(kind, target_acceptance=None)
    assert torch.equal(fixed.adapted(sizes, acceptance), sizes)


def test_what_has_no_energy_is_not_accepted():
    potential = potential_of(lambda points: torch.where(points[:, 0] < 0, torch.nan, standard_normal(points)))
    start = chains(50, 1).abs()
    found, acceptance = hmc(potential, start, T, SIGMA, 40.0, generator=generator())
    assert (found >= 0).all()
    assert (found == start).any()
    assert acceptance.isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "langevin"}, "corrector must be of kind 'ula', 'mala' or 'hmc', got 'langevin'"),
        ({"num_steps": 0}, "corrector: num_steps must be an integer of at least 1, got 0"),
        ({"num_leapfrog_steps": 1.5}, "corrector: num_leapfrog_steps must be an integer of at least 1, got 1.5"),
        ({"step_size": 0.0}, "corrector: step_size must be finite and positive"),
        ({"step_size": float("inf")}, "corrector: step_size must be finite and positive"),
        ({"target_acceptance": 1.0}, r"corrector: target_acceptance must be in \(0, 1\) or None"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Corrector(**values)
