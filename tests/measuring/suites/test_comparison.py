"""The suite comparison."""

import numpy as np
import pytest
import sklearn.metrics
from tiny import tiny_pipeline
from tiny_studies import measure, values

from latent_egc.config import ConfigError
from latent_egc.measuring.denoisers import load_denoiser
from latent_egc.measuring.probe_context import Place
from latent_egc.measuring.suites import comparison


def test_comparison_is_with_the_pipelines_classifier(probe_context):
    probe = probe_context("block=mid.0", "timestep=0", "pooling=2")
    result = measure(comparison, probe)
    names = [probe.class_names[i] for i in probe.labels]
    images = [probe.splits.validation.image(row) for row in range(len(names))]
    own = tiny_pipeline(names=("cat", "cow", "dog")).classify(images).labels
    own = np.array([top[0] == name for top, name in zip(own, names, strict=True)])
    probed = probe.probe(Place("mid.0", 0, 2))[1] == probe.labels
    found = list(values(result).values())
    assert found[:3] == pytest.approx([own.mean(), probed.mean(), probed.mean() - own.mean()])
    table = [row[1:] for row in result.tables[0].rows]
    assert table == sklearn.metrics.confusion_matrix(~own, ~probed, labels=[False, True]).tolist()


def test_comparison_needs_the_pipelines_own_classes(probe_context, tmp_path):
    tiny_pipeline(names=("a", "b", "c")).save_pretrained(tmp_path / "other")
    probe = probe_context("block=mid.0", "timestep=0", "pooling=1", denoiser=load_denoiser(str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="needs the energy network's own classes"):
        measure(comparison, probe)
