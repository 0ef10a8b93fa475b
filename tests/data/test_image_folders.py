"""Trees of images: what is a split, what a class, and what is refused."""

import os

import datasets
import numpy as np
import pytest
from tiny_images import png, write_folder

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.image_folders import folder_splits
from latent_egc.data.sources import load_splits

ALL = {"train": ["**"]}


def write_tree(folder, *places: str):
    """One image in each folder; returns the tree's."""
    for place in places:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "test_1.png").write_bytes(png(0))
    return folder


@pytest.mark.parametrize("classes", [("train", "cat", "test"), ("test tube", "tram"), ("validation", "zoo", "val 2")])
def test_a_class_may_have_the_name_of_a_split(tmp_path, classes):
    config = write_folder(tmp_path / "images", per_class=6, classes=classes)
    splits = load_splits(config, len(classes))
    assert splits.class_names == sorted(classes)
    assert len(splits.train) + len(splits.validation) == 6 * len(classes)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["cat", "dog"], ALL),
        (["."], ALL),
        (["a/train", "a/cat"], ALL),
        (["train/cat", "train/dog", "val/cat"], {"train": ["train/**"], "validation": ["val/**"]}),
        (["train/train", "test/train"], {"train": ["train/**"], "test": ["test/**"]}),
        (["train-set/cat", "eval_set/cat"], {"train": ["train-set/**"], "test": ["eval_set/**"]}),
        (["train"], {"train": ["train/**"]}),
    ],
)
def test_splits_are_the_folders_above_classes(tmp_path, places, expected):
    """Whatever the files are called."""
    assert folder_splits(write_tree(tmp_path, *places), None) == expected


@pytest.mark.parametrize(
    "places",
    [
        ["train", "test"],
        ["train/cat", "dog"],
        ["train/cat", "."],
        ["train", "."],
        ["data/train/cat", "data/test/cat"],
        ["cat/train", "cat/test"],
        ["animals/cat", "train/cat"],
        ["train/train/cat", "train/test/cat"],
    ],
)
def test_a_tree_of_two_meanings_is_refused(tmp_path, places):
    with pytest.raises(ConfigError, match=r"data\.data_dir=.*: are folders such as train and test splits or classes"):
        load_splits(DataConfig(dataset="imagefolder", data_dir=str(write_tree(tmp_path, *places))), 2)


def test_without_classes_the_configuration_says_that_folders_are_splits(tmp_path):
    config = DataConfig(
        dataset="imagefolder", data_dir=str(write_tree(tmp_path, "train", "test")), validation_split="test"
    )
    splits = load_splits(config, None)
    assert (len(splits.train), len(splits.validation)) == (1, 1)


def test_what_a_metadata_file_describes_is_left_to_datasets(tmp_path):
    folder = write_tree(tmp_path / "images", "train", "test")
    (folder / "train" / "metadata.csv").write_text("file_name,label\ntest_1.png,cat\n")
    assert folder_splits(folder, None) is None


@pytest.mark.parametrize("prefixes", [("",), ("train", "validation")])
def test_images_and_labels_are_those_of_datasets_in_its_order(tmp_path, prefixes):
    """Where it reads the tree as it is meant."""
    for number, prefix in enumerate(prefixes):
        write_folder(tmp_path / "images" / prefix, per_class=11 - number, classes=("dog", "b cat", "a-cow"))
    config = DataConfig(dataset="imagefolder", data_dir=str(tmp_path / "images"), validation_split=prefixes[-1] or None)
    splits = load_splits(config, 3)
    for split in prefixes:
        rows = datasets.load_dataset("imagefolder", data_dir=config.data_dir, split=split or "train")
        rows = rows.cast_column("image", datasets.Image(decode=False))
        if not split:
            rows = rows.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")["train"]
        table = splits.train if split in ("", "train") else splits.validation
        assert [row["path"] for row in table.rows["image"]] == [row["path"] for row in rows["image"]]
        assert np.array_equal(table.labels, rows["label"])
    assert splits.class_names == ["a-cow", "b cat", "dog"]


def test_a_fifo_is_skipped_with_a_warning(tmp_path):
    config = write_folder(tmp_path / "images")
    os.mkfifo(tmp_path / "images" / "cat" / "pipe.png")
    with pytest.warns(UserWarning, match=r"skipped, it is not a regular file: .*pipe\.png"):
        splits = load_splits(config, 2)
    assert len(splits.train) + len(splits.validation) == 10
