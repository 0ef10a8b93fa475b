"""The density of images: what it gives, what it costs, and what it refuses."""

import math

import pytest
import torch
from tiny import generator, gradient_image, tiny_pipeline

from latent_egc import EGCPipeline

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def normalised(**overrides):
    """A pipeline whose energies of all noise levels are N(0, I)'s, and its constant."""
    pipeline = tiny_pipeline(randomise=False, energy_pooling="logmeanexp", **overrides)
    pipeline.fit_log_normalizer(8)
    return pipeline


@pytest.mark.parametrize("vae", [True, False])
def test_density_of_a_standard_normal_by_both_methods(vae):
    pipeline = normalised(vae=vae, **({} if vae else {"in_channels": 3, "sample_size": 8}))
    num_dimensions = 32 if vae else 192
    assert pipeline.config.log_normalizer == pytest.approx(num_dimensions / 2 * math.log(2 * math.pi), abs=1e-4)
    latents = pipeline.encode(2 * IMAGES - 1)
    alpha, sigma = pipeline.energy_model.noise_levels(torch.tensor(0))
    noisy = alpha * latents + sigma * torch.randn(latents.shape, generator=generator())
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(noisy.double()).sum(dim=(1, 2, 3))
    one_pass = pipeline.log_density(IMAGES, "one_pass", generator=generator())
    torch.testing.assert_close(one_pass.log_density, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(one_pass.bits_per_dimension, -expected / (num_dimensions * math.log(2)))
    assert one_pass.solver_error is None
    assert one_pass.trace_error is None


def test_errors_of_the_ode_say_how_far_it_is_from_the_truth():
    """Which one pass of a normalised energy is."""
    pipeline = normalised()
    truth = pipeline.log_density(IMAGES[:1], "one_pass", generator=generator()).log_density
    ode = pipeline.log_density(IMAGES[:1], num_steps=16, num_probes=2, generator=generator())
    torch.testing.assert_close(ode.solver_error, ode.log_density - truth, rtol=0.5, atol=0)
    assert ode.trace_error.max() < 1e-4  # the trace of a multiple of the identity


@pytest.mark.parametrize("method", ["ode", "one_pass"])
def test_an_images_density_does_not_depend_on_its_batch(method):
    pipeline = tiny_pipeline()
    pipeline.register_to_config(log_normalizer=1.0)
    arguments = {"num_steps": 2, "num_probes": 2}
    whole = pipeline.log_density(IMAGES, method, generator=[generator(i) for i in range(3)], **arguments)
    parts = pipeline.log_density(
        list(IMAGES), method, generator=[generator(i) for i in range(3)], batch_size=1, **arguments
    )
    one = pipeline.log_density(IMAGES[1:2], method, generator=generator(1), **arguments)
    torch.testing.assert_close(parts.log_density, whole.log_density, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(one.log_density, whole.log_density[1:2], rtol=1e-4, atol=1e-3)
    assert pipeline.log_density(gradient_image(), method, **arguments).log_density.shape == (1,)


def test_cost_in_passes(monkeypatch):
    pipeline = normalised()
    passes, network = [], pipeline.energy_model.network
    monkeypatch.setattr(
        pipeline.energy_model, "network", lambda *inputs: passes.append(len(inputs[0])) or network(*inputs)
    )
    pipeline.log_density(IMAGES, "one_pass")
    assert passes == [3]
    passes.clear()
    pipeline.log_density(IMAGES, num_steps=2, num_probes=3)
    assert passes == [3] * (2 + 2 * 2 + 2 * 1)


def test_labels_need_a_class_embedding():
    pipeline = tiny_pipeline(class_embedding=True)
    arguments = {"num_steps": 2, "generator": generator()}
    by_name = pipeline.log_density(IMAGES, class_labels="dog", **arguments).log_density
    arguments["generator"] = generator()
    by_ids = pipeline.log_density(IMAGES, class_labels=[1, 1, 2], **arguments).log_density
    torch.testing.assert_close(by_ids[:2], by_name[:2])
    assert (by_ids[2] - by_name[2]).abs() > 1e-3


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"method": "one_pass"}, "trained with objective.time_score_weight"),
        ({}, {"method": "flow"}, "method must be 'ode' or 'one_pass', got 'flow'"),
        ({}, {"num_steps": 1}, "num_steps must be at least 2, got 1"),
        ({}, {"num_probes": 1}, "num_probes must be at least 2, got 1"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({}, {"class_labels": "dog"}, "need a model with class embedding"),
        ({}, {"generator": [torch.Generator()] * 2}, "generator must be one or a list of 3"),
        ({"class_embedding": True}, {"class_labels": ["dog", "cat"]}, "class_labels must be one or 3, got 2"),
        ({"class_embedding": True}, {"class_labels": "dog", "method": "one_pass"}, "without class_labels"),
    ],
)
def test_bad_arguments(options, arguments, message):
    pipeline = tiny_pipeline(**options)
    if "without class_labels" in message:
        pipeline.fit_log_normalizer(2)
    with pytest.raises(ValueError, match=message):
        pipeline.log_density(IMAGES, **arguments)


def test_the_constant_is_saved_with_the_pipeline(tmp_path):
    pipeline = normalised()
    pipeline.save_pretrained(tmp_path)
    loaded = EGCPipeline.from_pretrained(tmp_path)
    assert loaded.config.log_normalizer == pipeline.config.log_normalizer
    assert EGCPipeline(**loaded.components).config.log_normalizer == pipeline.config.log_normalizer
    found = loaded.log_density(IMAGES, "one_pass", generator=generator()).log_density
    torch.testing.assert_close(found, pipeline.log_density(IMAGES, "one_pass", generator=generator()).log_density)
