"""Views of an image, and which labels training sees."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import write_folder

from latent_egc.config import DataConfig
from latent_egc.data.sources import CorruptImageError, load_splits
from latent_egc.data.views import PixelViews, central_view, clean_view, keep_labels


def test_kept_labels_are_stratified_seeded_and_nested():
    labels = np.array([0] * 40 + [1] * 20 + [2] * 3 + [-1] * 10)
    kept = {fraction: keep_labels(labels, fraction, seed=3) for fraction in (1.0, 0.5, 0.1)}
    assert np.array_equal(kept[1.0], labels)
    for fraction, counts in ((0.5, (20, 10, 2)), (0.1, (4, 2, 1))):  # of every class at least one
        found = kept[fraction]
        assert tuple(int((found == label).sum()) for label in range(3)) == counts
        assert ((found == labels) | (found == -1)).all()
    assert ((kept[0.1] == -1) | (kept[0.5] >= 0)).all()
    assert np.array_equal(kept[0.5], keep_labels(labels, 0.5, seed=3))
    assert not np.array_equal(kept[0.5], keep_labels(labels, 0.5, seed=4))
    assert (keep_labels(np.full(5, -1), 0.5, seed=0) == -1).all()


def test_label_fraction_hides_training_labels_only(tmp_path):
    config = dataclasses.replace(write_folder(tmp_path), label_fraction=0.5, validation_fraction=0.2)
    splits = load_splits(config, 2)
    views = PixelViews(splits.train, config, seed=1)
    labels = [int(views[sample]["class_labels"]) for sample in range(16)]  # two epochs of 8 images
    assert sorted(labels) == [-1] * 8 + [0] * 4 + [1] * 4
    assert (splits.validation.labels >= 0).all()


def test_corrupt_image_names_its_file_and_can_be_skipped(tmp_path):
    config = write_folder(tmp_path / "images", per_class=10)
    broken = tmp_path / "images" / "dog" / "7.png"
    broken.write_bytes(broken.read_bytes()[:40])
    table = load_splits(config, 2).train
    (bad,) = [i for i in range(len(table)) if table.rows[i]["image"]["path"].endswith("dog/7.png")]
    with pytest.raises(CorruptImageError, match=rf"corrupt image: train row {bad} \(.*dog/7\.png\)"):
        table.image(bad)

    views = PixelViews(table, config, seed=0)
    sample = next(s for s in range(len(table)) if views.stream.image_index(s) == bad)
    with pytest.raises(CorruptImageError, match=r"dog/7\.png"):
        views[sample]
    row = PixelViews(table, DataConfig(image_size=8, skip_corrupt=True), seed=0)[sample]
    following = (bad + 1) % len(table)
    assert row["num_skipped"] == 1
    assert row["class_labels"] == table.labels[following]
    torch.testing.assert_close(row["view"], central_view(table.image(following), 8))


def test_a_table_of_corrupt_images_ends_with_an_error(tmp_path):
    images = [{"bytes": b"nothing", "path": None}] * 5
    datasets.Dataset.from_dict({"image": images}).to_parquet(tmp_path / "a.parquet")
    config = DataConfig(dataset="parquet", data_files=str(tmp_path / "a.parquet"), skip_corrupt=True)
    with pytest.raises(CorruptImageError):
        PixelViews(load_splits(config, None).train, config, seed=0)[0]


def gradient_image(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row: a crop's place and size can be read from its colours."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def test_central_view_is_the_centre_of_the_resized_image():
    view = central_view(gradient_image(64, 32), 32)
    assert view.shape == (3, 32, 32)
    assert -1 <= view.min() <= view.max() <= 1
    torch.testing.assert_close(view[0, 0, [0, -1]], torch.tensor([-0.5, 0.5]), atol=0.03, rtol=0)
    torch.testing.assert_close(view[1, [0, -1], 0], torch.tensor([-1.0, 1.0]), atol=0.03, rtol=0)
    assert torch.equal(central_view(gradient_image(64, 32), 32, flipped=True), view.flip(-1))


def test_small_images_are_enlarged():
    assert central_view(gradient_image(5, 3), 16).shape == (3, 16, 16)


@pytest.mark.parametrize("size", [(120, 90), (90, 120)])
def test_random_resized_crops_come_from_everywhere(size):
    config = DataConfig(image_size=32, random_resized_crop=(0.2, 0.3))
    views = [clean_view(gradient_image(*size), config, np.random.default_rng(number)) for number in range(60)]
    for coordinate in (0, 1):
        assert min(float(view[coordinate].min()) for view in views) < -0.9
        assert max(float(view[coordinate].max()) for view in views) > 0.9


@pytest.mark.parametrize("area", [(0.2, 0.3), (0.5, 1.0), (1.0, 1.0)])
def test_random_resized_crop_keeps_size_area_and_aspect(area):
    config = DataConfig(image_size=32, random_resized_crop=area)
    image, areas, ratios = gradient_image(120, 90), [], []
    for number in range(40):
        view = clean_view(image, config, np.random.default_rng(number))
        assert view.shape == (3, 32, 32)
        # From first to last pixel a view spans 31/32 of what it was cut from; colours span 2.
        width, height = (float(view[c].max() - view[c].min()) / 2 * 32 / 31 for c in (0, 1))
        areas.append(width * height)
        ratios.append(width * 120 / (height * 90))
    if area == (1.0, 1.0):  # no such crop fits but the image itself; then it is the central view, 3/4 of this image
        assert max(areas) <= 1.05
    else:
        assert area[0] * 0.85 <= min(areas)
        assert max(areas) <= area[1] * 1.1
        assert max(areas) > min(areas) * 1.1
        assert 3 / 4 * 0.9 <= min(ratios) < 0.9
        assert 1.1 < max(ratios) <= 4 / 3 * 1.1


def test_the_crop_has_the_ratio_that_is_asked_for():
    config = DataConfig(image_size=32, random_resized_crop=(0.2, 0.3), random_resized_crop_ratio=(2.0, 3.0))
    image = gradient_image(120, 90)
    for number in range(10):
        view = clean_view(image, config, np.random.default_rng(number))
        width, height = (float(view[c].max() - view[c].min()) for c in (0, 1))
        assert 2.0 * 0.9 <= width * 120 / (height * 90) <= 3.0 * 1.1


def test_horizontal_flip_mirrors_half_of_the_samples(tmp_path):
    table = load_splits(write_folder(tmp_path / "images", per_class=5), 2).train
    table.image = lambda index: gradient_image(16, 16)
    for flip, low, high in ((False, 0, 0), (True, 60, 140)):
        config = DataConfig(image_size=8, horizontal_flip=flip, random_resized_crop=None)
        views = PixelViews(table, config, seed=0)
        rows = [views[sample] for sample in range(200)]
        for key in ("view", "clean_view"):
            mirrored = [bool(row[key][0, 0, 0] > row[key][0, 0, -1]) for row in rows]
            assert low <= sum(mirrored) <= high
            for label in (0, 1):  # of every class, or the classifier could read its labels off the side
                own = [m for m, row in zip(mirrored, rows, strict=True) if row["class_labels"] == label]
                assert low * 0.35 <= sum(own) <= high * 0.65
        together = sum(torch.equal(row["view"], row["clean_view"]) for row in rows)
        assert together == 200 if not flip else 60 <= together <= 140  # the two views are mirrored independently
