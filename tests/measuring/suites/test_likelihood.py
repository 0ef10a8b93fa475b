"""The suite likelihood, against Gaussian data whose density is known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import gaussian_potential, tiny_unet
from tiny_studies import measure

from latent_egc.measuring.suites import likelihood
from latent_egc.methods.likelihood import log_density, timestep_grid


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
    model = tiny_unet().double()
    timesteps = timestep_grid(model.alphas_cumprod, 10)
    solved = log_density(gaussian_potential(model, 1.0), model.noise_levels, noisy, torch.ones_like(noisy), timesteps)
    bits = -solved.sum() / (4 * 32 * math.log(2))
    assert metrics["bits per dimension"].value == pytest.approx(float(bits), rel=1e-4)


def test_batches_change_nothing(evaluation_context):
    settings = ("likelihood.num_steps=2", "likelihood.num_images=5")
    whole = measure(likelihood, evaluation_context(*settings))
    parts = measure(likelihood, evaluation_context(*settings, "batch_size=2"))
    assert whole.num_samples == 5
    for name, metric in whole.metrics.items():
        assert parts.metrics[name].value == pytest.approx(metric.value, rel=1e-4)
