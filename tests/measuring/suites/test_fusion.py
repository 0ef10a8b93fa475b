"""The suite fusion."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny_studies import TINY_HEADS, measure, values

from latent_egc.measuring.probe_context import Place
from latent_egc.measuring.probe_heads import FusionHead, train_head
from latent_egc.measuring.suites import fusion
from latent_egc.measuring.suites.fusion import DifFeed, chosen_sources


def test_difffeed_starts_as_one_pass_and_trains_the_feedback_alone(probe_context):
    denoiser = probe_context(extract=False).denoiser
    torch.manual_seed(0)
    means = {"mid.0": torch.randn(16, 1, 1), "up.0.1": torch.randn(8, 2, 2)}
    deviations = {block: mean.abs() + 0.5 for block, mean in means.items()}
    head = FusionHead([(16, 1), (8, 2)], 1, 3, 8)
    model = DifFeed(denoiser, 90, means, deviations, head)
    latents, labels = torch.randn(6, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    maps = denoiser.features(latents, 90)
    pooled = [torch.nn.functional.adaptive_avg_pool2d(maps[block], m.shape[-1]) for block, m in means.items()]
    standard = [(x - m) / d for x, m, d in zip(pooled, means.values(), deviations.values(), strict=True)]
    torch.testing.assert_close(model.eval()(latents), head(*standard))

    network = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}
    last = [layers[-1].weight.clone() for layers in model.feedback]
    train_head(model, torch.optim.AdamW(model.parameters(), 0.01), [latents], labels, 3, 64, seed=0)
    assert all(torch.equal(network[name], tensor) for name, tensor in denoiser.network.state_dict().items())
    assert not any(torch.equal(before, layers[-1].weight) for before, layers in zip(last, model.feedback, strict=True))
    before = model.eval()(latents)
    with torch.no_grad():
        for layers in model.feedback:
            layers[-1].weight.zero_()
    assert not torch.allclose(model(latents), before)


def test_fusion(probe_context):
    probe = probe_context(*TINY_HEADS, "fusion.num_blocks=2", "fusion.feedback_epochs=1", "fusion.feedback_images=8")
    blocks, timesteps = chosen_sources(probe, probe.settings.fusion)
    best = {b: max(s.held_out for p, s in probe.scores.items() if p.block == b) for b in probe.cache.blocks}
    assert {best[b] for b in blocks} <= set(sorted(best.values())[-2:])
    assert timesteps == [0, 90]
    result = measure(fusion, probe)
    assert [name.split(" at ")[0] for name in result.metrics] == ["concatenation, linear probe", "DifFormer", "DifFeed"]
    assert result.notes[-2] == "DifFormer: learning rate 0.001, weight decay 0.05."
    assert "1 epochs of 8 rows, learning rate 0.001" in result.notes[-1]
    # Concatenation, by hand: the features beside one another, standardised, the penalty given.
    p = probe.place.pooling
    places = [Place(b, t, p) for t in timesteps for b in blocks]
    train, test = (
        np.concatenate([probe.standardised(x)[i].reshape(n, -1) for x in places], 1) for i, n in ((0, 14), (1, 7))
    )
    model = LogisticRegression(C=0.01, max_iter=100).fit(train, probe.train_labels)
    assert values(result)["concatenation, linear probe"] == pytest.approx(model.score(test, probe.labels))
    probe = probe_context("fusion.blocks=[mid.0]", "fusion.timesteps=[90]")
    assert chosen_sources(probe, probe.settings.fusion) == (["mid.0"], [90])
