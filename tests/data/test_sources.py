"""Images, labels and splits of every kind of source."""

import io
import os
import struct

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny_images import png, write_folder, write_parquet

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.sources import CorruptImageError, load_splits, read_image
from latent_egc.data.views import central_view


def grey(table, index: int) -> int:
    """The value of a grey image."""
    return table.image(index).getpixel((0, 0))[0]


def test_digits_split_is_stratified_and_always_the_same():
    splits, again = (load_splits(DataConfig(), 10) for _ in range(2))
    assert (len(splits.train), len(splits.validation)) == (1437, 360)
    assert splits.class_names == list("0123456789")
    shares = [np.bincount(table.labels, minlength=10) / len(table) for table in (splits.train, splits.validation)]
    np.testing.assert_allclose(*shares, atol=0.003)
    assert np.array_equal(splits.validation.labels, again.validation.labels)
    for index in (0, 100, 359):
        assert splits.validation.image(index).tobytes() == again.validation.image(index).tobytes()


def test_image_folder(tmp_path):
    splits = load_splits(write_folder(tmp_path / "images"), 2)
    assert splits.class_names == ["cat", "dog"]
    tables = (splits.train, splits.validation)
    seen = {grey(table, i): table.labels[i] for table in tables for i in range(len(table))}
    assert seen == {20 * i: int(i >= 5) for i in range(10)}
    assert splits.validation.labels.tolist() in ([0, 1], [1, 0])


def test_image_folder_with_its_own_validation_split(tmp_path):
    write_folder(tmp_path / "images" / "train")
    write_folder(tmp_path / "images" / "validation", per_class=2)
    config = DataConfig(dataset="imagefolder", data_dir=str(tmp_path / "images"), validation_split="validation")
    splits = load_splits(config, 2)
    assert (len(splits.train), len(splits.validation)) == (10, 4)


def test_parquet_with_bytes_and_class_names(tmp_path):
    config = write_parquet(tmp_path / "a.parquet", [0, 1] * 5, datasets.ClassLabel(names=["no", "yes"]))
    splits = load_splits(config, 2)
    assert splits.class_names == ["no", "yes"]
    for table in (splits.train, splits.validation):
        assert [grey(table, i) % 2 for i in range(len(table))] == table.labels.tolist()


def test_unlabelled_model_ignores_labels(tmp_path):
    splits = load_splits(write_parquet(tmp_path / "a.parquet", ["x"] * 5), None)
    assert splits.class_names == []
    assert set(splits.train.labels) == {-1}


def test_columns_are_found_by_type_by_usual_name_or_as_configured(tmp_path):
    label = datasets.ClassLabel(names=["a", "b"])
    by_type = write_parquet(tmp_path / "a.parquet", [0, 1] * 5, label, column="kind", image_column="photo")
    assert load_splits(by_type, 2).train.image_column == "photo"
    by_name = write_parquet(tmp_path / "b.parquet", [0, 1] * 5, column="target", image_column="img")
    assert len(load_splits(by_name, 2).train) == 8
    odd = write_parquet(tmp_path / "c.parquet", [0, 1] * 5, column="kind", image_column="photo")
    with pytest.raises(ConfigError, match=r"data\.image_column: set it, none of \['photo', 'kind'\]"):
        load_splits(odd, 2)
    columns = {"dataset": "parquet", "data_files": odd.data_files}
    assert len(load_splits(DataConfig(**columns, image_column="photo", label_column="kind"), 2).train) == 8
    with pytest.raises(ConfigError, match=r"data\.label_column='sort' is not a column; there are"):
        load_splits(DataConfig(**columns, image_column="photo", label_column="sort"), 2)
    with pytest.raises(ConfigError, match=r"data\.image_column: column 'kind' does not hold images"):
        load_splits(DataConfig(**columns, image_column="kind"), None)


def test_string_labels_become_ids_in_alphabetical_order(tmp_path):
    splits = load_splits(write_parquet(tmp_path / "a.parquet", ["dog", "cat"] * 5), 2)
    assert splits.class_names == ["cat", "dog"]
    assert [1 - grey(splits.train, i) % 2 for i in range(8)] == splits.train.labels.tolist()


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, 1, None, 1, 0] * 2, datasets.ClassLabel(names=["a", "b"])),
        ([0, 1, None, 1, 0] * 2, datasets.Value("int64")),
        ([0, 1, float("nan"), 1, 0] * 2, datasets.Value("float64")),  # what pandas makes of missing integers
        ([0, 1, -1, 1, 0] * 2, datasets.Value("int64")),
        (["a", "b", None, "b", "a"] * 2, datasets.Value("string")),
    ],
)
@pytest.mark.filterwarnings("ignore:the validation split is not stratified")
def test_missing_labels_become_minus_one(tmp_path, labels, feature):
    splits = load_splits(write_parquet(tmp_path / "a.parquet", labels, feature), 2)
    tables = (splits.train, splits.validation)
    found = {grey(table, i): int(table.labels[i]) for table in tables for i in range(len(table))}
    assert [found[i] for i in range(10)] == [0, 1, -1, 1, 0] * 2


def test_label_out_of_range_names_the_row_of_the_file(tmp_path):
    config = write_parquet(tmp_path / "a.parquet", [0, 1, 0, 1, 0, 1, 7, 0, 1, 0])
    with pytest.raises(ConfigError, match=r"label out of range: train row 6 has 7, allowed are 0 to 1 and -1"):
        load_splits(config, 2)


def test_labels_of_another_kind_are_refused(tmp_path):
    for name, labels in (("fraction", [0.5, 1.0] * 5), ("list", [[0, 1]] * 10)):
        config = write_parquet(tmp_path / f"{name}.parquet", labels)
        with pytest.raises(ConfigError, match=r"data\.label_column: column 'label' must hold strings or integers"):
            load_splits(config, 2)


def test_another_class_count_than_the_models_lists_the_classes(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.num_classes=3, but .*'label' has 2 classes: cat, dog"):
        load_splits(write_folder(tmp_path / "images"), 3)


def test_new_string_label_in_validation_is_named(tmp_path):
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "validation")}
    write_parquet(files["train"], ["a", "b"] * 3)
    write_parquet(files["validation"], ["a", "c"] * 3)
    with pytest.raises(ConfigError, match=r"validation has labels that train has not: \['c'\]"):
        load_splits(DataConfig(dataset="parquet", data_files=files, validation_split="validation"), 2)


def test_unusable_sources_name_the_key(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.dataset='imagefolder' .*empty"):
        load_splits(DataConfig(dataset="imagefolder", data_dir=str(tmp_path / "empty")), 2)
    config = write_parquet(tmp_path / "a.parquet", [0, 1] * 5)
    with pytest.raises(ConfigError, match=r"data\.validation_split='test' cannot be loaded"):
        load_splits(DataConfig(dataset="parquet", data_files=config.data_files, validation_split="test"), 2)
    with pytest.raises(ConfigError, match=r"data\.validation_fraction must be above 0"):
        load_splits(DataConfig(validation_fraction=0.0), 10)
    with pytest.raises(ConfigError, match=r"data\.validation_split: the digits have one split"):
        load_splits(DataConfig(validation_split="test"), 10)


def test_missing_image_is_corrupt(tmp_path):
    images = [{"bytes": png(0), "path": None}, None] * 3
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "a.parquet")
    table = load_splits(DataConfig(dataset="parquet", data_files=str(tmp_path / "a.parquet")), None).train
    bad = next(i for i in range(len(table)) if table.rows[i]["image"] is None)
    with pytest.raises(CorruptImageError, match=f"corrupt image: train row {bad}: it is missing"):
        table.image(bad)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png", "a.png")
    assert upright.size == (4, 8)
    assert upright.getpixel((3, 0)) == (255, 255, 255)


def dds_of_an_unknown_format() -> bytes:
    """A header that Pillow's plugin answers by NotImplementedError."""
    header = struct.pack("<4s7I44x", b"DDS ", 124, 0x1007, 4, 4, 0, 0, 0)
    return header + struct.pack("<2I4s5I", 32, 4, b"????", 0, 0, 0, 0, 0) + bytes(20 + 64)


def png_with_damaged_exif() -> bytes:
    """A header without its end; Pillow answers by struct.error."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG", exif=b"MM\0*")
    return file.getvalue()


DAMAGED = [dds_of_an_unknown_format(), png_with_damaged_exif(), b"", b"no image", png(0)[:40]]


@pytest.mark.parametrize("content", DAMAGED, ids=["dds", "exif", "empty", "text", "cut"])
def test_any_decoding_error_names_the_file(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(CorruptImageError, match=r"corrupt image: some name: \S"):
        read_image(tmp_path / "a.png", "some name")


def test_an_image_above_pillows_limit_and_a_fifo_are_corrupt(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(CorruptImageError, match=r"a\.png: Image size \(80 pixels\) exceeds limit"):
        read_image(io.BytesIO(png(0)), "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(CorruptImageError, match=r"pipe\.png: it is not a regular file"):
        read_image(tmp_path / "pipe.png", "pipe.png")


@pytest.mark.parametrize("scale", [1, 255])
def test_float_images_in_0_to_1_and_in_0_to_255(scale):
    values = np.linspace(0, scale, 64, dtype=np.float32).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    read = np.asarray(read_image(file, "a.tif"))[..., 0]
    assert np.abs(read - values / scale * 255).max() <= 1


@pytest.mark.parametrize("wrong", [-0.1, 256, np.nan])
def test_float_images_of_another_range_are_refused(wrong):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), wrong, np.float32)).save(file, "TIFF")
    with pytest.raises(CorruptImageError, match=r"a\.tif: a float image must be in \[0, 1\] or \[0, 255\]"):
        read_image(file, "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    """A grey of 51 stays one; a transparent colour is taken as stored, 16-bit grey is scaled and not clipped."""
    file = io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 51 * 256, dtype=np.uint16))
    else:
        image = Image.new("RGB", (4, 4), (51, 51, 51)).convert(mode)  # 51 is in Pillow's standard palette
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    read = read_image(file, mode)
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read).astype(int) - 51).max() <= 2


def test_a_damaged_exif_harms_no_view():
    """Pillow passes over it while opening, and would stumble over it again where a crop of it is made upright."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "jpeg", exif=Image.Exif().tobytes())
    damaged = file.getvalue().replace(b"Exif\0\0MM", b"Exif\0\0\0M").replace(b"Exif\0\0II", b"Exif\0\0\0I")
    assert damaged != file.getvalue()
    assert central_view(read_image(io.BytesIO(damaged), "red").crop((0, 0, 4, 4)), 4).shape == (3, 4, 4)
