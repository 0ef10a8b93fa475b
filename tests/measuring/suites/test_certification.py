"""The suite certification."""

import numpy as np
import pytest
import torch
from tiny_studies import measure, values

from latent_egc import EGCCertificationOutput
from latent_egc.config import ConfigError
from latent_egc.data.stream import noise_generator
from latent_egc.measuring.suites import certification
from latent_egc.methods.certification import largest_radius

FAST = ("certification.sigmas=[0.5, 1]", "certification.n0=2", "certification.n=16", "certification.alpha=0.4")


@pytest.mark.parametrize("noise", ["pixels", "latents"])
def test_suite_by_hand(evaluation_context, noise):
    context = evaluation_context(*FAST, f"certification.noise={noise}", "certification.num_images=5", "batch_size=4")
    result = measure(certification, context)
    found, positions = values(result), context.choose(np.arange(7), 5)
    rows, limit = context.rows[positions], largest_radius(16, 1, 0.4)
    images = context.pixel_values(context.splits.validation, rows) / 2 + 0.5
    generators = [noise_generator(0, int(row)) for row in rows]
    output = context.pipeline.certify(images, 1.0, 2, 16, 0.4, noise, generator=generators, batch_size=4)
    right = output.label_ids.numpy() == context.labels[positions]
    for radius in (0, 0.25, 0.5, 0.75):
        expected = (right & (output.radius.numpy() >= radius)).mean()
        assert found[f"certified accuracy at radius {radius:g}, sigma 1"] == pytest.approx(expected)
    assert found["largest radius that n = 16 allows, sigma 1"] == pytest.approx(limit)
    assert right.any()
    assert result.num_samples == 5
    *rows, last = result.tables[0].rows
    if noise == "pixels":
        assert last[0] == "0.25, published"
        assert [cell.value for cell in last[3:6]] == [0.6, 0.43, 0.27]
        last = rows[-1]
    assert last[-1].value == pytest.approx(limit)
    assert last[-2].value == pytest.approx(output.labels.count(None) / 5)
    assert ("not of pixels" in result.notes[0]) == (noise == "latents")
    assert (result.figures[0].name, result.figures[0].shows_data) == ("certified_accuracy", False)
    (curves,) = result.figures[0].curves
    x, y = curves.series["sigma 1"]
    assert x[0] == 0
    assert y[0].value == pytest.approx(found["certified accuracy at radius 0, sigma 1"])
    assert len(x) == len(y)


def test_how_many_images_and_votes_by_default(evaluation_context, monkeypatch):
    """Through an autoencoder each vote is encoded too."""
    for vae, expected in ((True, 1000), (False, 10_000)):
        context = evaluation_context("certification.sigmas=[0.5]", **({} if vae else {"vae": False, "in_channels": 3}))
        asked = []

        def certify(images, sigma, n, asked=asked, **options):
            asked.append((len(images), n, options["n0"], options.get("alpha")))
            none = torch.zeros(len(images))
            return EGCCertificationOutput(none.long(), [], none.double(), None, "pixels")

        monkeypatch.setattr(context.pipeline, "certify", certify, raising=False)
        measure(certification, context)
        assert asked[-1] == (7, expected, 100, 0.001)


def test_what_cannot_be_certified_is_named_before_the_votes(evaluation_context):
    with pytest.raises(ConfigError, match=r"certification.sigmas=100, .*latents: sigma must be in"):
        measure(certification, evaluation_context("certification.sigmas=[0.5, 100]", "certification.noise=latents"))
    unlabelled = evaluation_context(num_classes=None, energy_channels=3)
    with pytest.raises(ConfigError, match="--suite certification needs classes"):
        measure(certification, unlabelled)
