"""Heads on frozen features."""

import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from latent_egc.config import ConfigError
from latent_egc.measuring.probe_heads import (
    FusionHead,
    HeadsSettings,
    cnn_head,
    fit_head,
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
    optimizer = torch.optim.SGD(head.parameters(), 0.05, momentum=0.9)
    train_head(head, optimizer, [torch.from_numpy(features)], torch.from_numpy(labels), 60, 64, seed=0)
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
    build = {
        "MLP": lambda: mlp_head(2, 2, 2, 16),
        "CNN": lambda: cnn_head(2, 2, 16),
        "attention": lambda: FusionHead([(2, 2)], 1, 2, 16),
    }[kind]
    settings = HeadsSettings(epochs=30, learning_rates=(1e-2,))
    head, chosen = fit_head(build, [maps], labels, settings, 0.2, seed=0)
    assert chosen == "learning rate 0.01, weight decay 0.05"
    assert (predict(head, [maps], 100) == labels).double().mean() > 0.97


def test_held_out_rows_choose_among_settings_and_all_rows_train():
    """The best of four is not the first; what is returned is that one, as trained on every row with the same seed."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, 300))
    maps = torch.from_numpy(rng.standard_normal((300, 3, 1, 1)).astype(np.float32)) + labels[:, None, None, None]
    settings = HeadsSettings(epochs=5, learning_rates=(1e-9, 1e-2), weight_decays=(0.0, 1e3))

    def build():
        return linear_head(3, 1, 2)

    head, chosen = fit_head(build, [maps], labels, settings, 0.2, seed=3)
    assert re.fullmatch(r"learning rate 0\.01, weight decay 0, of 4 by \d\d\.\d% of the held-out rows", chosen)
    torch.manual_seed(3)
    expected = build()
    optimizer = torch.optim.AdamW(expected.parameters(), 1e-2, weight_decay=0)
    train_head(expected, optimizer, [maps], labels, 5, settings.train_batch_size, seed=3)
    assert torch.equal(head[1].weight, expected[1].weight)
    with pytest.raises(ConfigError, match=r"linear\.held_out"):
        fit_head(build, [maps[:2]], labels[:2], settings, 0.2, seed=3)


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
