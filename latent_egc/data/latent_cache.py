"""The latent cache: every image encoded once, in several views, as a `datasets` dataset in shards.

Crops and flips are drawn before encoding, since a mirrored latent is not the latent of the mirrored image. A shard is
written to a temporary folder and renamed, so a killed run goes on behind the last whole one. `cache.json` says what was
encoded how; a cache made otherwise is refused with what differs.

    CACHE/cache.json   CACHE/train/00000/{shard.json, ...}   CACHE/validation/00000/ ...

`data/encoding.py` writes it. Encoded from a stream, whose length nobody knows before its end, a shard is 00000-00000,
by its piece of the stream and its number there, and `cache.json` says in the end how many each piece has.

Every opening reads the whole cache once and compares it with the checksums in `shard.json`: what rots on a disk changes
no date, so that a check of the first opening would find nothing. They are CRC-32, which is made for such errors and
takes 12 s for the 50 GB of ImageNet (SHA-256: 60 s); the pages are then in memory for the first epoch.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import ModelMixin
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from latent_egc.atomic import replace_text
from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.autoencoders import fingerprint
from latent_egc.data.sources import CorruptImageError, Splits
from latent_egc.data.stream import AUGMENTATION, SampleStream, random_stream
from latent_egc.data.views import keep_labels

# Half precision: its rounding, 2^-11 of a value, is far below the autoencoder's own error, and it halves the disk.
STORED_DTYPE = "float16"

# Keys of the data section that do not decide what is encoded.
NOT_IDENTITY = {"label_fraction", "latent_cache", "num_workers", "skip_corrupt"}
NOT_IDENTITY |= {"reprob", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob"}  # of latents, at each step anew


def shard_name(piece: int, number: int | None = None) -> str:
    """The folder of a table's shard, or of shard `number` of a stream's piece."""
    return f"{piece:05d}" if number is None else f"{piece:05d}-{number:05d}"


def _checksums(shard: Path) -> dict[str, int]:
    """CRC-32 of each of a shard's files, by name; of none, where every image was corrupt."""
    files = sorted(path for path in shard.iterdir() if path.name not in ("shard.json", "shard.json.tmp"))
    return {path.name: zlib.crc32(path.read_bytes()) for path in files}


def write_checksums(shard: Path, facts: dict[str, Any] | None = None) -> None:
    """Writes a shard's `shard.json`: its checksums, and what else is to be known of it."""
    replace_text(shard / "shard.json", json.dumps({"crc32": _checksums(shard)} | (facts or {})))


def damage(shard: Path, checksums: bool) -> str | None:
    """What is wrong with a shard, None for a whole one; `checksums`: the cache is not from before there were any."""
    if not shard.is_dir():
        return "is missing"
    if not (checksums or (shard / "shard.json").exists()):
        return None
    try:
        written, found = json.loads((shard / "shard.json").read_text())["crc32"], _checksums(shard)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"cannot be read: {error}"
    differing = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    return f"is not as it was written: {', '.join(differing)}" if differing else None


def is_readable_without_checksums(shard: Path) -> bool:
    """Whether this is a shard of before that holds rows; an empty one is written again, be it that all images of it
    were corrupt or that it was emptied.
    """
    if not shard.is_dir() or (shard / "shard.json").exists():
        return False
    try:
        return len(datasets.load_from_disk(str(shard))) > 0
    except Exception:  # pyarrow and datasets have no common error for a damaged file
        return False


@contextmanager
def no_datasets_progress() -> Iterator[None]:
    """Without the bar that `datasets` draws for every shard, in the middle of ours."""
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()


@dataclasses.dataclass
class LatentCache:
    """A finished cache, opened for reading; rows are memory-mapped."""

    train: datasets.Dataset
    validation: datasets.Dataset
    class_names: list[str]


def open_cache(data: DataConfig, vae: ModelMixin, labelled: bool) -> LatentCache:
    """Opens `data.latent_cache` for a run with this data section and autoencoder, and with classes or without.

    A run without classes reads one that was written with them too, every row as unlabelled.

    Raises ConfigError: no cache there, an unfinished or damaged one, or one of other data, views or autoencoder: what
    differs.
    """
    folder = Path(data.latent_cache)
    record = read_record(folder)
    expected = identity(data, vae, labelled)
    if not labelled:
        del expected["labelled"]
    refuse_other(folder, record, expected)
    if not record.get("complete"):
        raise ConfigError(f"data.latent_cache={str(folder)!r} is unfinished; `latent-egc encode` goes on with it")
    splits = []
    for name in ("train", "validation"):
        shards = [folder / name / shard for shard in _shard_names(record, name)]
        _refuse_damaged(folder, shards, record.get("checksums", False))
        # A shard of which every image was corrupt holds no rows.
        filled = [shard for shard in shards if (shard / "dataset_info.json").exists()]
        if not filled:
            raise ConfigError(f"data.latent_cache={str(folder)!r}: the {name} split holds no readable image")
        rows = datasets.concatenate_datasets([datasets.load_from_disk(str(shard)) for shard in filled])
        if not labelled:
            rows = rows.remove_columns("label").add_column("label", np.full(len(rows), -1))
        splits.append(rows.with_format("numpy"))
    return LatentCache(splits[0], splits[1], record["class_names"] if labelled else [])


def _shard_names(record: dict[str, Any], split: str) -> list[str]:
    """Of a finished cache, in the order of their images."""
    if "num_shards" in record:  # of each piece of a stream
        counts = record["num_shards"][split]
        return [shard_name(piece, number) for piece, count in enumerate(counts) for number in range(count)]
    return [shard_name(piece) for piece in range(-(-record[f"num_{split}"] // record["images_per_shard"]))]


def _refuse_damaged(folder: Path, shards: Sequence[Path], checksums: bool) -> None:
    """Raises ConfigError, naming the shards, where some are missing or not as they were written."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # reading and summing both run beside other threads
        found = pool.map(lambda shard: damage(shard, checksums), shards)
        progress = tqdm(found, desc="check latent cache", total=len(shards), unit="shard", leave=False)
        damaged = [f"{shard} {what}" for shard, what in zip(shards, progress, strict=True) if what is not None]
    if damaged:
        shown = "; ".join(damaged[:5]) + (f"; and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        raise ConfigError(
            f"data.latent_cache={str(folder)!r} is damaged: {shown}. `latent-egc encode` writes these shards again"
        )


class CachedViews(Dataset):
    """`Views` that were encoded beforehand: moments, (C', h, w).

    Args:
        rows: a split of a cache.
        seed: the run's.
        label_fraction: the share of labels to keep.
    """

    def __init__(self, rows: datasets.Dataset, seed: int, label_fraction: float = 1.0) -> None:
        self.rows, self.seed = rows, seed
        self.labels = keep_labels(np.asarray(rows["label"]), label_fraction, seed)
        self.stream = SampleStream(len(rows), seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        """One item of `__getitems__`."""
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: list[int]) -> list[dict[str, torch.Tensor]]:
        """See `Views`."""
        # One read for the whole batch: row by row, finding and unpacking them takes longer than the rest.
        indices = [self.stream.image_index(sample) for sample in samples]
        rows = self.rows[indices]
        items = []
        for i, sample in enumerate(samples):
            rng = random_stream(self.seed, AUGMENTATION, sample)
            view, clean = (rows[key][i][rng.integers(len(rows[key][i]))] for key in ("moments", "clean_moments"))
            items.append(
                {
                    "view": torch.from_numpy(view.astype(np.float32)),
                    "clean_view": torch.from_numpy(clean.astype(np.float32)),
                    "class_labels": torch.tensor(self.labels[indices[i]]),
                    "num_skipped": torch.tensor(0),
                }
            )
        return items

    def central(self, images: Sequence[int]) -> list[tuple[int, torch.Tensor, int]]:
        """See `Views`; corrupt images were left out when the cache was written."""
        rows = self.rows[list(images)]
        views = [torch.from_numpy(views[0].astype(np.float32)) for views in rows["moments"]]
        return list(zip(images, views, map(int, rows["label"]), strict=True))

    def moments(self, vae: ModelMixin | None, views: torch.Tensor) -> torch.Tensor:
        """The views as they are: they are moments."""
        return views


def identity(data: DataConfig, vae: ModelMixin, labelled: bool) -> dict[str, Any]:
    """What decides the content of a cache, for its record."""
    keys = [field.name for field in dataclasses.fields(data) if field.name not in NOT_IDENTITY]
    values = {f"data.{key}": list(v) if isinstance(v := getattr(data, key), tuple) else v for key in keys}
    return values | {"autoencoder": fingerprint(vae), "labelled": labelled}


def content_digest(splits: Splits) -> str:
    """Of all labels and three images a split: another dataset in the same place is noticed before shards are mixed."""
    digest = hashlib.sha256()
    for table in (splits.train, splits.validation):
        digest.update(table.labels.tobytes())
        for index in sorted({0, len(table) // 2, len(table) - 1}):
            try:
                digest.update(table.image(index).tobytes())
            except CorruptImageError:
                digest.update(b"corrupt")
    return digest.hexdigest()[:16]


def refuse_other(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises ConfigError, with what differs, where a cache's record has not what is expected of it."""
    # A key that was not there yet had the effect of its default.
    defaults = {f"data.{f.name}": f.default for f in dataclasses.fields(DataConfig)}
    was = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()} | found
    was = {key: was.get(key) for key in expected}
    differences = [
        f"{key}: the cache has {was[key]!r}, this run {value!r}" for key, value in expected.items() if was[key] != value
    ]
    if differences:
        raise ConfigError(f"data.latent_cache={str(folder)!r} was made otherwise: " + "; ".join(differences))


def read_record(folder: Path) -> dict[str, Any]:
    """A cache's `cache.json`. Raises ConfigError: there is none, or it is damaged."""
    try:
        record = json.loads((folder / "cache.json").read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.latent_cache={str(folder)!r} holds no latent cache; write it with `latent-egc encode CONFIG`"
        ) from error
    except (OSError, ValueError) as error:
        record = error
    if not isinstance(record, dict):
        raise ConfigError(
            f"data.latent_cache: {folder / 'cache.json'} is not a cache's record, {str(record)[:100]!r}; without it "
            "nobody knows what the shards hold: delete the folder and encode again"
        )
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes a cache's `cache.json`."""
    replace_text(folder / "cache.json", json.dumps(record, indent=1))
