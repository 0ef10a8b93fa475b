"""The suite cka."""

import numpy as np
import pytest
from tiny_studies import measure, values

from latent_egc.measuring.probe_context import Place
from latent_egc.measuring.suites import cka
from latent_egc.measuring.suites.cka import linear_cka


def test_cka_is_the_formula_of_its_definition():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3, 2, 2))
    y = np.concatenate([x[:, :2] ** 2, rng.standard_normal((40, 1, 2, 2))], axis=1)
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    found = linear_cka([x, y, 3 * x.reshape(40, 12) @ rotation + 5])
    x, y = (a.reshape(40, -1) - a.reshape(40, -1).mean(axis=0) for a in (x, y))
    expected = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert found[0, 1] == pytest.approx(expected)
    assert found[0, 2] == pytest.approx(1)
    assert np.diag(found) == pytest.approx(np.ones(3))
    assert np.isnan(linear_cka([x, np.ones((40, 2))])[0, 1])


def test_cka_of_blocks_and_timesteps(probe_context):
    probe = probe_context("block=mid.0", "timestep=90", "pooling=1", "cka.num_images=5")
    result = measure(cka, probe)
    assert result.num_samples == 5
    blocks = [probe.features("validation", Place(b, 90, 2))[:5] for b in ("in", "up.0.1")]
    steps = [probe.features("validation", Place("mid.0", t, 2))[:5] for t in (0, 90)]
    assert list(values(result).values()) == pytest.approx([linear_cka(a)[0, 1] for a in (blocks, steps)])
