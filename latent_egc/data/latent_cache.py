"""The latent cache: every image encoded once, in several views, as a `datasets` dataset in shards.

Crops and flips are drawn before encoding, since a mirrored latent is not the latent of the mirrored image. A shard is
written to a temporary folder and renamed, so a killed run goes on behind the last whole one. `cache.json` says what was
encoded how; a cache made otherwise is refused with what differs.

    CACHE/cache.json   CACHE/train/00000/{shard.json, ...}   CACHE/validation/00000/ ...

Every opening reads the whole cache once and compares it with the checksums in `shard.json`: what rots on a disk changes
no date, so that a check of the first opening would find nothing. They are CRC-32, which is made for such errors and
takes 12 s for the 50 GB of ImageNet (SHA-256: 60 s); the pages are then in memory for the first epoch.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
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
from latent_egc.config import AutoencoderConfig, ConfigError, DataConfig
from latent_egc.data.autoencoders import encode_moments, fingerprint, latent_shape, load_autoencoder
from latent_egc.data.sources import CorruptImageError, ImageTable, Splits, load_splits
from latent_egc.data.stream import AUGMENTATION, CACHED_VIEW, SampleStream, random_stream
from latent_egc.data.views import central_view, clean_view, keep_labels

IMAGES_PER_SHARD = 256
# Half precision: its rounding, 2^-11 of a value, is far below the autoencoder's own error, and it halves the disk.
STORED_DTYPE = "float16"

# Keys of the data section that do not decide what is encoded.
NOT_IDENTITY = {"label_fraction", "latent_cache", "num_workers", "skip_corrupt"}
NOT_IDENTITY |= {"reprob", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob"}  # of latents, at each step anew


def encode(
    data: DataConfig,
    autoencoder: AutoencoderConfig,
    num_classes: int | None,
    batch_size: int = 64,
    device: str = "cpu",
) -> Path:
    """Writes the latent cache that `data.latent_cache` names, and returns it; goes on where a killed call stopped, and
    writes shards again that are missing or damaged.

    Args:
        data, autoencoder: a run's sections; they decide what is written.
        num_classes: K of the run's model; None leaves out the labels.
        batch_size: images encoded at once.
        device: where the autoencoder runs.

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
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "cache.json").is_file():
        raise ConfigError(f"data.latent_cache={str(folder)!r} holds other files; name an empty or a new folder")
    vae = load_autoencoder(autoencoder, device)
    latent_shape(vae, data.image_size)
    splits = load_splits(data, num_classes)
    record = _identity(data, vae, num_classes is not None) | {
        "num_train": len(splits.train),
        "num_validation": len(splits.validation),
        "content": content_digest(splits),
        "class_names": splits.class_names,
        "images_per_shard": IMAGES_PER_SHARD,
    }
    checksums = True
    if (folder / "cache.json").is_file():
        found = _read_record(folder)
        _refuse_other(folder, found, record)
        checksums = found.get("checksums", False)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, record | {"checksums": True})
    num_skipped = 0
    for table in (splits.train, splits.validation):
        num_skipped += _encode_split(data, vae, table, folder / table.name, batch_size, checksums)
    if num_skipped:
        warnings.warn(f"skipped {num_skipped} corrupt images", stacklevel=2)
    _write_record(folder, record | {"checksums": True, "complete": True})
    return folder


def _encode_split(
    data: DataConfig, vae: ModelMixin, table: ImageTable, folder: Path, batch_size: int, checksums: bool
) -> int:
    """Encodes what is missing or damaged of one split, shard by shard; returns how many images were skipped.

    `checksums` is false for a cache from before there were any: a readable shard without them gets them.
    """
    folder.mkdir(exist_ok=True)
    num_skipped = 0
    with tqdm(total=len(table), desc=f"encode {table.name}", unit="image") as progress:
        for number, first in enumerate(range(0, len(table), IMAGES_PER_SHARD)):
            indices = range(first, min(first + IMAGES_PER_SHARD, len(table)))
            shard, unfinished = folder / f"{number:05d}", folder / f"{number:05d}.tmp"
            if not checksums and _is_readable_without_checksums(shard):
                _write_checksums(shard)
            elif _damage(shard, checksums=True) is not None:
                rows, skipped = _encode_rows(data, vae, table, indices, batch_size)
                num_skipped += skipped
                shutil.rmtree(unfinished, ignore_errors=True)
                if rows is None:
                    unfinished.mkdir()
                else:
                    with _no_datasets_progress():
                        rows.save_to_disk(unfinished)
                _write_checksums(unfinished)
                shutil.rmtree(shard, ignore_errors=True)
                os.replace(unfinished, shard)
            progress.update(len(indices))
    return num_skipped


def _checksums(shard: Path) -> dict[str, int]:
    """CRC-32 of each of a shard's files, by name; of none, where every image was corrupt."""
    files = sorted(path for path in shard.iterdir() if path.name not in ("shard.json", "shard.json.tmp"))
    return {path.name: zlib.crc32(path.read_bytes()) for path in files}


def _write_checksums(shard: Path) -> None:
    replace_text(shard / "shard.json", json.dumps({"crc32": _checksums(shard)}))


def _damage(shard: Path, checksums: bool) -> str | None:
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


def _is_readable_without_checksums(shard: Path) -> bool:
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
def _no_datasets_progress() -> Iterator[None]:
    """Without the bar that `datasets` draws for every shard, in the middle of ours."""
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()


def _encode_rows(
    data: DataConfig, vae: ModelMixin, table: ImageTable, indices: range, batch_size: int
) -> tuple[datasets.Dataset | None, int]:
    """The rows of one shard, None where every image is corrupt, and how many images were skipped."""
    is_train = table.name == "train"
    views, labels, num_skipped = [], [], 0
    for index in indices:
        try:
            image = table.image(index)
        except CorruptImageError as error:
            if not data.skip_corrupt:
                raise
            warnings.warn(str(error), stacklevel=2)
            num_skipped += 1
            continue
        central = [central_view(image, data.image_size)]
        clean = []
        if is_train:
            if data.horizontal_flip:
                central.append(central[0].flip(-1))
            rng = random_stream(0, CACHED_VIEW, index)
            clean = [clean_view(image, data, rng) for _ in range(data.num_views)]
        views.append(torch.stack(central + clean))
        labels.append(int(table.labels[index]))
    num_central = 2 if is_train and data.horizontal_flip else 1
    if not views:
        return None, num_skipped
    pixel_values = torch.cat(views)
    moments = torch.cat([encode_moments(vae, batch).cpu() for batch in pixel_values.split(batch_size)])
    stored = moments.unflatten(0, (len(views), -1)).numpy().astype(STORED_DTYPE)  # (images, views, C', h, w)
    columns: dict[str, Any] = {"moments": stored[:, :num_central], "label": labels}
    features = {
        "moments": datasets.Array4D(stored[0, :num_central].shape, STORED_DTYPE),
        "label": datasets.Value("int64"),
    }
    if is_train:
        columns["clean_moments"] = stored[:, num_central:]
        features["clean_moments"] = datasets.Array4D(stored[0, num_central:].shape, STORED_DTYPE)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features)), num_skipped


@dataclasses.dataclass
class LatentCache:
    """A finished cache, opened for reading; rows are memory-mapped."""

    train: datasets.Dataset
    validation: datasets.Dataset
    class_names: list[str]


def open_cache(data: DataConfig, vae: ModelMixin, labelled: bool) -> LatentCache:
    """Opens `data.latent_cache` for a run with this data section and autoencoder, and with classes or without.

    Raises ConfigError: no cache there, an unfinished or damaged one, or one of other data, views or autoencoder: what
    differs.
    """
    folder = Path(data.latent_cache)
    record = _read_record(folder)
    _refuse_other(folder, record, _identity(data, vae, labelled))
    if not record.get("complete"):
        raise ConfigError(f"data.latent_cache={str(folder)!r} is unfinished; `latent-egc encode` goes on with it")
    size, splits = record["images_per_shard"], []
    for name in ("train", "validation"):
        shards = [folder / name / f"{number:05d}" for number in range(-(-record[f"num_{name}"] // size))]
        _refuse_damaged(folder, shards, record.get("checksums", False))
        # A shard of which every image was corrupt holds no rows.
        filled = [shard for shard in shards if (shard / "dataset_info.json").exists()]
        if not filled:
            raise ConfigError(f"data.latent_cache={str(folder)!r}: the {name} split holds no readable image")
        rows = datasets.concatenate_datasets([datasets.load_from_disk(str(shard)) for shard in filled])
        splits.append(rows.with_format("numpy"))
    return LatentCache(splits[0], splits[1], record["class_names"])


def _refuse_damaged(folder: Path, shards: Sequence[Path], checksums: bool) -> None:
    """Raises ConfigError, naming the shards, where some are missing or not as they were written."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # reading and summing both run beside other threads
        found = pool.map(lambda shard: _damage(shard, checksums), shards)
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


def _identity(data: DataConfig, vae: ModelMixin, labelled: bool) -> dict[str, Any]:
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


def _refuse_other(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    # A key that was not there yet had the effect of its default.
    defaults = {f"data.{f.name}": f.default for f in dataclasses.fields(DataConfig)}
    found = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()} | found
    differences = [
        f"{key}: the cache has {found.get(key)!r}, this run {value!r}"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if differences:
        raise ConfigError(f"data.latent_cache={str(folder)!r} was made otherwise: " + "; ".join(differences))


def _read_record(folder: Path) -> dict[str, Any]:
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


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    replace_text(folder / "cache.json", json.dumps(record, indent=1))
