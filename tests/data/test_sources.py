"""Images, labels, splits, views, and the training stream."""

import dataclasses
import io
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.sources import CorruptImageError, keep_labels, load_splits, read_image
from latent_egc.data.stream import BatchSchedule, SampleStream, TrainingSamples, sample_draws
from latent_egc.data.views import PixelViews, central_view, clean_view


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` prepares its tables below the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def png(value: int, width: int = 10, height: int = 8) -> bytes:
    """A grey PNG file's content."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def write_folder(folder, per_class: int = 5, classes: tuple[str, ...] = ("cat", "dog")) -> DataConfig:
    """One folder a class, of grey images that all differ."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            (folder / name / f"{i}.png").write_bytes(png(20 * (c * per_class + i)))
    return DataConfig(dataset="imagefolder", data_dir=str(folder), image_size=8)


def write_parquet(path, labels: list, feature=None, column: str = "label", image_column: str = "image") -> DataConfig:
    """A parquet file with one image a label, its content inside the file."""
    images = [{"bytes": png(i), "path": None} for i in range(len(labels))]
    features = None
    if feature is not None:
        features = datasets.Features({image_column: datasets.Image(), column: feature})
    table = datasets.Dataset.from_dict({image_column: images, column: labels}, features=features)
    table.to_parquet(path)
    return DataConfig(dataset="parquet", data_files=str(path), image_size=8)


def grey(table, index: int) -> int:
    """The value of a grey image."""
    return table.image(index).getpixel((0, 0))[0]


# --- datasets and splits --------------------------------------------------------------------------------------------


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


# --- reading one image ----------------------------------------------------------------------------------------------


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


# --- views ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("area", [(0.2, 0.3), (0.5, 1.0), (1.0, 1.0)])
def test_random_resized_crop_keeps_size_area_and_aspect(area):
    config = DataConfig(image_size=32, random_resized_crop=area)
    image, areas = gradient_image(120, 90), []
    for number in range(40):
        view = clean_view(image, config, np.random.default_rng(number))
        assert view.shape == (3, 32, 32)
        # From first to last pixel a view spans 31/32 of what it was cut from; colours span 2.
        width, height = (float(view[c].max() - view[c].min()) / 2 * 32 / 31 for c in (0, 1))
        if area != (1.0, 1.0):
            assert 3 / 4 * 0.9 <= width * 120 / (height * 90) <= 4 / 3 * 1.1
        areas.append(width * height)
    if area == (1.0, 1.0):  # no such crop fits but the image itself; then it is the central view, 3/4 of this image
        assert max(areas) <= 1.05
    else:
        assert area[0] * 0.85 <= min(areas)
        assert max(areas) <= area[1] * 1.1
        assert max(areas) > min(areas) * 1.1


def test_horizontal_flip_mirrors_half_of_the_samples(tmp_path):
    table = load_splits(write_folder(tmp_path / "images", per_class=5), 2).train
    table.image = lambda index: gradient_image(16, 16)
    for flip, low, high in ((False, 0, 0), (True, 60, 140)):
        config = DataConfig(image_size=8, horizontal_flip=flip, random_resized_crop=None)
        views = PixelViews(table, config, seed=0)
        rows = [views[sample] for sample in range(200)]
        for key in ("view", "clean_view"):
            assert low <= sum(bool(row[key][0, 0, 0] > row[key][0, 0, -1]) for row in rows) <= high
        together = sum(torch.equal(row["view"], row["clean_view"]) for row in rows)
        assert together == 200 if not flip else 60 <= together <= 140  # the two views are mirrored independently


# --- the training stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (3, 1), (2, 4)])
def test_processes_and_micro_batches_partition_the_stream(num_processes, accumulation):
    def samples(first, last):
        """For every step the sorted samples of all processes."""
        schedules = [
            list(BatchSchedule(first, last, 5, accumulation, process, num_processes))
            for process in range(num_processes)
        ]
        assert all(len(schedule) == (last - first) * accumulation for schedule in schedules)
        per_step = []
        for step in range(last - first):
            micro = slice(step * accumulation, (step + 1) * accumulation)
            per_step.append(sorted(s for schedule in schedules for batch in schedule[micro] for s in batch))
        return per_step

    whole = samples(0, 6)
    assert list(chain(*whole)) == list(range(6 * 5 * accumulation * num_processes))
    for resumed_at in range(6):
        assert samples(0, resumed_at) + samples(resumed_at, 6) == whole


def test_global_batch_does_not_depend_on_how_it_is_shared():
    """Two processes, two accumulation steps and one large batch see the same samples in the same step."""
    shares = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2)]
    steps = []
    for batch_size, accumulation, num_processes in shares:
        batches = [
            b for p in range(num_processes) for b in BatchSchedule(3, 4, batch_size, accumulation, p, num_processes)
        ]
        steps.append(sorted(chain(*batches)))
    assert all(step == list(range(24, 32)) for step in steps)


def test_each_epoch_is_another_permutation():
    stream = SampleStream(50, seed=3)
    epochs = [[stream.image_index(epoch * 50 + i) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [SampleStream(50, seed=3).image_index(s) for s in (149, 7, 60)] == [
        epochs[2][49],
        epochs[0][7],
        epochs[1][10],
    ]
    assert [SampleStream(50, seed=4).image_index(s) for s in range(50)] != epochs[0]


def test_draws_are_a_function_of_seed_and_sample():
    def draws(seed, sample):
        return sample_draws(seed, sample, (2, 4, 4), 1000, 0.5)

    first = draws(0, 5)
    draws(0, 6)
    assert all(torch.equal(value, first[key]) for key, value in draws(0, 5).items())
    for other in (draws(0, 6), draws(1, 5)):
        assert not torch.equal(other["noise"], first["noise"])
    assert not torch.equal(first["noise"], first["posterior_noise"])
    assert not torch.equal(first["posterior_noise"], first["clean_posterior_noise"])


def test_draws_are_standard_normal_uniform_and_uncorrelated():
    rows = [sample_draws(0, sample, (2, 4, 4), 1000, 0.1) for sample in range(4000)]
    for key in ("noise", "posterior_noise", "clean_posterior_noise"):
        values = torch.stack([row[key] for row in rows])
        assert values.dtype == torch.float32
        assert abs(values.mean()) < 0.01
        assert abs(values.var() - 1) < 0.02
        assert (values[:-1] * values[1:]).mean().abs() < 0.01
    timesteps = torch.stack([row["timesteps"] for row in rows])
    assert timesteps.dtype == torch.long
    assert 0 <= timesteps.min() < 10 < 990 < timesteps.max() < 1000
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert ((counts - 400).abs() < 80).all()  # four standard deviations
    assert abs(torch.stack([row["label_dropped"] for row in rows]).float().mean() - 0.1) < 0.02


def test_workers_give_what_the_main_process_gives(tmp_path):
    config = DataConfig(**{**vars(write_folder(tmp_path / "images")), "horizontal_flip": True})
    views = PixelViews(load_splits(config, 2).train, config, seed=1)
    samples = TrainingSamples(views, 1, (2, 4, 4), 1000, 0.1)
    schedule = BatchSchedule(2, 6, 4)
    alone, shared = (list(DataLoader(samples, batch_sampler=schedule, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(shared) == 4
    for batch, other in zip(alone, shared, strict=True):
        assert set(batch) == set(other)
        assert all(torch.equal(batch[key], other[key]) for key in batch)
