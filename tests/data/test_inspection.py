"""Looking at images before anything is configured: folders with and without splits, parquet files, damage."""

import datasets
import pytest
from tiny_images import png, write_folder, write_parquet

from latent_egc.config import ConfigError
from latent_egc.data.inspection import inspect_images


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` prepares its tables below the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_a_folder_a_class(tmp_path):
    folder = write_folder(tmp_path / "photos").data_dir
    (tmp_path / "photos" / "cat" / "wide.png").write_bytes(png(250, width=30, height=7))
    (tmp_path / "photos" / "dog" / "broken.png").write_bytes(b"no image")
    found = inspect_images(folder)
    assert found.source == {"dataset": "imagefolder", "data_dir": folder}
    assert found.class_counts == {"cat": 6, "dog": 6}
    assert found.num_images == found.num_looked_at == 12
    assert found.num_validation == 3
    assert found.num_unreadable == 1
    assert sorted(map(tuple, found.sizes.tolist())) == [(10, 8)] * 10 + [(30, 7)]


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_splits_of_a_folder_are_found(tmp_path, name):
    write_folder(tmp_path / "photos" / "train")
    write_folder(tmp_path / "photos" / name, per_class=1)
    found = inspect_images(str(tmp_path / "photos"))
    assert found.source["validation_split"] == ("test" if name == "test" else "validation")
    assert found.class_counts == {"cat": 6, "dog": 6}
    assert (found.num_train, found.num_validation) == (10, 2)


@pytest.mark.parametrize("classes", [(), ("cat",), ("train", "val")])
def test_without_two_classes_nothing_is_labelled(tmp_path, classes):
    """One folder is no class; train and val, without folders below them, are splits and no classes."""
    for place in classes or [""]:
        folder = tmp_path / "photos" / place
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.png").write_bytes(png(i))
    found = inspect_images(str(tmp_path / "photos"))
    assert found.class_counts == {}
    assert found.num_unlabelled == found.num_images == 3 * max(1, len(classes))


def test_parquet_files_by_name_pattern_and_folder(tmp_path):
    (tmp_path / "table").mkdir()
    write_parquet(tmp_path / "table" / "train.parquet", [0, 1, 1, None])
    write_parquet(tmp_path / "table" / "validation.parquet", [1, 0])
    one, many, folder = (str(tmp_path / "table" / name) for name in ("train.parquet", "*.parquet", ""))
    assert inspect_images(one).source == {"dataset": "parquet", "data_files": one}
    assert inspect_images(many).class_counts == {"0": 2, "1": 3}
    found = inspect_images(folder)
    assert found.source == {"dataset": "parquet", "data_dir": folder, "validation_split": "validation"}
    assert (found.num_train, found.num_validation, found.num_unlabelled) == (4, 2, 1)


def test_a_table_without_labels_is_unlabelled(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a cat", "a dog", "a cow"], column="caption")
    found = inspect_images(str(tmp_path / "a.parquet"))
    assert found.class_counts == {}
    assert found.num_unlabelled == 3
    assert found.why_unlabelled.startswith("data.label_column: set it, none of ['image', 'caption']")


def test_a_column_of_labels_may_be_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0, 1, 1], column="species")
    assert inspect_images(str(tmp_path / "a.parquet")).why_unlabelled is not None
    found = inspect_images(str(tmp_path / "a.parquet"), label_column="species")
    assert (found.num_unlabelled, found.why_unlabelled) == (0, None)
    assert found.source["label_column"] == "species"
    assert list(found.class_counts.values()) == [1, 2]


def test_the_digits():
    found = inspect_images("digits")
    assert found.source == {"dataset": "digits"}
    assert list(found.class_counts) == list("0123456789")
    assert found.num_looked_at == 1000 < found.num_images


def test_what_cannot_be_used_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(ConfigError, match="empty holds no image"):
        inspect_images(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"none\.parquet: no such file"):
        inspect_images(str(tmp_path / "none.parquet"))
    with pytest.raises(ConfigError, match=r"notes\.txt is neither a folder nor a \.parquet file"):
        inspect_images(str(tmp_path / "empty" / "notes.txt"))
    with pytest.raises(ConfigError, match="nobody/nothing: no such file or folder here, and as a dataset of the Hub"):
        inspect_images("nobody/nothing")
    folder = write_folder(tmp_path / "broken").data_dir
    for file in (tmp_path / "broken").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="none of 10 images looked at can be read; the first: corrupt image"):
        inspect_images(folder)
