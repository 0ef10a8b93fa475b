"""The suite counterfactual."""

import numpy as np
import pytest
import torch
from tiny_studies import Brightness, measure, values

from latent_egc.config import ConfigError
from latent_egc.measuring.suites import counterfactual

FAST = [f"counterfactual.{key}" for key in ("num_inference_steps=2", "num_doublings=1", "pgd_steps=2", "num_images=6")]


def test_suite_by_hand(evaluation_context, tmp_path):
    torch.jit.script(Brightness(as_logits=True)).save(tmp_path / "judge.pt")
    context = evaluation_context(f"counterfactual.judge={tmp_path / 'judge.pt'}", *FAST, "counterfactual.l2_eps=[9]")
    result = measure(counterfactual, context)
    assert result.num_samples == 6
    found, pipeline = values(result), context.pipeline
    rows = context.rows[context.choose(np.arange(len(context.rows)), 6)]
    originals = context.pixel_values(context.splits.validation, rows) / 2 + 0.5
    output = pipeline.counterfactual(
        originals, distance_scale=0.3, num_inference_steps=2, num_doublings=1, output_type="pt"
    )
    changed = (output.images * 255).round() / 255
    asked = [context.class_names.index(label) for label in output.labels_asked]
    judged = Brightness(as_logits=True)(changed).argmax(1)
    said = [labels[0] == a for labels, a in zip(pipeline.classify(changed).labels, output.labels_asked, strict=True)]
    assert found["counterfactual: the judge says the class asked for"] == pytest.approx(
        (judged == torch.tensor(asked)).float().mean()
    )
    assert found["counterfactual: the network says the class asked for"] == pytest.approx(np.mean(said))
    far = (changed - originals).flatten(1).norm(dim=1).mean()
    assert found["counterfactual: l2 distance of pixels in [0, 1]"] == pytest.approx(float(far), rel=1e-4)
    assert found["counterfactual: l2 distance of latents"] == pytest.approx(
        float(output.latent_distance.mean()), rel=1e-4
    )
    alone = float(output.autoencoder_distance.mean())
    assert found["autoencoder alone: l2 distance of pixels in [0, 1]"] == pytest.approx(alone, rel=0.02)
    assert 0 < found["attack: l2 distance of pixels in [0, 1]"] < 9.1
    assert [(figure.name, figure.shows_data) for figure in result.figures] == [("counterfactual", True)]


def test_a_linear_judge_on_pixels_or_features(evaluation_context, extractor):
    for settings, name in (([], "pixels"), ([f"counterfactual.features={extractor}"], "brightness")):
        result = measure(counterfactual, evaluation_context(*FAST, *settings))
        assert f"accuracy of the judge (logistic regression on {name}) on decoded images" in result.metrics
        assert any("judge was trained on 14 training images" in note for note in result.notes)


def test_it_needs_classes(evaluation_context):
    with pytest.raises(ConfigError, match="--suite counterfactual needs classes"):
        measure(counterfactual, evaluation_context(*FAST, num_classes=None, energy_channels=3))
