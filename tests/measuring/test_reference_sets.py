"""What samples are compared with: features kept beside the data, and files in the layout of ADM's evaluator."""

import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from command_line import fails
from PIL import Image
from tiny_studies import Brightness, measure, scipy_frechet

from latent_egc.commands import main
from latent_egc.config import ConfigError
from latent_egc.measuring.feature_extractors import INCEPTION, Extractor, load_extractor, moments
from latent_egc.measuring.image_archives import read_archive
from latent_egc.measuring.judges import reconstructed
from latent_egc.measuring.reference_sets import ArchivedSet, TrainingSet
from latent_egc.measuring.suites import generation

CPU = torch.device("cpu")
FAST = ["generation.num_samples=9", "generation.num_inference_steps=2", "generation.kid_subsets=3"]


@pytest.fixture
def counted():
    """A function: digest -> an extractor of brightness, whose `seen` says how many images it was given."""

    def make(digest="one"):
        def features(images):
            extractor.seen.append(len(images))
            return Brightness()(images)

        extractor = Extractor("counted", features, digest)
        object.__setattr__(extractor, "seen", [])
        return extractor

    return make


def kept_files():
    return sorted(Path(datasets.config.HF_DATASETS_CACHE, "latent_egc_features").glob("*"))


# --- features of the training split -----------------------------------------------------------------------------------


def test_features_are_computed_once_for_all_networks_and_reports(evaluation_context, counted):
    first, extractor = evaluation_context(), counted()
    found = TrainingSet(first, None).features(extractor)
    assert sum(extractor.seen) == 14
    train = first.splits.train
    expected = Brightness()(first.pixel_values(train, range(14)) / 2 + 0.5).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    other, again = evaluation_context("batch_size=3", head="inner"), counted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(TrainingSet(other, None).features(again), found)
    assert again.seen == []
    few = TrainingSet(first, 6)
    assert len(few.features(extractor)) == 6 == len(few)
    np.testing.assert_array_equal(few.features(extractor), found[few.rows])
    assert len(kept_files()) == 2


def test_features_of_other_weights_or_images_are_computed_again(evaluation_context, counted):
    context = evaluation_context()
    TrainingSet(context, None).features(counted())
    changed = counted("two")
    with pytest.warns(UserWarning, match="made of other extractor, its features are computed again"):
        TrainingSet(context, None).features(changed)
    assert sum(changed.seen) == 14
    folder = Path(context.data.data_dir)
    for path in folder.rglob("*.png"):
        Image.fromarray(np.full((8, 8, 3), 9, dtype=np.uint8)).save(path)
    with pytest.warns(UserWarning, match="made of other images, its features are computed again"):
        found = TrainingSet(evaluation_context(), None).features(counted("two"))
    np.testing.assert_allclose(found[:, :3], 9 / 255, rtol=1e-3)
    assert len(kept_files()) == 1


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_features_are_computed_again(evaluation_context, counted, damage):
    context = evaluation_context()
    found = TrainingSet(context, None).features(counted())
    (path,) = kept_files()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content[:-8] if damage == "cut" else content)
    extractor = counted()
    with pytest.warns(UserWarning, match="is damaged, its features are computed again"):
        np.testing.assert_array_equal(TrainingSet(context, None).features(extractor), found)
    assert sum(extractor.seen) == 14
    TrainingSet(context, None).features(extractor)
    assert sum(extractor.seen) == 14


def test_a_place_that_cannot_be_written_ends_no_study(evaluation_context, counted, tmp_path):
    context = evaluation_context()
    Path(datasets.config.HF_DATASETS_CACHE, "latent_egc_features").write_text("a file")
    with pytest.warns(UserWarning, match="are not kept for the next time"):
        assert len(TrainingSet(context, None).features(counted())) == 14


def test_corrupt_images_are_looked_for_once(evaluation_context, counted, monkeypatch):
    context = evaluation_context()
    context.data = context.data.__class__(**{**vars(context.data), "skip_corrupt": True})
    table = context.splits.train
    monkeypatch.setattr(type(table), "is_readable", lambda self, row: row != 5)
    with pytest.warns(UserWarning, match="skipped 1 corrupt images of the train split, the first is row 5"):
        found = TrainingSet(context, None).features(counted())
    assert len(found) == 13
    again = TrainingSet(context, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(again.features(counted()), found)
    assert len(again) == 13
    assert 5 not in again.rows


def test_an_extractors_digest_is_of_its_weights(extractor, tmp_path):
    other = tmp_path / "other" / "brightness_features.pt"
    other.parent.mkdir()
    torch.jit.script(Brightness(as_logits=True)).save(other)
    loaded = [load_extractor(path, CPU) for path in (extractor, extractor, str(other))]
    assert loaded[0].digest == loaded[1].digest != loaded[2].digest
    assert len({one.name for one in loaded}) == 1


# --- files ----------------------------------------------------------------------------------------------------------


def images_like(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def features_of(images):
    return Brightness()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()


def test_samples_and_reference_of_files(evaluation_context, extractor, tmp_path):
    """The numbers are those of the features of the files' images; nothing is sampled, and a second call reads less."""
    samples, reference, labels = images_like(12), images_like(20, seed=1), np.arange(12) % 3
    np.savez(tmp_path / "samples.npz", samples, labels)
    np.savez(tmp_path / "reference.npz", reference)
    torch.jit.script(Brightness(as_logits=True)).save(tmp_path / "judge.pt")
    settings = [f"generation.{key}={tmp_path}/{key}.npz" for key in ("samples", "reference")]
    settings += [f"generation.features=[{extractor}]", f"generation.judge={tmp_path / 'judge.pt'}", *FAST]
    context = evaluation_context(*settings)
    context.pipeline.__class__ = type("Silent", (type(context.pipeline),), {"__call__": None})
    result = measure(generation, context)
    expected = scipy_frechet(features_of(reference), features_of(samples))
    assert result.num_samples == 12
    assert result.metrics["FD-brightness"].value == pytest.approx(expected, rel=1e-3)
    judged = Brightness(as_logits=True)(torch.from_numpy(samples).permute(0, 3, 1, 2) / 255).argmax(1).numpy()
    assert result.metrics["class agreement by judge"].value == pytest.approx((judged == labels).mean())
    assert result.notes[0].startswith(f"12 samples of {tmp_path}/samples.npz; compared with 20 images of {tmp_path}")
    assert [figure.name for figure in result.figures] == ["samples", "neighbours"]
    assert len(kept_files()) == 1


def test_statistics_alone_give_the_frechet_distance_alone(evaluation_context, extractor, tmp_path):
    samples, reference = images_like(12), features_of(images_like(20, seed=1))
    mean, covariance = moments(reference)
    np.savez(tmp_path / "samples.npz", samples)
    np.savez(tmp_path / "reference.npz", mu=mean, sigma=covariance)
    settings = [f"generation.{key}={tmp_path}/{key}.npz" for key in ("samples", "reference")]
    result = measure(generation, evaluation_context(*settings, f"generation.features=[{extractor}]", *FAST))
    names = list(result.metrics)
    assert result.metrics["FD-brightness"].value == pytest.approx(
        scipy_frechet(reference, features_of(samples)), rel=1e-3
    )
    assert names == ["FD-brightness", "FD-brightness, validation images through the autoencoder"]
    np.savez(tmp_path / "reference.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(
        ConfigError, match=r"generation.reference: the statistics in .* of 7 features, brightness has 6"
    ):
        measure(generation, evaluation_context(*settings, f"generation.features=[{extractor}]", *FAST))


def test_inception_is_compared_with_the_files_statistics_as_adms_evaluator_does(evaluation_context, tmp_path):
    images, given = images_like(20), moments(np.random.default_rng(2).standard_normal((9, 6)))
    np.savez(tmp_path / "reference.npz", images, mu=given[0], sigma=given[1])
    context = evaluation_context()
    archive = read_archive(str(tmp_path / "reference.npz"), "generation.reference", 8)
    reference = ArchivedSet(context, archive, "generation.reference")
    for name, expected in ((INCEPTION, given), ("other", moments(features_of(images)))):
        extractor = Extractor(name, Brightness(), name)
        found = reference.moments(extractor, reference.features(extractor))
        for part, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "must hold images as arr_0 or statistics as mu and sigma"),
        ({"arr_0": images_like(6, size=4)}, r"\(N, 8, 8, 3\) uint8, the pipeline's size, got \(6, 4, 4, 3\) uint8"),
        ({"arr_0": images_like(6) / 255}, r"got \(6, 8, 8, 3\) float64"),
        ({"arr_0": images_like(3)}, "at least 5 images"),
        ({"arr_0": images_like(6), "arr_1": np.zeros(5, int)}, r"an integer for each image, got \(5,\)"),
        ({"arr_0": images_like(6), "arr_1": np.arange(6)}, r"classes in \[0, 2\], got 0 to 5"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"are \(3,\) and \(2, 2\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "holds statistics only; samples are wanted"),
        (b"no zip", "is not an .npz file of arrays"),
        (None, "generation.samples: no such file"),
    ],
)
def test_files_that_cannot_be_used(evaluation_context, extractor, tmp_path, arrays, message):
    path = tmp_path / "samples.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    context = evaluation_context(f"generation.samples={path}", f"generation.features=[{extractor}]", *FAST)
    with pytest.raises(ConfigError, match=message):
        measure(generation, context)


def test_verb_reference_writes_what_the_suite_reads(evaluation_context, tmp_path, capsys):
    """A split's centre crops and classes, and of some of them those that the suite would choose."""
    context = evaluation_context()
    data = {"dataset": "imagefolder", "data_dir": context.data.data_dir, "validation_fraction": 1 / 3, "image_size": 8}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    command = ["reference", str(tmp_path / "data.yaml"), str(tmp_path / "out.npz")]
    assert main(command) == 0
    assert f"14 images written: {tmp_path / 'out.npz'}" in capsys.readouterr().out
    archive, train = read_archive(str(tmp_path / "out.npz"), "key", 8), context.splits.train
    for number in range(14):
        expected = np.asarray(train.image(number)).transpose(2, 0, 1)
        np.testing.assert_array_equal(archive.images[number].numpy(), expected)
    np.testing.assert_array_equal(archive.labels, train.labels)
    assert main([*command, "--num-images", "6", "--seed", "3"]) == 0
    rows = TrainingSet(evaluation_context("seed=3"), 6).rows
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["arr_1"], train.labels[rows])
    capsys.readouterr()
    fails(capsys, ["reference", str(tmp_path / "none.yaml"), str(tmp_path / "no.npz")], "config file not found")
    assert not (tmp_path / "no.npz").exists()


def test_a_reference_can_be_of_images_as_samples_are_decoded(evaluation_context, tmp_path, capsys):
    context = evaluation_context()
    context.pipeline.vae.save_pretrained(tmp_path / "vae")
    data = {"dataset": "imagefolder", "data_dir": context.data.data_dir, "validation_fraction": 1 / 3, "image_size": 8}
    config = {"model": {"num_classes": 3}, "data": data, "autoencoder": {"path": str(tmp_path / "vae")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = ["reference", str(tmp_path / "run.yaml"), str(tmp_path / "out.npz"), "--through-autoencoder"]
    assert main(command) == 0
    assert f"images written, through {tmp_path / 'vae'}: " in capsys.readouterr().out
    archive, train = read_archive(str(tmp_path / "out.npz"), "key", 8), context.splits.train
    expected = reconstructed(context, train, np.arange(14))
    assert (archive.images.int() - expected.int()).abs().max() <= 1
    assert (archive.images.int() - torch.from_numpy(np.asarray(train.image(0))).permute(2, 0, 1)).abs().max() > 1
    np.testing.assert_array_equal(archive.labels, train.labels)
    capsys.readouterr()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | {"autoencoder": {"path": None}}))
    fails(capsys, command, "--through-autoencoder", "pixel space")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | {"data": data | {"image_size": 9}}))
    (tmp_path / "out.npz").unlink()
    fails(capsys, command, "data.image_size must be divisible by the autoencoder's factor 2, got 9")
    assert not (tmp_path / "out.npz").exists()
