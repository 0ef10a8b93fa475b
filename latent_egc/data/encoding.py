"""Writing the latent cache: shards are shared among processes, and images are decoded while the autoencoder runs.

A table's shard, or a piece of a stream, is read by one worker of one process, so that nothing in a shard depends on how
many there are. Loaders' workers decode, crop and resize; their process encodes what comes and writes each shard whole.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec.asyn
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from diffusers import ModelMixin
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from latent_egc.atomic import try_lock
from latent_egc.config import AutoencoderConfig, ConfigError, DataConfig
from latent_egc.data.autoencoders import encode_moments, latent_shape, load_autoencoder, store_channels_last
from latent_egc.data.image_streams import ImageStream, first_rows_digest, load_streams
from latent_egc.data.latent_cache import (
    STORED_DTYPE,
    content_digest,
    damage,
    identity,
    is_readable_without_checksums,
    no_datasets_progress,
    read_record,
    refuse_other,
    shard_name,
    write_checksums,
    write_record,
)
from latent_egc.data.sources import CorruptImageError, ImageTable, load_splits
from latent_egc.data.stream import CACHED_VIEW, num_loader_workers, random_stream
from latent_egc.data.views import central_view, clean_view

IMAGES_PER_SHARD = 256
LOCK = "encode.lock"
LOOKS_EVERY = 1.0  # seconds, whether another call has ended
# How long a process that has nothing left to encode waits for the others: longer than any encoding takes.
PATIENCE = timedelta(days=30)


def start_processes() -> PartialState:
    """The processes that a launcher started, or this one alone. Raises ConfigError where each would be alone."""
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", processes.num_processes))
    if launched != processes.num_processes:
        raise ConfigError(
            f"the launcher started {launched} processes (WORLD_SIZE), but Accelerate sees {processes.num_processes}: "
            "each would do all of the work. On a CPU set ACCELERATE_USE_CPU=true in the environment"
        )
    return processes


def encode(
    data: DataConfig,
    autoencoder: AutoencoderConfig,
    num_classes: int | None,
    batch_size: int = 64,
    device: str = "cpu",
) -> Path:
    """Writes the latent cache that `data.latent_cache` names, and returns it; goes on where a killed call stopped, and
    writes shards again that are missing or damaged. For every process to call, which share the work.

    Args:
        data, autoencoder: a run's sections; they decide what is written.
        num_classes: K of the run's model; None leaves out the labels.
        batch_size: views encoded at once.
        device: where this process's autoencoder runs.

    Raises:
        ConfigError: no `data.latent_cache`, or the folder holds a cache of other data, views or autoencoder, or
            files that are no cache.
        CorruptImageError: an unreadable image, unless `data.skip_corrupt`.
    """
    if data.latent_cache is None:
        raise ConfigError("data.latent_cache must name the folder to write")
    if autoencoder.path is None:
        raise ConfigError("autoencoder.path is null: pixel space has no latents to cache")
    folder = Path(data.latent_cache)
    others = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if others and not (folder / "cache.json").is_file():
        raise ConfigError(f"data.latent_cache={str(folder)!r} holds other files; name an empty or a new folder")
    processes = start_processes()
    vae = load_autoencoder(autoencoder, device)
    latent_shape(vae, data.image_size)
    tables, content = _tables(data, num_classes)
    record = identity(data, vae, num_classes is not None) | content
    record["images_per_shard"] = IMAGES_PER_SHARD
    with _alone_in(folder, processes):
        _write_cache(folder, record, tables, Encoder(vae, data, batch_size), processes)
    return folder


@contextmanager
def _alone_in(folder: Path, processes: PartialState) -> Iterator[None]:
    """Waits for what another call is writing there; for every process to call."""
    lock = None
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if (lock := try_lock(folder / LOCK)) is None:
            print(f"another call is encoding into {folder}: this one goes on when it has ended", flush=True)
        while lock is None:
            time.sleep(LOOKS_EVERY)
            lock = try_lock(folder / LOCK)
    processes.wait_for_everyone()  # every process sees the folder as it is now
    with lock or nullcontext():
        yield


def _write_cache(
    folder: Path,
    record: dict[str, Any],
    tables: Sequence[ImageTable | ImageStream],
    encoder: "Encoder",
    processes: PartialState,
) -> None:
    """What `encode` does in a folder that no other call writes; the record says what is written."""
    checksums, is_new = True, not (folder / "cache.json").is_file()
    if not is_new:
        found = read_record(folder)
        refuse_other(folder, found, record)
        checksums = found.get("checksums", False)
    processes.wait_for_everyone()  # every process has seen the folder as it was
    if is_new and processes.is_main_process:
        write_record(folder, record | {"checksums": True})
    processes.wait_for_everyone()
    num_skipped = 0
    for table in tables:
        num_skipped += _encode_split(encoder, table, folder / table.name, checksums, processes)
    num_skipped = sum(gather_object([num_skipped]))  # and every process has written its shards
    if processes.is_main_process:
        if num_skipped:
            warnings.warn(f"skipped {num_skipped} corrupt images", stacklevel=2)
        if encoder.data.streaming:
            missing = [
                f"{stream.name} {piece}"
                for stream in tables
                for piece in range(stream.num_pieces)
                if not _whole_shards(folder / stream.name, stream, piece, checksums=True)[1]
            ]
            if missing:
                raise ConfigError(
                    f"data.latent_cache={str(folder)!r} lacks pieces that other processes wrote, "
                    f"{', '.join(missing)}: all must write into one folder that each of them sees"
                )
            record["num_shards"] = {
                stream.name: [len(_stream_shards(folder / stream.name, piece)) for piece in range(stream.num_pieces)]
                for stream in tables
            }
        write_record(folder, record | {"checksums": True, "complete": True})
    processes.wait_for_everyone()


def _tables(data: DataConfig, num_classes: int | None) -> tuple[Sequence[ImageTable | ImageStream], dict[str, Any]]:
    """Both splits, and what the cache's record says of their content. Raises ConfigError."""
    if data.streaming:
        *streams, names = load_streams(data, num_classes)
        pieces = {stream.name: stream.num_pieces for stream in streams}
        return streams, {"num_pieces": pieces, "content": first_rows_digest(*streams), "class_names": names}
    splits = load_splits(data, num_classes)
    counts = {"num_train": len(splits.train), "num_validation": len(splits.validation)}
    content = {"content": content_digest(splits), "class_names": splits.class_names}
    return (splits.train, splits.validation), counts | content


class ViewBatch(NamedTuple):
    """Views of consecutive images of one shard, or what was wrong with them."""

    shard: str
    views: torch.Tensor | None  # (B, V, 3, H, W) in [-1, 1]; None where no image is readable
    labels: list[int]
    errors: list[Exception]
    num_images: int  # corrupt ones too
    ends_shard: bool
    ends_piece: bool


class ShardViews(IterableDataset):
    """The views of a split's images, batch by batch, in a loader's workers.

    Args:
        table: the split.
        data: sizes and augmentation.
        todo: pieces to read, each with the numbers of its shards that are left out; of a table, each shard is a piece.
        num_images: of a batch.
    """

    def __init__(
        self, table: ImageTable | ImageStream, data: DataConfig, todo: list[tuple[int, set[int]]], num_images: int
    ) -> None:
        self.table, self.data, self.todo, self.num_images = table, data, todo, num_images

    def __iter__(self) -> Iterator[ViewBatch]:
        worker, todo = get_worker_info(), self.todo
        if worker is not None:
            fsspec.asyn.reset_lock()  # a fork has the lock, but not the thread that would release it
            todo = todo[worker.id :: worker.num_workers]
        for piece, whole in todo:
            try:
                yield from self._batches(piece, whole)
            except ConfigError as error:  # else the loader would wrap it into its own traceback
                yield ViewBatch("", None, [], [error], 0, False, True)

    def _batches(self, piece: int, whole: set[int]) -> Iterator[ViewBatch]:
        size = IMAGES_PER_SHARD
        number = next(number for number in range(len(whole) + 1) if number not in whole)
        rows, ahead = self._read(piece, number * size), []
        while True:
            ahead += islice(rows, size + 1 - len(ahead))  # one more, to know whether there is another shard
            images, ahead = ahead[:size], ahead[size:]
            if number not in whole:
                name = shard_name(piece, number if isinstance(self.table, ImageStream) else None)
                firsts = range(0, max(1, len(images)), self.num_images)
                for first in firsts:
                    ends = first == firsts[-1]
                    yield self._batch(name, images[first : first + self.num_images], ends, ends and not ahead)
            if not ahead:
                return
            number += 1

    def _read(self, piece: int, first: int) -> Iterator[tuple[int, int, Callable[[], Image.Image]]]:
        if isinstance(self.table, ImageStream):
            return self.table.read(piece, first)
        indices = range(piece * IMAGES_PER_SHARD, min((piece + 1) * IMAGES_PER_SHARD, len(self.table)))
        return ((index, int(self.table.labels[index]), partial(self.table.image, index)) for index in indices)

    def _batch(self, shard: str, images: Sequence[tuple], ends_shard: bool, ends_piece: bool) -> ViewBatch:
        views, labels, errors = [], [], []
        for number, label, read in images:
            try:
                views.append(self._views(number, read()))
            except CorruptImageError as error:
                errors.append(error)
            else:
                labels.append(label)
        stacked = torch.stack(views) if views else None
        return ViewBatch(shard, stacked, labels, errors, len(images), ends_shard, ends_piece)

    def _views(self, number: int, image: Image.Image) -> torch.Tensor:
        """(V, 3, H, W): the central views, and the clean branch's, drawn by the image's number."""
        views = [central_view(image, self.data.image_size)]
        if self.table.name == "train":
            if self.data.horizontal_flip:
                views.append(views[0].flip(-1))
            rng = random_stream(0, CACHED_VIEW, number)
            views += [clean_view(image, self.data, rng) for _ in range(self.data.num_views)]
        return torch.stack(views)


class Encoder:
    """Shards of moments, from what workers decode.

    Args:
        vae: on its device.
        data: the section.
        batch_size: views encoded at once.
    """

    def __init__(self, vae: ModelMixin, data: DataConfig, batch_size: int) -> None:
        store_channels_last(vae)
        self.vae, self.data, self.batch_size = vae, data, batch_size

    def num_central(self, split: str) -> int:
        """The views of an image that come before those of the clean branch."""
        return 2 if split == "train" and self.data.horizontal_flip else 1

    def moments(
        self, table: ImageTable | ImageStream, todo: list[tuple[int, set[int]]]
    ) -> Iterator[tuple[ViewBatch, torch.Tensor | None]]:
        """The batches of `ShardViews`, and their moments (images, views, C', h, w) on the autoencoder's device.

        Raises:
            ConfigError, CorruptImageError: what went wrong with a batch, unless it may be skipped.
        """
        num_views = self.num_central(table.name) + (self.data.num_views if table.name == "train" else 0)
        views = ShardViews(table, self.data, todo, max(1, self.batch_size // num_views))
        workers = min(num_loader_workers(self.data, reads_images=True), len(todo))
        pinned = workers > 0 and self.vae.device.type == "cuda"
        for batch in DataLoader(views, batch_size=None, num_workers=workers, pin_memory=pinned):
            for error in batch.errors:
                if not (self.data.skip_corrupt and isinstance(error, CorruptImageError)):
                    raise error
                warnings.warn(str(error), stacklevel=2)
            if batch.views is None:
                yield batch, None
            else:
                parts = batch.views.to(self.vae.device, non_blocking=True).flatten(0, 1).split(self.batch_size)
                encoded = torch.cat([encode_moments(self.vae, part) for part in parts])
                yield batch, encoded.unflatten(0, batch.views.shape[:2])

    def shards(
        self, table: ImageTable | ImageStream, todo: list[tuple[int, set[int]]], progress: tqdm
    ) -> Iterator[tuple[str, datasets.Dataset | None, bool, int]]:
        """For each shard of `todo` (see `ShardViews`): name, rows, None where every image is corrupt, whether it is its
        piece's last, and how many images were skipped.
        """
        collected: dict[str, tuple[list[torch.Tensor], list[int], list[Exception]]] = {}
        for batch, encoded in self.moments(table, todo):
            moments, labels, errors = collected.setdefault(batch.shard, ([], [], []))
            if encoded is not None:
                moments.append(encoded)
            labels += batch.labels
            errors += batch.errors
            progress.update(batch.num_images)
            if batch.ends_shard:
                del collected[batch.shard]
                rows = self._rows(table.name, torch.cat(moments), labels) if moments else None
                yield batch.shard, rows, batch.ends_piece, len(errors)

    def _rows(self, split: str, moments: torch.Tensor, labels: list[int]) -> datasets.Dataset:
        """One shard's rows; moments are (images, views, C', h, w)."""
        stored, num_central = moments.cpu().numpy().astype(STORED_DTYPE), self.num_central(split)
        columns: dict[str, Any] = {"moments": stored[:, :num_central], "label": labels}
        features = {
            "moments": datasets.Array4D(stored[0, :num_central].shape, STORED_DTYPE),
            "label": datasets.Value("int64"),
        }
        if split == "train":
            columns["clean_moments"] = stored[:, num_central:]
            features["clean_moments"] = datasets.Array4D(stored[0, num_central:].shape, STORED_DTYPE)
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _encode_split(
    encoder: Encoder, table: ImageTable | ImageStream, folder: Path, checksums: bool, processes: PartialState
) -> int:
    """Encodes what is missing or damaged of this process's share of a split; returns how many images were skipped.

    `checksums` is false for a cache from before there were any: a readable shard without them gets them.
    """
    folder.mkdir(exist_ok=True)
    size = IMAGES_PER_SHARD
    num_pieces = table.num_pieces if isinstance(table, ImageStream) else -(-len(table) // size)
    todo = []
    for piece in range(processes.process_index, num_pieces, processes.num_processes):
        whole, is_done = _whole_shards(folder, table, piece, checksums)
        if not is_done:
            todo.append((piece, whole))
    num_skipped = 0
    total = None if isinstance(table, ImageStream) else sum(min(size, len(table) - piece * size) for piece, _ in todo)
    bar = {"desc": f"encode {table.name}", "unit": "image", "disable": not processes.is_main_process}
    with tqdm(total=total, **bar) as progress, closing(encoder.shards(table, todo, progress)) as shards:
        for name, rows, ends_piece, skipped in shards:
            _write_shard(folder / name, rows, {"ends_piece": ends_piece} if isinstance(table, ImageStream) else {})
            num_skipped += skipped
    return num_skipped


def _whole_shards(folder: Path, table: ImageTable | ImageStream, piece: int, checksums: bool) -> tuple[set[int], bool]:
    """The numbers of a piece's shards that are as they were written, and whether none is missing."""
    if not isinstance(table, ImageStream):
        shard = folder / shard_name(piece)
        if not checksums and is_readable_without_checksums(shard):
            write_checksums(shard)
        return set(), damage(shard, checksums=True) is None
    whole, count = set(), None
    for path in _stream_shards(folder, piece):
        if damage(path, checksums=True) is None:
            number = int(path.name.partition("-")[2])
            whole.add(number)
            if json.loads((path / "shard.json").read_text())["ends_piece"]:
                count = number + 1
    return whole, whole == set(range(count or 0)) and count is not None


def _stream_shards(folder: Path, piece: int) -> list[Path]:
    """Those of a stream's piece that are there."""
    return list(folder.glob(f"{shard_name(piece)}-{'[0-9]' * 5}"))


def _write_shard(shard: Path, rows: datasets.Dataset | None, facts: dict[str, Any]) -> None:
    """Writes a shard under a temporary name, with `facts` and checksums beside its rows, and renames it."""
    unfinished = shard.with_name(shard.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    if rows is None:
        unfinished.mkdir()
    else:
        with no_datasets_progress():
            rows.save_to_disk(unfinished)
    write_checksums(unfinished, facts)
    shutil.rmtree(shard, ignore_errors=True)
    os.replace(unfinished, shard)
