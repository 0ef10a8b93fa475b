"""Encoding shared among processes and workers, and of streams: the same bits as one process alone."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from tiny import SHARED, needs_shared, tiny_kl
from tiny_images import png, write_folder, write_parquet
from torch.utils.data import DataLoader

from latent_egc.config import AutoencoderConfig, ConfigError, DataConfig
from latent_egc.data import encoding
from latent_egc.data.autoencoders import encode_moments, has_posterior, load_autoencoder, store_channels_last
from latent_egc.data.encoding import ShardViews, encode
from latent_egc.data.image_streams import first_rows_digest, load_streams
from latent_egc.data.latent_cache import CachedViews, open_cache
from latent_egc.data.sources import CorruptImageError, load_splits
from latent_egc.training.build import build_data

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shards of 3 images."""
    monkeypatch.setattr(encoding, "IMAGES_PER_SHARD", 3)


@pytest.fixture
def autoencoder(tmp_path) -> AutoencoderConfig:
    tiny_kl().save_pretrained(tmp_path / "vae")
    return AutoencoderConfig(path=str(tmp_path / "vae"))


def caching(config: DataConfig, folder: Path, **changes) -> DataConfig:
    return dataclasses.replace(
        config, latent_cache=str(folder), num_views=2, **{"horizontal_flip": True, "num_workers": 0} | changes
    )


def content(folder: Path | str) -> dict[str, bytes]:
    """All that a cache holds but times and random names."""
    kept = [*Path(folder).rglob("*.arrow"), Path(folder) / "cache.json"]
    assert not list(Path(folder).rglob("*.tmp"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def write_streams(folder: Path, counts=(7, 0, 6, 1), validation=4) -> DataConfig:
    """Parquet files of so many images, another one to validate on, all streamed."""
    label = datasets.ClassLabel(names=["no", "yes"])
    for number, count in enumerate(counts):
        write_parquet(folder / f"train-{number}.parquet", [i % 2 for i in range(count)], label)
    write_parquet(folder / "validation.parquet", [i % 2 for i in range(validation)], label)
    files = {"train": str(folder / "train-*.parquet"), "validation": str(folder / "validation.parquet")}
    return DataConfig("parquet", data_files=files, validation_split="validation", image_size=8, streaming=True)


# --- processes and workers ------------------------------------------------------------------------------------------


def test_two_processes_write_the_cache_of_one(tmp_path, autoencoder):
    """By the command, with a worker each; one process has none."""
    data = caching(write_streams(tmp_path, (3, 4)), tmp_path / "two", num_workers=1)
    model = {"sample_size": 4, "in_channels": 2, "num_classes": 2}
    sections = {"model": model, "autoencoder": vars(autoencoder), "data": dataclasses.asdict(data)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(sections))))
    command = [sys.executable, *TORCHRUN, "-m", "latent_egc", "encode", str(tmp_path / "config.yaml")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "datasets")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("latent cache written") == 1
    encoding.IMAGES_PER_SHARD = 256  # as in the command's processes; the fixture puts it back
    expected = content(encode(caching(data, tmp_path / "one"), autoencoder, 2))
    assert len(expected) == 2 + 1 + 1
    assert content(tmp_path / "two") == expected


def test_what_another_call_writes_is_waited_for(tmp_path, autoencoder, monkeypatch, capsys):
    data, folder, waited = write_folder(tmp_path / "images", per_class=2), tmp_path / "cache", []
    folder.mkdir()
    code = "import pathlib, sys; from latent_egc.atomic import try_lock; lock = try_lock(pathlib.Path(sys.argv[1])); "
    code += "print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder / "encode.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        monkeypatch.setattr(encoding.time, "sleep", lambda seconds: waited.append(seconds) or other.kill())
        encode(caching(data, folder), autoencoder, 2)
    assert waited
    assert f"another call is encoding into {folder}: this one goes on when it has ended" in capsys.readouterr().out
    assert content(folder) == content(encode(caching(data, tmp_path / "alone"), autoencoder, 2))


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_share_the_shards_and_workers_change_no_bit(tmp_path, autoencoder, monkeypatch, streaming):
    """Each shard is written by one process: the shares are disjoint, and together they are all."""
    data = write_streams(tmp_path) if streaming else write_folder(tmp_path / "images", per_class=9)
    alone = content(encode(caching(data, tmp_path / "alone"), autoencoder, 2))
    assert content(encode(caching(data, tmp_path / "workers", num_workers=2), autoencoder, 2)) == alone

    written = {}
    write = encoding._write_shard
    monkeypatch.setattr(
        encoding, "_write_shard", lambda shard, *rest: (written[index].append(str(shard)), write(shard, *rest))
    )
    for index in (2, 1, 0):
        process = {"process_index": index, "is_main_process": index == 0, "wait_for_everyone": lambda: None}
        monkeypatch.setattr(encoding, "start_processes", partial(SimpleNamespace, num_processes=3, **process))
        written[index] = []
        if index == 2:  # the record is the main process's
            shutil.copytree(tmp_path / "alone", tmp_path / "shared", ignore=shutil.ignore_patterns("0*"))
        encode(caching(data, tmp_path / "shared"), autoencoder, 2)
    shares = [set(names) for names in written.values()]
    assert all(shares)
    assert sum(map(len, shares)) == len(set.union(*shares)) == len(alone) - 1 + (1 if streaming else 0)
    assert content(tmp_path / "shared") == alone


def test_a_stream_whose_pieces_are_elsewhere_is_not_complete(tmp_path, autoencoder, monkeypatch):
    """Other nodes that do not share the folder: training would read a part of the images in silence."""
    first = {"process_index": 0, "is_main_process": True, "wait_for_everyone": lambda: None}
    monkeypatch.setattr(encoding, "start_processes", lambda: SimpleNamespace(num_processes=3, **first))
    with pytest.raises(ConfigError, match="lacks pieces that other processes wrote, train 1, train 2"):
        encode(caching(write_streams(tmp_path), tmp_path / "cache"), autoencoder, 2)
    assert "complete" not in json.loads((tmp_path / "cache" / "cache.json").read_text())


def test_an_unlaunched_accelerate_is_refused(tmp_path, autoencoder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"started 2 processes .* ACCELERATE_USE_CPU=true"):
        encode(caching(DataConfig(), tmp_path / "cache"), autoencoder, 10)
    assert not (tmp_path / "cache").exists()


def test_errors_in_a_worker_are_the_ones_of_this_process(tmp_path, autoencoder):
    data = caching(write_folder(tmp_path / "images"), tmp_path / "cache", num_workers=1)
    (tmp_path / "images" / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(CorruptImageError, match=r"^corrupt image: \w+ row \d .*dog/3\.png"):
        encode(data, autoencoder, 2)


def test_views_come_from_workers_in_whole_shards(tmp_path):
    """Of any number of workers the same, each image once."""
    data = dataclasses.replace(write_folder(tmp_path / "images", per_class=8), num_views=1)
    table = load_splits(data, 2).train
    assert len(table) == 12
    views = ShardViews(table, data, [(piece, set()) for piece in range(4)], num_images=2)
    found = {}
    for workers in (0, 3):
        batches = list(DataLoader(views, batch_size=None, num_workers=workers))
        assert [batch.num_images for batch in batches if batch.shard == "00002"] == [2, 1]
        assert [batch.ends_shard for batch in batches if batch.shard == "00002"] == [False, True]
        found[workers] = {b.shard: torch.cat([o.views for o in batches if o.shard == b.shard]) for b in batches}
    assert found[0].keys() == found[3].keys() == {f"0000{shard}" for shard in range(4)}
    assert all(torch.equal(found[3][shard], expected) for shard, expected in found[0].items())


@needs_shared
def test_channels_last_changes_less_than_the_stored_halves_rounding():
    vae = load_autoencoder(AutoencoderConfig(str(SHARED / "taesd")))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = encode_moments(vae, images)
    store_channels_last(vae)
    assert vae.encoder.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    error = (encode_moments(vae, images) - before).square().mean().sqrt()
    rounding = (before.half().float() - before).square().mean().sqrt()
    assert error < 0.05 * rounding
    assert not has_posterior(vae)


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_is_encoded_as_the_same_rows_of_a_table(tmp_path, autoencoder):
    """All rows in order, pieces without rows too; each row's crops are drawn by a number of its own."""
    stream = caching(write_streams(tmp_path), tmp_path / "stream")
    table = dataclasses.replace(stream, streaming=False, latent_cache=str(tmp_path / "table"))
    vae = load_autoencoder(autoencoder)
    found, expected = (open_cache(d, vae, True) for d in (stream, table) if encode(d, autoencoder, 2))
    assert found.class_names == expected.class_names == ["no", "yes"]
    assert (len(found.train), len(found.validation)) == (14, 4)
    for split in ("train", "validation"):
        rows, others = getattr(found, split), getattr(expected, split)
        np.testing.assert_array_equal(rows["label"][:], others["label"][:])
        np.testing.assert_allclose(rows["moments"][:], others["moments"][:], rtol=2**-9, atol=1e-3)
    stream_of_train, *_ = load_streams(stream, 2)
    assert len({number for piece in range(4) for number, *_ in stream_of_train.read(piece)}) == 14
    views = build_data(stream, vae, 2, seed=0).train  # what training reads
    assert isinstance(views, CachedViews)
    with pytest.raises(ConfigError, match=r"data\.streaming: the cache has True, this run False"):
        open_cache(dataclasses.replace(stream, streaming=False), vae, True)


def test_an_interrupted_stream_goes_on_behind_its_last_whole_shard(tmp_path, autoencoder, monkeypatch):
    data = caching(write_streams(tmp_path), tmp_path / "cache")
    expected = content(encode(caching(data, tmp_path / "uninterrupted"), autoencoder, 2))
    read = []

    def stop_behind_the_fourth(vae, views):
        if len(list((tmp_path / "cache").glob("train/0*"))) == 4:
            raise KeyboardInterrupt
        return encode_moments(vae, views)

    monkeypatch.setattr(encoding, "encode_moments", stop_behind_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        encode(data, autoencoder, 2)
    monkeypatch.setattr(encoding, "encode_moments", encode_moments)
    with pytest.raises(ConfigError, match="is unfinished"):
        open_cache(data, load_autoencoder(autoencoder), True)
    shutil.rmtree(tmp_path / "cache" / "train" / "00000-00001")  # one in the middle
    original = encoding.ImageStream.read
    monkeypatch.setattr(
        encoding.ImageStream,
        "read",
        lambda self, *place: read.append((self.name, *place)) or original(self, *place),
    )
    encode(data, autoencoder, 2)
    assert content(tmp_path / "cache") == expected
    assert read[2:] == [
        ("train", 0, 3),
        ("train", 2, 0),
        ("train", 3, 0),
        ("validation", 0, 0),
    ]  # the first two: digest
    before = len(read)
    encode(data, autoencoder, 2)
    assert len(read) == before + 2


def test_another_stream_in_the_same_place_is_refused(tmp_path, autoencoder):
    data = caching(write_streams(tmp_path), tmp_path / "cache")
    encode(data, autoencoder, 2)
    (tmp_path / "train-3.parquet").unlink()
    with pytest.raises(ConfigError, match=r"num_pieces: the cache has .'train': 4, 'validation': 1., this run"):
        encode(data, autoencoder, 2)


def test_the_first_file_of_a_stream_may_be_empty(tmp_path, autoencoder):
    streams = load_streams(write_streams(tmp_path, (0, 3)), 2)
    assert len(first_rows_digest(*streams[:2])) == 16
    assert encode(caching(write_streams(tmp_path, (0, 3)), tmp_path / "cache"), autoencoder, 2).is_dir()


def test_tar_shards_are_streamed(tmp_path, autoencoder):
    """WebDataset's: NAME.png and NAME.cls; an unreadable image is counted."""
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for i in range(4):
                image = b"no image" if split == "train" and i == 2 else png(20 * i)
                for name, written in ((f"{i}.png", image), (f"{i}.cls", str(i % 2).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(written)
                    archive.addfile(entry, io.BytesIO(written))
    files = {split: str(tmp_path / f"{split}.tar") for split in ("train", "validation")}
    data = DataConfig("webdataset", data_files=files, validation_split="validation", image_size=8, streaming=True)
    data = caching(data, tmp_path / "cache")
    with pytest.raises(CorruptImageError, match=r"train row 2 of piece 0 \(.*2\.png\)"):
        encode(data, autoencoder, 2)
    data = dataclasses.replace(data, skip_corrupt=True)
    with pytest.warns(UserWarning, match="skipped 1 corrupt images|corrupt image: train row 2"):
        encode(data, autoencoder, 2)
    cache = open_cache(data, load_autoencoder(autoencoder), True)
    assert cache.train["label"][:].tolist() == [0, 1, 1]


def test_what_no_stream_can_do_is_said(tmp_path, autoencoder):
    data = write_streams(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.streaming=true: a stream can only be read in order, by `latent-egc"):
        build_data(data, None, 2, seed=0)

    def refused(match, num_classes=2, **changes):
        with pytest.raises(ConfigError, match=match):
            encode(caching(dataclasses.replace(data, **changes), tmp_path / "cache"), autoencoder, num_classes)
        assert not (tmp_path / "cache" / "train").exists()

    refused(r"streaming=true: the digits", dataset="digits", data_files=None)
    refused(r"streaming=true needs data\.validation_split", validation_split=None)
    refused(r"model\.num_classes=3, but .* 2 classes", num_classes=3)
    write_parquet(tmp_path / "strings.parquet", ["a", "b"])
    strings = {split: str(tmp_path / "strings.parquet") for split in ("train", "validation")}
    refused(r"data\.label_column='label' holds strings", data_files=strings)
    write_parquet(tmp_path / "numbers.parquet", [0, 1, 7])
    numbers = {split: str(tmp_path / "numbers.parquet") for split in ("train", "validation")}
    with pytest.raises(ConfigError, match=r"^label out of range: train row 2 of piece 0 has 7, allowed are 0 to 1"):
        encode(
            caching(dataclasses.replace(data, data_files=numbers), tmp_path / "cache", num_workers=1), autoencoder, 2
        )
