"""The suite generation."""

import numpy as np
import pytest
import torch
from tiny_studies import Brightness, measure, scipy_frechet

from latent_egc.config import ConfigError
from latent_egc.measuring.feature_extractors import precision_and_recall
from latent_egc.measuring.judges import reconstructed
from latent_egc.measuring.sample_quality import sample_images
from latent_egc.measuring.suites import generation

FAST = ["generation.num_samples=9", "generation.num_inference_steps=2", "generation.kid_subsets=3"]


def test_suite_by_hand(evaluation_context, extractor, tmp_path):
    """FD on features computed here is the reported one; agreement is the judge's, sample by sample."""
    torch.jit.script(Brightness(as_logits=True)).save(tmp_path / "judge.pt")
    context = evaluation_context(
        f"generation.features=[{extractor}]", f"generation.judge={tmp_path / 'judge.pt'}", *FAST
    )
    result = measure(generation, context)
    samples = sample_images(context, 9, np.arange(9) % 3, num_inference_steps=2)
    assert result.num_samples == 9
    train = context.splits.train
    real = Brightness()(context.pixel_values(train, range(len(train))) / 2 + 0.5).numpy()
    generated = Brightness()(samples / 255).numpy()
    assert result.metrics["FD-brightness"].value == pytest.approx(scipy_frechet(real, generated), rel=1e-3)
    assert result.metrics["recall-brightness"].value == precision_and_recall(real, generated)[1]
    agreement = (Brightness(as_logits=True)(samples / 255).argmax(1).numpy() == np.arange(9) % 3).mean()
    assert result.metrics["class agreement by judge"].value == pytest.approx(agreement)
    assert [(figure.name, figure.shows_data) for figure in result.figures] == [("samples", False), ("neighbours", True)]
    assert "guidance scale 2" in result.notes[0]


def test_samples_and_validation_images_have_each_their_own_precision_and_recall(
    evaluation_context, extractor, monkeypatch
):
    monkeypatch.setattr(generation, "precision_and_recall", lambda real, other: (other.mean(), other.std()))
    context = evaluation_context(f"generation.features=[{extractor}]", *FAST)
    metrics = measure(generation, context).metrics
    samples = sample_images(context, 9, np.arange(9) % 3, num_inference_steps=2)
    decoded = reconstructed(context, context.splits.validation, context.rows)
    for whose, images in (("", samples), (", validation images through the autoencoder", decoded)):
        features = Brightness()(images / 255).numpy()
        found = [metrics[f"{name}-brightness{whose}"].value for name in ("precision", "recall")]
        assert found == pytest.approx([features.mean(), features.std()], rel=1e-5)


def test_samples_do_not_depend_on_the_batches(evaluation_context):
    labels = np.arange(9) % 3
    contexts = [evaluation_context(f"batch_size={size}", *FAST) for size in (2, 9)]
    batches = [sample_images(context, 9, labels, num_inference_steps=2) for context in contexts]
    assert (batches[0].int() - batches[1].int()).abs().max() <= 1


def test_linear_judge_knows_brightness(evaluation_context, extractor):
    few = ["generation.num_samples=6", "num_images=5"]
    context = evaluation_context(f"generation.features=[{extractor}]", *FAST, *few)
    with pytest.warns(UserWarning, match="FD-brightness: 6 samples for 6 feature dimensions"):
        result = measure(generation, context)
    assert "class agreement by logistic regression on brightness" in result.metrics
    assert any("6 samples for 6 feature dimensions" in note for note in result.notes)
    assert any("5 validation images for 6 feature dimensions" in note for note in result.notes)
    assert any("judge was trained on 14 training images" in note for note in result.notes)


def test_unlabelled_pipelines_are_sampled_without_labels(evaluation_context, extractor):
    context = evaluation_context(f"generation.features=[{extractor}]", *FAST, num_classes=None, energy_channels=3)
    result = measure(generation, context)
    assert "FD-brightness" in result.metrics
    assert not [name for name in result.metrics if "agreement" in name]


def test_suite_errors(evaluation_context, extractor, tmp_path):
    with pytest.raises(ConfigError, match=r"generation.features must name at least one extractor"):
        measure(generation, evaluation_context(*FAST))
    context = evaluation_context(f"generation.features=[{extractor}]", f"generation.judge={extractor}", *FAST)
    with pytest.raises(ConfigError, match=r"generation.judge: .* tells 6 classes apart, the pipeline has 3"):
        measure(generation, context)
