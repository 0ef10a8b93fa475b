"""Networks that give features, and the distances between sets of features."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_studies import Brightness, scipy_frechet
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3, _compute_fid
from torchmetrics.image.inception import InceptionScore
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from latent_egc.config import ConfigError
from latent_egc.measuring.feature_extractors import (
    frechet_distance,
    inception_score,
    kernel_distance,
    load_extractor,
    moments,
    precision_and_recall,
)

CPU = torch.device("cpu")


@pytest.fixture
def feature_sets():
    """300 and 200 correlated features of dimension 12."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((12, 12))
    return rng.standard_normal((300, 12)) @ mixing, 1.3 * rng.standard_normal((200, 12)) @ mixing + 0.2


# --- distances ------------------------------------------------------------------------------------------------------


def test_frechet_distance_is_scipys_and_torchmetrics(feature_sets):
    first, second = map(moments, feature_sets)
    found = frechet_distance(first, second)
    assert found == pytest.approx(scipy_frechet(*feature_sets), rel=1e-6)
    assert found == pytest.approx(float(_compute_fid(*map(torch.from_numpy, (*first, *second)))), rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(first, moments(feature_sets[0] + 2)) == pytest.approx(4 * 12)


def test_frechet_distance_of_gaussians_in_closed_form():
    """Of commuting covariances: the means' squared distance and that of the deviations along the common axes."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    means, deviations = rng.standard_normal((2, 8)), rng.uniform(0.1, 2, (2, 8))
    gaussians = [(mean, (axes * std**2) @ axes.T) for mean, std in zip(means, deviations, strict=True)]
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_dimensions(feature_sets):
    few = [rows[:8] for rows in feature_sets]
    assert frechet_distance(*map(moments, few)) == pytest.approx(scipy_frechet(*few), rel=1e-3)


def test_kernel_distance_by_hand(feature_sets):
    x, y = (rows[:40] for rows in feature_sets)

    def kernel(a, b):
        return (a @ b.T / 12 + 1) ** 3

    off_diagonal = 1 - np.eye(40)
    within = ((kernel(x, x) + kernel(y, y)) * off_diagonal).sum() / (40 * 39)
    mean, deviation = kernel_distance(x, y, num_subsets=3, subset_size=1000, seed=0)
    assert mean == pytest.approx(within - 2 * kernel(x, y).mean())
    assert deviation == pytest.approx(0, abs=1e-8)  # every subset is the whole


def test_precision_and_recall_by_hand(feature_sets, monkeypatch):
    monkeypatch.setattr("latent_egc.measuring.feature_extractors.POINTS_AT_ONCE", 7)
    real, generated = (rows[:30] for rows in feature_sets)

    def covered(points, support):
        count = 0
        for point in points:
            for centre in support:
                radius = np.sort(np.linalg.norm(support - centre, axis=1))[3]
                if np.linalg.norm(point - centre) <= radius:
                    count += 1
                    break
        return count / len(points)

    assert precision_and_recall(real, generated) == pytest.approx((covered(generated, real), covered(real, generated)))
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real, real + 1e3) == (0, 0)


# --- extractors -----------------------------------------------------------------------------------------------------


def test_torchscript_extractor(extractor):
    images = torch.rand(4, 3, 8, 8)
    loaded = load_extractor(extractor, CPU)
    assert loaded.name == "brightness"
    torch.testing.assert_close(loaded(images), Brightness()(images))


def test_dinov2_extractor(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=56, image_size=224)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path / "tiny-dinov2")
    loaded = load_extractor(str(tmp_path / "tiny-dinov2"), CPU)
    assert loaded.name == "tiny-dinov2"
    images = torch.rand(2, 3, 224, 224)  # of this size nothing is resized
    normalised = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(loaded(images), network(normalised).last_hidden_state[:, 0])
    # Other sizes are resized as published: Pillow's bicubic kernel on floats, aspect and all, then clipped.
    small = torch.rand(1, 3, 20, 32)
    pictures = [Image.fromarray(channel.numpy()).resize((224, 224), Image.Resampling.BICUBIC) for channel in small[0]]
    resized = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).clamp(0, 1)
    torch.testing.assert_close(loaded(small), loaded(resized[None]), rtol=1e-4, atol=1e-4)


def test_inception_score_by_hand():
    """Uniform logits score 1, sure and balanced ones the number of classes; between them, the definition."""
    assert inception_score(torch.zeros(40, 4), seed=0) == (pytest.approx(1), pytest.approx(0))
    sure = 50 * torch.eye(4).repeat(10, 1)
    assert inception_score(sure, seed=0, num_splits=1)[0] == pytest.approx(4)
    logits = torch.randn(40, 4)
    p = logits.double().softmax(1).numpy()
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(logits, seed=0, num_splits=1)[0] == pytest.approx(expected, rel=1e-5)
    in_parts = inception_score(logits, seed=0)
    torch.rand(1)
    assert inception_score(logits, seed=0) == in_parts


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_it_needs():
    with pytest.raises(
        ConfigError, match=r"generation.features: inception needs torch-fidelity, which needs torchvision"
    ):
        load_extractor("inception", CPU)


def test_inception_is_torchmetrics(tmp_path, monkeypatch):
    """Features, FID and Inception score are those of torchmetrics' own metrics, on random weights."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed: it needs torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        weights = NoTrainInceptionV3("random", ["2048"]).state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth")
    images = torch.randint(0, 256, (2, 6, 3, 32, 32), dtype=torch.uint8)
    extractor = load_extractor("inception", CPU)
    features = [extractor(part / 255) for part in images]
    metric = FrechetInceptionDistance(feature=2048, antialias=False)
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    assert frechet_distance(*(moments(part.numpy()) for part in features)) == pytest.approx(
        float(metric.compute()), rel=1e-3
    )
    metric = InceptionScore(splits=1)
    metric.inception.use_antialias = False
    metric.update(images[1])
    score = inception_score(extractor.to_logits(features[1]), seed=0, num_splits=1)[0]
    assert score == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_extractor_errors(tmp_path, extractor):
    with pytest.raises(ConfigError, match=r"generation.features: no such weights file: none.pt; a TorchScript module"):
        load_extractor("none.pt", CPU)
    torch.save({"a": 1}, tmp_path / "dict.pt")
    with pytest.raises(ConfigError, match=r"dict.pt cannot be loaded; a TorchScript module"):
        load_extractor(str(tmp_path / "dict.pt"), CPU)
    with pytest.raises(ConfigError, match=r"neither a TorchScript file .* nor a DINOv2"):
        load_extractor(str(tmp_path / "nothing"), CPU)
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="is a bert; only dinov2 is supported"):
        load_extractor(str(tmp_path / "bert"), CPU)
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "maps.pt")
    with pytest.raises(ConfigError, match=r"extractor maps must return \(2, D\) features, got \(2, 3, 8, 8\)"):
        load_extractor(str(tmp_path / "maps.pt"), CPU)(torch.rand(2, 3, 8, 8))
