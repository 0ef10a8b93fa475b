"""The linear probe."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from latent_egc.config import ConfigError
from latent_egc.measuring.probe_heads import LinearSettings, linear_probe


def test_linear_probe_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 160)
    features = (rng.standard_normal((160, 2, 2, 2)) * 5 + 2 * labels[:, None, None, None] + 7).astype(np.float32)
    features[:, 0, 0, 0] = 4.0  # constant
    config = LinearSettings(c=(1e-4, 1e-2, 1.0), held_out=0.25)
    score, predicted = linear_probe(features[:100], labels[:100], features[100:], labels[100:], config, seed=3)

    scaler = StandardScaler().fit(features[:100].reshape(100, -1))
    train, test = (scaler.transform(x.reshape(len(x), -1)) for x in (features[:100], features[100:]))
    order = np.random.default_rng(3).permutation(100)
    held_out, fitting = order[:25], order[25:]
    accuracies = []
    for c in config.c:
        model = LogisticRegression(C=c, max_iter=100).fit(train[fitting], labels[fitting])
        accuracies.append((model.predict(train[held_out]) == labels[held_out]).mean())
    best_c = config.c[int(np.argmax(accuracies))]
    model = LogisticRegression(C=best_c, max_iter=100).fit(train, labels[:100])
    assert score.held_out == pytest.approx(max(accuracies))
    assert score.c == best_c
    assert np.array_equal(predicted, model.predict(test))
    assert score.accuracy == pytest.approx((model.predict(test) == labels[100:]).mean())
    with pytest.raises(ConfigError, match=r"linear.held_out=0.25 of 1 training rows leaves"):
        linear_probe(features[:1], labels[:1], features, labels, config, seed=0)
