"""The suite likelihood, against Gaussian data whose density is known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import gaussian_potential, tiny_unet
from tiny_studies import measure, values

from latent_egc.measuring.suites import likelihood
from latent_egc.methods.likelihood import log_density


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
    levels, probes = (model.noise_levels, model.alphas_cumprod), torch.ones(2, *noisy.shape)
    solved = log_density(gaussian_potential(model, 1.0), *levels, noisy, probes, 10)
    to_bits = -1 / (4 * 32 * math.log(2))
    assert metrics["bits per dimension"].value == pytest.approx(to_bits * float(solved.value.sum()), rel=1e-4)
    found = metrics["solver error in bits per dimension"].value
    assert found == pytest.approx(to_bits * float(solved.solver_error.sum()), rel=1e-2)
    assert metrics["trace error in bits per dimension"].value == pytest.approx(0, abs=1e-5)
    assert not [name for name in metrics if "one pass" in name]


def test_one_pass_where_the_network_was_trained_for_it(evaluation_context):
    """White noise's energies again, which are normalised: both methods say the same."""
    context = evaluation_context("likelihood.num_steps=16", randomise=False, energy_pooling="logmeanexp")
    context.pipeline.fit_log_normalizer(8)
    metrics = values(measure(likelihood, context))
    one_pass = metrics["bits per dimension, one pass"]
    assert one_pass == pytest.approx(metrics["bits per dimension under N(0, I)"], rel=1e-5)
    assert metrics["one pass less ODE"] == pytest.approx(one_pass - metrics["bits per dimension"], abs=1e-9)
    assert metrics["correlation of one pass and ODE"] > 0.999


def test_batches_change_nothing(evaluation_context):
    settings = ("likelihood.num_steps=2", "likelihood.num_images=5")
    whole = measure(likelihood, evaluation_context(*settings))
    parts = measure(likelihood, evaluation_context(*settings, "batch_size=2"))
    assert whole.num_samples == 5
    for name, metric in whole.metrics.items():
        assert parts.metrics[name].value == pytest.approx(metric.value, rel=1e-4)
