"""The suite composition."""

import numpy as np
import pytest
import torch
from tiny_studies import Brightness, measure

from latent_egc.config import ConfigError
from latent_egc.data.stream import noise_generator
from latent_egc.measuring.judges import pixel_judge
from latent_egc.measuring.suites import composition

FAST = ["composition.num_samples=5", "composition.num_inference_steps=2", "composition.num_corrector_steps=1"]


def test_suite_by_hand(evaluation_context, tmp_path):
    """Shares by a judge whose ranking is computed here too, of samples drawn here too."""
    torch.jit.script(Brightness(as_logits=True)).save(tmp_path / "judge.pt")
    asked = ['composition.all_of=["cat","dog"]', 'composition.none_of=["cow"]']
    context = evaluation_context(f"composition.judge={tmp_path / 'judge.pt'}", "batch_size=2", *asked, *FAST)
    result = measure(composition, context)
    assert result.num_samples == 6 * 5
    options = {"num_images": 5, "num_inference_steps": 2, "output_type": "pt"}
    generators = [noise_generator(0, i) for i in range(5)]
    images = context.pipeline.compose(all_of=["cat", "dog"], generator=generators, **options).images
    ranked = Brightness(as_logits=True)((images.clamp(0, 1) * 255).round() / 255).argsort(dim=1, descending=True)
    share = np.mean([set(row[:2]) == {0, 2} for row in ranked.tolist()])
    assert result.metrics["likeliest are cat and dog: cat AND dog"].value == pytest.approx(share)
    generators = [noise_generator(0, i) for i in range(5)]
    images = context.pipeline.compose(none_of="cow", generator=generators, **options).images
    share = (Brightness(as_logits=True)(images).argmax(dim=1) == 1).double().mean()
    assert result.metrics["judged cow: NOT cow"].value == pytest.approx(float(share))
    assert {"likeliest are cat and dog: cat", "judged cow: unlabelled", "judged cow: NOT cow, mala"} < {*result.metrics}
    assert 0 < result.metrics["acceptance rate: cat AND dog, mala"].value <= 1
    assert [figure.shows_data for figure in result.figures] == [False]
    assert "guidance scale 2" in result.notes[0]


def test_a_judge_is_made_of_training_images(evaluation_context):
    result = measure(composition, evaluation_context(*FAST, "composition.corrector=ula"))
    assert "likeliest are cat and cow: cat AND cow, ula" in result.metrics
    assert "14 training images" in result.notes[1]


def test_no_guidance_is_refused_and_not_the_pipelines_own(evaluation_context):
    with pytest.raises(ConfigError, match=r"composition.guidance_scale must be positive, .* got 0"):
        measure(composition, evaluation_context("composition.guidance_scale=0"))


def test_the_pixel_judge_gives_no_score_to_a_class_that_it_never_saw(evaluation_context):
    context = evaluation_context(*FAST)
    train = context.splits.train
    train.labels[train.labels == 1] = -1  # two classes are left, for which scikit-learn has another layout
    images = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    scores = pixel_judge(context, 10).scores(images)
    assert scores.shape == (2, 3)
    assert np.isneginf(scores[:, 1]).all()
    assert np.array_equal(scores[:, 0], -scores[:, 2])


def test_errors(evaluation_context, tmp_path):
    with pytest.raises(
        ConfigError, match=r"composition.none_of must be some of the classes cat, cow, dog, got \['x'\]"
    ):
        measure(composition, evaluation_context('composition.none_of=["x"]', *FAST))
    with pytest.raises(ConfigError, match="--suite composition needs classes"):
        measure(composition, evaluation_context(*FAST, num_classes=None, energy_channels=3))
    torch.jit.script(Brightness()).save(tmp_path / "six.pt")
    with pytest.raises(ConfigError, match=r"composition.judge: .* tells 6 classes apart, the pipeline has 3"):
        measure(composition, evaluation_context(f"composition.judge={tmp_path / 'six.pt'}", *FAST))
