"""The suite few_shot."""

from itertools import pairwise

import numpy as np
import pytest
import sklearn.metrics
from sklearn.linear_model import LogisticRegression
from tiny_studies import measure, values

from latent_egc.config import ConfigError
from latent_egc.measuring.probe_context import Place
from latent_egc.measuring.suites import few_shot
from latent_egc.measuring.suites.few_shot import draw_shots


def test_draws_are_nested_and_balanced():
    labels = np.random.default_rng(0).integers(0, 4, 200)
    draws = [draw_shots(labels, count, 4, seed=2) for count in (1, 5, 20)]
    for count, chosen in zip((1, 5, 20), draws, strict=True):
        assert np.bincount(labels[chosen]).tolist() == [count] * 4
        assert len(set(chosen)) == 4 * count
    assert all(set(a) < set(b) for a, b in pairwise(draws))
    assert set(draws[2]) != set(draw_shots(labels, 20, 4, seed=3))
    with pytest.raises(ConfigError, match=r"few_shot.shots: 90 images a class, class 0 has \d+ training images"):
        draw_shots(labels, 90, 4, seed=0)


def test_few_shot_accuracy(probe_context):
    probe = probe_context(
        "block=mid.0", "timestep=90", "pooling=2", "few_shot.shots=[1,2]", "few_shot.draws=2", "seed=4"
    )
    result = measure(few_shot, probe)
    train, test = (array.reshape(len(array), -1) for array in probe.standardised(Place("mid.0", 90, 2)))
    for count in (1, 2):
        scores = []
        for seed in (4, 5):
            chosen = draw_shots(probe.train_labels, count, 3, seed)
            model = LogisticRegression(C=0.01).fit(train[chosen], probe.train_labels[chosen])
            scores.append(sklearn.metrics.accuracy_score(probe.labels, model.predict(test)))
        assert values(result)[f"frozen features, {count} a class"] == pytest.approx(np.mean(scores))
        assert result.tables[0].rows[count - 1][2].value == pytest.approx(np.std(scores))
