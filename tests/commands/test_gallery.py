"""The verb gallery, run in this process on tiny pipelines."""

import numpy as np
import pytest
import torch
import yaml
from command_line import fails
from PIL import Image
from tiny import tiny_pipeline, write_images

from latent_egc.commands import main
from latent_egc.config import DataConfig
from latent_egc.measuring import gallery as pictures
from latent_egc.measuring.gallery import PICTURES, Gallery, first_images
from latent_egc.pipelines.images import crop_images


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """As little of everything as shows it."""
    monkeypatch.setattr(pictures, "COLUMNS", 4)
    monkeypatch.setattr(pictures, "BUDGETS", (1, 3))
    monkeypatch.setattr(pictures, "NUM_IMAGES", 2)
    monkeypatch.setattr(pictures, "VOTES", {"n0": 4, "n": 10, "alpha": 0.4})


@pytest.fixture
def run(tmp_path) -> str:
    """A run's folder: a pipeline with the classes cat, n01440764_dog and cow, and which images it was trained on."""
    names = ("cat", "n01440764_dog", "cow")
    tiny_pipeline(names=names).save_pretrained(tmp_path / "run" / "pipeline")
    data = write_images(tmp_path / "data", classes=sorted(names))
    section = {"dataset": "imagefolder", "data_dir": data.data_dir, "image_size": 8, "validation_fraction": 1 / 3}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": section}))
    return str(tmp_path / "run")


def test_every_picture_is_drawn_and_none_is_overwritten(run, tmp_path, capsys):
    output = tmp_path / "new" / "gallery"
    assert main(["gallery", run, "--output", str(output), "--steps=2", "--sigmas", "0.5", "0.5"]) == 0
    assert capsys.readouterr().out.count(".png") == 6
    names = ["certificates", "composition", "editing", "guidance", "selection", "solvers"]
    assert sorted(PICTURES) == names
    assert sorted(path.name for path in output.iterdir()) == [f"{name}.png" for name in names]
    for path in output.iterdir():
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert min(picture.shape[:2]) > 130
        assert picture.std() > 10
    before = {path: path.read_bytes() for path in output.iterdir()}
    fails(capsys, ["gallery", run, "--output", output, "--only", "editing"], output / "editing.png", "exists already")
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_only_some_as_jpeg_of_given_images(run, tmp_path):
    for number in range(3):
        Image.new("RGB", (9, 12), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    given = ["--images", *(str(tmp_path / f"{number}.png") for number in range(3)), "--classes", "cow", "0"]
    output = ["--output", str(tmp_path / "gallery"), "--only", "composition", "editing", "--format=jpg"]
    assert main(["gallery", run, *given, *output, "--steps=2", "--strength=0.5"]) == 0
    found = {path.name: Image.open(path).format for path in (tmp_path / "gallery").iterdir()}
    assert found == {"composition.jpg": "JPEG", "editing.jpg": "JPEG"}


def test_own_samples_are_edited_where_the_data_are_not_there(run, tmp_path, capsys):
    section = {"dataset": "imagefolder", "data_dir": str(tmp_path / "gone")}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": section}))
    assert main(["gallery", run, "--output", str(tmp_path / "gallery"), "--only=certificates", "--steps=1"]) == 0
    assert "own samples are edited" in capsys.readouterr().err


def test_what_is_compared_begins_with_the_same_noise_and_is_what_the_pipeline_samples(run):
    pipeline = tiny_pipeline(names=("cat", "n01440764_dog", "cow"))
    own = pipeline.scheduler
    gallery = Gallery(pipeline, torch.rand(2, 3, 8, 8), num_inference_steps=2, seed=3)
    (panel,) = pictures.guidance(gallery)
    assert panel.column_names == ["cat", "dog", "cow"]
    generators = [torch.Generator().manual_seed(3 * 2**20 + number) for number in range(3)]
    expected = pipeline([0, 1, 2], num_inference_steps=2, guidance_scale=4.0, generator=generators, output_type="np")
    np.testing.assert_allclose(panel.images[pictures.SCALES.index(4.0)], expected.images, atol=1e-5)
    agreed = [labels[0] for labels in pipeline.classify(expected.images).labels]
    count = sum(label == name for label, name in zip(agreed, pipeline.id2label.values(), strict=True))
    assert panel.row_names[2] == f"scale 4\n{count} of 3 so classified"
    panels = pictures.solvers(gallery)
    assert pipeline.scheduler is own
    assert [len(panel.images) for panel in panels] == [5, 5]
    # Samples of one seed are not those of another.
    (other,) = pictures.guidance(Gallery(pipeline, gallery.images, num_inference_steps=2, seed=4))
    assert np.abs(other.images - panel.images).max() > 0.01


def test_two_classes_are_drawn_but_for_their_and_and_or():
    pipeline = tiny_pipeline(names=("cat", "dog"), num_classes=2)
    (panel,) = pictures.composition(Gallery(pipeline, torch.rand(2, 3, 8, 8), num_inference_steps=1))
    assert [name.split("\n")[0] for name in panel.row_names] == ["unlabelled", "NOT cat", "with MALA"]


def test_first_images_are_those_of_the_validation_split(tmp_path):
    pipeline = tiny_pipeline()
    data = DataConfig(**vars(write_images(tmp_path)))
    images = first_images(pipeline, data, count=3)
    table = pictures.load_splits(data, 3).validation
    assert torch.equal(images, crop_images([table.image(row) for row in range(3)], 8))


def test_errors(run, tmp_path, capsys):
    output = ["--output", tmp_path / "gallery"]
    fails(capsys, ["gallery", run, *output, "--only", "guidence"], "--only", "'guidence'", "guidance, solvers")
    fails(capsys, ["gallery", run, *output, "--classes", "cat", "0"], "two different classes", "cat")
    fails(capsys, ["gallery", run, *output, "--classes", "cat", "dg"], "dg")
    fails(capsys, ["gallery", run, *output, "--strength=2"], "strength must be in [0, 1], got 2")
    fails(capsys, ["gallery", run, *output, "--guidance-scale=0"], "guidance scale", "got 0")
    fails(capsys, ["gallery", run, *output, "--sigmas", "0.5", "99"], "sigma", "99")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    fails(capsys, ["gallery", run, *output, "--images", tmp_path / "one.png"], "at least 2 images")
    tiny_pipeline(num_classes=None, energy_channels=3).save_pretrained(tmp_path / "unlabelled")
    fails(capsys, ["gallery", tmp_path / "unlabelled", *output, "--steps=1"], "trained without classes")
    assert not (tmp_path / "gallery").exists()
