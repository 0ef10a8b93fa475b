"""Heads on frozen features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from latent_egc.measuring.probe_heads import (
    FusionHead,
    HeadsSettings,
    cnn_head,
    linear_head,
    mlp_head,
    predict,
    train_head,
)


def test_sgd_finds_the_logistic_regression():
    """Without penalty both minimise the same convex function of data that no plane separates."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    features = (rng.standard_normal((400, 3, 1, 1)) + labels[:, None, None, None] * 0.7).astype(np.float32)
    head = linear_head(3, 1, 2)
    settings = HeadsSettings(epochs=60, sgd_learning_rate=0.05)
    train_head(head, [torch.from_numpy(features)], torch.from_numpy(labels), settings, seed=0, optimizer="sgd")
    expected = LogisticRegression(C=1e6).fit(features.reshape(400, 3), labels)
    weight = head[1].weight[1] - head[1].weight[0]
    assert weight.tolist() == pytest.approx(expected.coef_[0].tolist(), abs=0.05)


@pytest.mark.parametrize("kind", ["MLP", "CNN", "attention"])
def test_heads_learn_what_no_plane_separates(kind):
    rng = np.random.default_rng(0)
    corners = rng.choice([-1.0, 1.0], (256, 2))
    labels = (corners.prod(axis=1) > 0).astype(int)
    maps = np.tile(corners[:, :, None, None], (1, 1, 2, 2)) + 0.2 * rng.standard_normal((256, 2, 2, 2))
    maps, labels = torch.from_numpy(maps.astype(np.float32)), torch.from_numpy(labels)
    torch.manual_seed(0)
    head = {
        "MLP": lambda: mlp_head(2, 2, 2, 16),
        "CNN": lambda: cnn_head(2, 2, 16),
        "attention": lambda: FusionHead([(2, 2)], 1, 2, 16),
    }[kind]()
    train_head(head, [maps], labels, HeadsSettings(epochs=30, learning_rate=1e-2), seed=0)
    assert (predict(head, [maps], 100) == labels).double().mean() > 0.97


@torch.no_grad()
def test_difformer_attends_within_and_joins_over_timesteps():
    torch.manual_seed(0)
    both = FusionHead([(3, 2), (5, 1)], 2, 4, 8).eval()
    one = FusionHead([(3, 2), (5, 1)], 1, 8, 8).eval()
    shared = {name: tensor for name, tensor in both.state_dict().items() if not name.startswith("out")}
    one.load_state_dict(shared, strict=False)
    one.out.weight.copy_(torch.eye(8))
    one.out.bias.zero_()
    first, second = ([torch.randn(6, 3, 2, 2), torch.randn(6, 5, 1, 1)] for _ in range(2))
    expected = both.out(torch.cat([one(*first), one(*second)], dim=1))
    torch.testing.assert_close(both(*first, *second), expected)
    # A transformer without positions would not see that one map's positions were exchanged.
    assert not torch.allclose(one(first[0].flip(-1), first[1]), one(*first))
