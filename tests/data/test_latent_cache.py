"""The latent cache: what it stores, that an interrupted one goes on, and that another run's is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_kl, tiny_taesd

from latent_egc.config import Config, ConfigError, parse_config
from latent_egc.data import encoding, latent_cache
from latent_egc.data.autoencoders import encode_moments, load_autoencoder
from latent_egc.data.latent_cache import CachedViews, content_digest, open_cache
from latent_egc.data.sources import CorruptImageError, load_splits
from latent_egc.data.stream import CACHED_VIEW, random_stream
from latent_egc.data.views import central_view, clean_view
from latent_egc.training.build import build_data

MODEL = {
    "sample_size": 4,
    "in_channels": 2,
    "num_classes": 2,
    "block_out_channels": [8, 16],
    "attention_levels": [1],
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Shards of 4 images; `datasets` prepares its tables below the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(encoding, "IMAGES_PER_SHARD", 4)


@pytest.fixture
def config(tmp_path) -> Config:
    """Twelve images of noise in two classes, 10 to train, through a tiny AutoencoderKL; nothing is encoded yet."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    tiny_kl().save_pretrained(tmp_path / "vae")
    return parse_config(
        {
            "model": MODEL,
            "autoencoder": {"path": str(tmp_path / "vae")},
            "data": {
                "dataset": "imagefolder",
                "data_dir": str(tmp_path / "images"),
                "validation_fraction": 0.16,
                "image_size": 8,
                "horizontal_flip": True,
                "num_views": 3,
                "num_workers": 0,
                "latent_cache": str(tmp_path / "cache"),
            },
        }
    )


def with_data(config: Config, **changes) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def encode(config: Config, **options) -> Path:
    return encoding.encode(config.data, config.autoencoder, config.model["num_classes"], **options)


def opened(config: Config) -> latent_cache.LatentCache:
    return open_cache(config.data, load_autoencoder(config.autoencoder), config.model["num_classes"] is not None)


def shards(config: Config) -> dict[str, int]:
    """Shard -> when it was written, in nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in Path(config.data.latent_cache).glob("*/0*")}


def stored(config: Config) -> list[np.ndarray]:
    cache = opened(config)
    return [cache.train["moments"][:], cache.train["clean_moments"][:], cache.validation["moments"][:]]


def test_rows_are_the_encoded_views(config):
    """Moments equal encoding the same view by hand, up to half precision; the mirrored view is the mirrored image's."""
    assert encode(config, batch_size=5) == Path(config.data.latent_cache)
    cache, vae, splits = opened(config), load_autoencoder(config.autoencoder), load_splits(config.data, 2)
    assert (len(cache.train), len(cache.validation), cache.class_names) == (10, 2, ["cat", "dog"])
    assert cache.train.features["moments"].dtype == "float16"
    assert cache.train["label"][:].tolist() == splits.train.labels.tolist()
    assert cache.validation["label"][:].tolist() == splits.validation.labels.tolist()

    def check(row_views, views):
        by_hand = encode_moments(vae, torch.stack(views)).numpy()
        assert row_views.shape == by_hand.shape
        np.testing.assert_allclose(row_views, by_hand, rtol=2**-10, atol=1e-5)

    for index in (0, 3, 4, 9):
        image, row = splits.train.image(index), cache.train[index]
        central = central_view(image, 8)
        check(row["moments"], [central, central.flip(-1)])
        rng = random_stream(0, CACHED_VIEW, index)
        check(row["clean_moments"], [clean_view(image, config.data, rng) for _ in range(3)])
    check(cache.validation[1]["moments"], [central_view(splits.validation.image(1), 8)])


def test_cached_views_draw_from_the_stored_views(config):
    encode(config)
    rows = opened(config).train
    views, again = CachedViews(rows, seed=0), CachedViews(rows, seed=0)
    seen = set()
    for sample in range(100):
        view = views[sample]
        row = rows[views.stream.image_index(sample)]
        matches = [np.array_equal(view["view"], moments.astype(np.float32)) for moments in row["moments"]]
        clean = [np.array_equal(view["clean_view"], moments.astype(np.float32)) for moments in row["clean_moments"]]
        assert any(matches)
        assert any(clean)
        seen.add((matches.index(True), clean.index(True)))
        assert view["class_labels"] == int(row["label"])
        assert view["view"].dtype == torch.float32
    assert seen == {(i, j) for i in range(2) for j in range(3)}
    assert all(torch.equal(again[7][key], views[7][key]) for key in views[7])


def test_views_without_flip_and_without_posterior(config, tmp_path):
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    autoencoder = dataclasses.replace(config.autoencoder, path=str(tmp_path / "taesd"))
    config = dataclasses.replace(with_data(config, horizontal_flip=False, num_views=1), autoencoder=autoencoder)
    encode(config)
    row = opened(config).train[0]
    assert row["moments"].shape == row["clean_moments"].shape == (1, 2, 4, 4)


def test_unlabelled(config):
    unlabelled = dataclasses.replace(config, model={**config.model, "num_classes": None})
    encode(unlabelled)
    assert set(opened(unlabelled).train["label"][:].tolist()) == {-1}
    with pytest.raises(ConfigError, match="labelled: the cache has False, this run True"):
        opened(config)


def test_an_unlabelled_model_reads_a_labelled_cache_without_its_labels(config):
    encode(config)
    labelled = opened(config)
    cache = opened(dataclasses.replace(config, model={**config.model, "num_classes": None}))
    assert cache.class_names == []
    for rows, expected in ((cache.train, labelled.train), (cache.validation, labelled.validation)):
        assert set(rows["label"][:].tolist()) == {-1} < set(expected["label"][:].tolist()) | {-1}
        np.testing.assert_array_equal(rows["moments"][:], expected["moments"][:])


def test_label_fraction_needs_no_other_cache(config):
    """The cache keeps every label; the views hide the same ones as views of pixels do."""
    encode(config)
    partly = with_data(config, label_fraction=0.4)
    cache = opened(partly)
    vae = load_autoencoder(config.autoencoder)
    views, pixel_views = (
        build_data(data, vae, num_classes=2, seed=0).train
        for data in (partly.data, with_data(partly, latent_cache=None).data)
    )
    labels = [int(item["class_labels"]) for item in views.__getitems__(list(range(10)))]
    assert labels == [int(pixel_views[sample]["class_labels"]) for sample in range(10)]
    assert sorted(labels) == [-1] * 6 + [0, 0, 1, 1]
    assert sorted(cache.train["label"][:]) == [0] * 5 + [1] * 5
    assert sorted(cache.validation["label"][:]) == [0, 1]


def test_encoding_again_touches_nothing(config):
    encode(config)
    before = shards(config)
    assert len(before) == 3 + 1
    encode(config)
    assert shards(config) == before


def test_interrupted_encoding_goes_on_behind_the_last_whole_shard(config, tmp_path, monkeypatch):
    uninterrupted = with_data(config, latent_cache=str(tmp_path / "other"))
    encode(uninterrupted)

    def stop_in_the_second_shard(vae, batch):
        if len(shards(config)) == 1:
            raise KeyboardInterrupt
        return encode_moments(vae, batch)

    monkeypatch.setattr(encoding, "encode_moments", stop_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        encode(config)
    monkeypatch.setattr(encoding, "encode_moments", encode_moments)
    first = shards(config)
    assert len(first) == 1
    with pytest.raises(ConfigError, match=r"data\.latent_cache=.* is unfinished; `latent-egc encode` goes on with it"):
        opened(config)

    (Path(config.data.latent_cache) / "train" / "00001.tmp").mkdir()  # what a kill while writing leaves
    encode(config)
    assert first.items() <= shards(config).items()
    for result, expected in zip(stored(config), stored(uninterrupted), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_a_deleted_shard_is_written_again_and_only_that(config):
    encode(config)
    before, expected = shards(config), stored(config)
    (deleted,) = [shard for shard in before if shard.endswith("train/00001")]
    shutil.rmtree(deleted)
    encode(config)
    after = shards(config)
    assert {shard for shard in after if after[shard] != before[shard]} == {deleted}
    for result, wanted in zip(stored(config), expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


def delete(shard: Path) -> None:
    shutil.rmtree(shard)


def empty(shard: Path) -> None:
    for path in shard.iterdir():
        path.unlink()


def rot(shard: Path) -> None:
    """One bit, in the middle of the rows."""
    (file,) = shard.glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(shard: Path) -> None:
    (file,) = shard.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [delete, empty, rot, cut])
@pytest.mark.parametrize("shard", ["train/00001", "train/00002", "validation/00000"])
def test_a_damaged_shard_is_refused_by_its_name_and_repaired_by_encode(config, damage, shard):
    """The last one too, whose absence leaves no gap."""
    encode(config)
    before, expected = shards(config), stored(config)
    damage(Path(config.data.latent_cache) / shard)
    with pytest.raises(ConfigError, match=rf"data\.latent_cache=.* is damaged: \S+{shard} .*`latent-egc encode`"):
        opened(config)
    encode(config)
    assert {name for name, written in shards(config).items() if before[name] != written} == {
        str(Path(config.data.latent_cache) / shard)
    }
    for result, wanted in zip(stored(config), expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


def make_one_from_before(config: Config) -> Path:
    """Takes away what caches had not before they had checksums."""
    folder = Path(config.data.latent_cache)
    record = json.loads((folder / "cache.json").read_text())
    del record["checksums"]
    (folder / "cache.json").write_text(json.dumps(record))
    for file in folder.glob("*/*/shard.json"):
        file.unlink()
    return folder


def test_a_cache_from_before_opens_misses_its_shards_and_gets_checksums_from_encode(config):
    encode(config)
    expected, folder = stored(config), make_one_from_before(config)
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*.arrow")}
    for result, wanted in zip(stored(config), expected, strict=True):
        np.testing.assert_array_equal(result, wanted)
    encode(config)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*.arrow")} == written
    rot(folder / "train" / "00000")
    with pytest.raises(ConfigError, match="train/00000 is not as it was written"):
        opened(config)
    make_one_from_before(config)
    shutil.rmtree(folder / "train" / "00002")
    with pytest.raises(ConfigError, match="train/00002 is missing"):
        opened(config)
    empty(folder / "train" / "00001")
    cut(folder / "validation" / "00000")
    rot(folder / "train" / "00000")  # back to what it was
    encode(config)
    for result, wanted in zip(stored(config), expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("content", ['{"data.dataset": "imagefo', "[1, 2]", "", "null"])
def test_a_broken_record_is_named(config, content):
    encode(config)
    (Path(config.data.latent_cache) / "cache.json").write_text(content)
    for use in (opened, encode):
        with pytest.raises(ConfigError, match=r"data\.latent_cache: .*cache\.json is not a cache's record"):
            use(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 6}, "data.image_size: the cache has 8, this run 6"),
        ({"num_views": 2}, "data.num_views: the cache has 3, this run 2"),
        ({"random_resized_crop_ratio": (1.0, 1.0)}, "data.random_resized_crop_ratio: the cache has [0.75, 1.33"),
        ({"random_resized_crop": None}, "data.random_resized_crop: the cache has [0.5, 1.0], this run None"),
        ({"dataset": "digits"}, "data.dataset: the cache has 'imagefolder', this run 'digits'"),
        ({"validation_fraction": 0.5}, "data.validation_fraction: the cache has 0.16, this run 0.5"),
    ],
)
def test_a_cache_of_other_data_is_refused_with_what_differs(config, changes, message):
    encode(config)
    before = shards(config)
    other = with_data(config, **changes)
    with pytest.raises(ConfigError) as error:
        opened(other)
    assert message in str(error.value)
    assert "was made otherwise" in str(error.value)
    if "dataset" not in changes:
        with pytest.raises(ConfigError) as error:
            encode(other)
        assert message in str(error.value)
    assert shards(config) == before


def test_a_cache_serves_every_mixing_and_one_from_before_a_key_has_its_default(config):
    encode(config)
    opened(with_data(config, mixup=0.8, cutmix=1.0, reprob=0.3))
    path = Path(config.data.latent_cache) / "cache.json"
    record = json.loads(path.read_text())
    assert record.pop("data.random_resized_crop_ratio") == [3 / 4, 4 / 3]
    path.write_text(json.dumps(record))
    opened(config)
    with pytest.raises(ConfigError, match=r"ratio: the cache has \[0.75, 1.3+\], this run \[1.0, 1.0\]"):
        opened(with_data(config, random_resized_crop_ratio=(1.0, 1.0)))


def test_a_cache_of_another_autoencoder_is_refused(config, tmp_path):
    encode(config)
    tiny_kl(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    with pytest.raises(ConfigError, match=r"autoencoder: the cache has 'AutoencoderKL-\w+', this run 'AutoencoderKL-"):
        opened(config)
    with pytest.raises(ConfigError, match="autoencoder: the cache has"):
        encode(config)


def test_images_that_changed_in_place_are_not_mixed_with_encoded_ones(config, tmp_path):
    encode(config)
    for path in (tmp_path / "images").glob("*/*.png"):
        Image.new("RGB", (10, 12)).save(path)
    with pytest.raises(ConfigError, match="content: the cache has"):
        encode(config)


def test_labels_that_changed_are_another_content(config):
    splits = load_splits(config.data, 2)
    before = content_digest(splits)
    splits.train.labels[2] = 1 - splits.train.labels[2]
    assert content_digest(splits) != before


def test_what_does_not_decide_the_latents_may_change(config):
    encode(config)
    assert len(opened(with_data(config, num_workers=2, skip_corrupt=True)).train) == 10


def test_a_missing_cache_names_the_command(config):
    with pytest.raises(ConfigError, match=r"data\.latent_cache=.* holds no latent cache; .*`latent-egc encode CONFIG`"):
        opened(config)


def test_encode_refuses_what_it_cannot_do(config, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.latent_cache must name the folder"):
        encode(with_data(config, latent_cache=None))
    pixels = dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, path=None))
    with pytest.raises(ConfigError, match=r"autoencoder\.path is null"):
        encode(pixels)
    with pytest.raises(ConfigError, match=r"data\.image_size must be divisible .* 2, got 7"):
        encode(with_data(config, image_size=7))
    with pytest.raises(ConfigError, match="holds other files"):
        encode(with_data(config, latent_cache=str(tmp_path / "images")))
    assert not (tmp_path / "cache").exists()
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["cat", "dog"]


def test_corrupt_images_stop_or_are_skipped_and_counted(config, tmp_path):
    (tmp_path / "images" / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(CorruptImageError, match=r"dog/3\.png"):
        encode(config)
    skipping = with_data(config, skip_corrupt=True)
    with pytest.warns(UserWarning, match="corrupt") as warned:
        encode(skipping)
    assert "skipped 1 corrupt images" in [str(warning.message) for warning in warned]
    cache = opened(skipping)
    assert len(cache.train) + len(cache.validation) == 11


@pytest.mark.filterwarnings("ignore:corrupt image")
def test_a_shard_of_corrupt_images_is_left_out(config):
    rows = load_splits(config.data, 2).train.rows
    for index in range(4):
        Path(rows[index]["image"]["path"]).write_bytes(b"no image")
    skipping = with_data(config, skip_corrupt=True)
    with pytest.warns(UserWarning, match="skipped 4 corrupt images"):
        encode(skipping)
    assert len(opened(skipping).train) == 6


def test_the_record_says_what_was_encoded(config):
    encode(config)
    record = json.loads((Path(config.data.latent_cache) / "cache.json").read_text())
    assert record["complete"] is True
    assert (record["num_train"], record["num_validation"], record["class_names"]) == (10, 2, ["cat", "dog"])
    assert record["autoencoder"].startswith("AutoencoderKL-")
