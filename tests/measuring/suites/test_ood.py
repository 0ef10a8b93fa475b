"""The suite ood."""

import numpy as np
import pytest
import sklearn.metrics
import yaml
from PIL import Image, ImageOps
from tiny import write_images
from tiny_studies import measure

from latent_egc.config import ConfigError, load_data_config
from latent_egc.data.sources import load_splits
from latent_egc.measuring.suites import ood
from latent_egc.measuring.suites.ood import fpr_at_95


@pytest.fixture
def other(tmp_path) -> str:
    """A data file for 4 images of other classes: negatives, or they would be the very images of the first folder."""
    write_images(tmp_path / "other", classes=("sun", "snow"), per_class=6)
    for path in (tmp_path / "other").rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    data = {"dataset": "imagefolder", "data_dir": str(tmp_path / "other"), "validation_fraction": 1 / 3}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"data": data}))
    return f"ood.data={tmp_path / 'other.yaml'}"


def test_fpr_is_scikit_learns():
    """In-distribution as positive class: the lowest false positive rate with at least 95 % true positives."""
    rng = np.random.default_rng(0)
    is_ood, scores = np.repeat([0, 1], [300, 200]), rng.standard_normal(500) + np.repeat([0, 2], [300, 200])
    false, true, _ = sklearn.metrics.roc_curve(1 - is_ood, -scores, drop_intermediate=False)
    assert fpr_at_95(is_ood, scores) == pytest.approx(false[true >= 0.95].min())
    assert fpr_at_95(is_ood, np.where(is_ood, 5.0, scores)) == 0
    assert fpr_at_95(is_ood, np.where(is_ood, -5.0, scores)) == 1


def test_suite_by_hand(evaluation_context, other):
    context = evaluation_context(other, "ood.timesteps=[100]")
    result = measure(ood, context)
    assert result.num_samples == 7 + 4
    energies, logits = context.energies_and_logits(context.latents, 0)
    table = load_splits(load_data_config(other.removeprefix("ood.data=")), None).validation
    strange = context.pipeline.classify([table.image(i) for i in range(4)])
    scores = {
        "energy, clean latents": (energies, strange.energy),
        "maximum probability": tuple(-x.double().softmax(1).amax(1) for x in (logits, strange.logits)),
    }
    for (name, (own, others)), row in zip(scores.items(), result.tables[0].rows, strict=False):
        # AUROC is the probability of the right order, a tie being half of it.
        wins = ((others[:, None] > own).double() + 0.5 * (others[:, None] == own)).mean()
        assert result.metrics[f"AUROC, {name}"].value == pytest.approx(float(wins))
        values = np.concatenate([own.numpy(), others.numpy()])
        expected = sklearn.metrics.average_precision_score([0] * 7 + [1] * 4, values)
        assert result.metrics[f"AUPR, {name}"].value == pytest.approx(expected)
        # All 7 own scores lie below the threshold that accepts at least 95 % of them.
        expected = (others <= own.max()).double().mean()
        assert result.metrics[f"FPR95, {name}"].value == pytest.approx(float(expected))
        assert row == [name, *(result.metrics[f"{title}, {name}"] for title in ("AUROC", "AUPR", "FPR95"))]
    assert list(result.metrics)[6] == "AUROC, energy at timestep 100"


def test_unlabelled_pipelines_have_an_energy_too(evaluation_context, other):
    result = measure(ood, evaluation_context(other, "ood.num_images=3", num_classes=None, energy_channels=3))
    assert result.num_samples == 7 + 3
    assert "AUROC, maximum probability" not in result.metrics


def test_errors(evaluation_context, other):
    with pytest.raises(ConfigError, match=r"ood.data must name a YAML file"):
        measure(ood, evaluation_context())
    with pytest.raises(ConfigError, match=r"ood.timesteps must be below 1000, got \[1000\]"):
        measure(ood, evaluation_context(other, "ood.timesteps=[1000]"))
