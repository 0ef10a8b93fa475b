"""Sample grids, curves and the metrics file."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from latent_egc.training.checkpoints import read_metrics
from latent_egc.training.figures import Panel, sample_rows, save_curves, save_grid, save_panels

COLOURS = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 1, 1], [1, 0, 1], [1, 1, 0]]], dtype=np.float32)


@pytest.mark.parametrize("title", ["", "step 5"])
@pytest.mark.parametrize("names", [None, ["cat", "a rather long name"]])
@pytest.mark.parametrize("size", [8, 30, 100])
def test_grid_shows_the_given_images_in_their_places(tmp_path, title, names, size):
    """Each colour appears in one square of the right size; the squares lie as rows and columns of the array."""
    images = np.broadcast_to(COLOURS[:, :, None, None], (2, 3, size, size, 3))
    save_grid(images, tmp_path / "grid.png", names, title)
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    shown = size * max(1, round(64 / size))
    centres = np.empty((2, 3, 2))
    for row in range(2):
        for column in range(3):
            ys, xs = np.nonzero((np.abs(picture / 255 - COLOURS[row, column]) < 0.02).all(axis=-1))
            assert abs(len(ys) - shown**2) <= 4 * shown  # the edges of a square may be blended with the gap
            assert np.ptp(ys) < shown + 2
            assert np.ptp(xs) < shown + 2
            centres[row, column] = ys.mean(), xs.mean()
    assert np.ptp(centres[..., 0], axis=1).max() < 1
    assert np.ptp(centres[..., 1], axis=0).max() < 1
    assert (np.diff(centres[..., 0], axis=0) > shown).all()
    assert (np.diff(centres[..., 1], axis=1) > shown).all()
    if names:
        left = picture[:, : int(centres[0, 0, 1] - shown / 2) - 3]
        assert left.min() < 100  # the names


def test_grid_keeps_every_pixel_of_an_image(tmp_path):
    """An enlarged image is the image, each pixel a block."""
    image = np.random.default_rng(0).random((1, 1, 32, 32, 3)).astype(np.float32)
    save_grid(image, tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    expected = (image[0, 0] * 255).round().astype(int)
    # Where the sheet begins depends on the margin, so every place near the corner is tried.
    errors = [
        np.abs(picture[y : y + 64 : 2, x : x + 64 : 2][:32, :32] - expected).max()
        for y in range(picture.shape[0] - 63)
        for x in range(picture.shape[1] - 63)
    ]
    assert min(errors) <= 1


def test_panels_stand_one_above_another_and_their_names_are_inside(tmp_path):
    """The second panel is below the first, both begin at the same place, right of the widest name."""
    wide = np.broadcast_to(COLOURS[:1, :, None, None], (1, 3, 64, 64, 3))
    narrow = np.broadcast_to(COLOURS[1:, :1, None, None], (1, 1, 64, 64, 3))
    name = "WWWWWWWWWWWW\nsecond line"
    panels = [Panel(wide, None, "title", ["a", "b\nc", "d"]), Panel(narrow, [name], "a title wider than its image")]
    save_panels(panels, tmp_path / "picture.jpg", "jpg")
    with Image.open(tmp_path / "picture.jpg") as image:
        assert image.format == "JPEG"
    save_panels(panels, tmp_path / "picture.png")
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    corners = []
    for colour in (COLOURS[0, 0], COLOURS[1, 0]):
        ys, xs = np.nonzero((np.abs(picture / 255 - colour) < 0.02).all(axis=-1))
        corners.append((ys.min(), xs.min()))
    assert corners[1][0] >= corners[0][0] + 64
    assert abs(corners[0][1] - corners[1][1]) <= 1
    assert corners[0][0] > 40  # the title, and two lines of names
    assert picture[:, :2].min() == 255  # no name is cut off


def test_rows_are_the_classes_and_equal_seeds_the_same_noise():
    pipeline = tiny_pipeline()
    images = sample_rows(pipeline, [0, 2], 3, 2, seed=1, batch_size=4)
    assert images.shape == (2, 3, 8, 8, 3)
    assert 0 <= images.min() <= images.max() <= 1
    np.testing.assert_allclose(sample_rows(pipeline, [0, 2], 3, 2, seed=1, batch_size=6), images, atol=1e-5)
    assert np.abs(sample_rows(pipeline, [0, 2], 3, 2, seed=2) - images).max() > 1e-3
    assert sample_rows(pipeline, None, 2, 2, batch_size=3).shape == (2, 2, 8, 8, 3)


TRAINING = [{"step": s, "denoising_loss": 1 / s, "classification_loss": 2 / s} for s in range(1, 40)]
VALIDATION = [{"step": s, "validation_denoising_loss": 0.5, "validation_accuracy": 0.1 * s} for s in (5, 10)]


@pytest.mark.parametrize(
    ("rows", "panels"),
    [
        (TRAINING + VALIDATION, 3),
        (TRAINING, 2),
        (TRAINING[:1], 2),
        ([{"step": 1, "denoising_loss": 0.5, "classification_loss": 0.0}], 1),
        ([{"step": 1, "denoising_loss": 0.5}, {"step": 1, "validation_denoising_loss": 0.5}], 1),
        ([], 1),
    ],
    ids=["labelled", "no validation", "one row", "unlabelled", "unlabelled with validation", "nothing"],
)
def test_curves_draw_what_there_is(tmp_path, rows, panels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # matplotlib 3.8 calls pyparsing by an old name
        save_curves(rows, tmp_path / "curves.png")
    width, height = Image.open(tmp_path / "curves.png").size
    assert width == pytest.approx(panels * 504, abs=2)
    assert height == pytest.approx(384, abs=2)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert read_metrics(path) == rows
    for cut in range(1, 22):
        path.write_text(text + json.dumps({"step": 3, "loss": 0.1})[:cut])
        assert read_metrics(path) == rows
    path.write_text("")
    assert read_metrics(path) == []
