"""What samples are compared with: images of the training split, or an .npz of images or of their moments.

The features are kept beside the tables that `datasets` prepares, in HF_DATASETS_CACHE/latent_egc_features, so that the
images are read once for all networks, suites and reports. All of them are kept, not their moments alone: precision,
recall and KID need them. A file says of which content it was made and has a checksum; one of other content, or a
damaged one, is made again.
"""

import dataclasses
import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file

from latent_egc.atomic import CheckpointError, replace_file
from latent_egc.config import ConfigError
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.feature_extractors import INCEPTION, Extractor, Moments, moments
from latent_egc.measuring.image_archives import ImageArchive
from latent_egc.measuring.judges import features_of
from latent_egc.measuring.meaning import data_meaning, file_digest

Kept = dict[str, torch.Tensor]


class TrainingSet:
    """Images of the training split.

    Args:
        context: of the study.
        count: how many, drawn by the seed; None: all.
    """

    def __init__(self, context: EvaluationContext, count: int | None) -> None:
        self.context, self.table = context, context.splits.train
        self.chosen = context.choose(np.arange(len(self.table)), count)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return f"{len(self):,} training images"

    @cached_property
    def rows(self) -> np.ndarray:
        """(R,): those that are compared with, the chosen ones less corrupt ones if they may be."""
        return self.context.readable(self.table, self.chosen, self.context.data.skip_corrupt)

    def images(self, positions: Sequence[int]) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] on the device."""
        return self.context.pixel_values(self.table, self.rows[list(positions)]) / 2 + 0.5

    def features(self, extractor: Extractor) -> np.ndarray:
        """(R, D), computed where they are not kept yet."""
        context, name = self.context, f"{extractor.name}, {self.table.name}"

        def computed() -> Kept:
            found = context.over_in_parts(len(self), lambda batch: extractor(self.images(batch)), name)
            return {"features": found, "rows": torch.from_numpy(self.rows)}

        data = data_meaning(dataclasses.asdict(context.data))
        place = {"data": data, "split": self.table.name, "rows": hashlib.sha256(self.chosen.tobytes()).hexdigest()}
        kept = _kept(context, extractor, place, {"images": self._content}, computed)
        self.rows = kept["rows"].numpy()
        return kept["features"].numpy()

    @cached_property
    def _content(self) -> str:
        """By `datasets`' own fingerprint of the table, and the pixels of three images where they can be read."""
        digest = hashlib.sha256(self.table.rows._fingerprint.encode())
        for row in self.chosen[[0, len(self.chosen) // 2, -1]]:
            readable = self.table.is_readable(row)
            digest.update(self.table.image(row).tobytes() if readable else b"corrupt")
        return digest.hexdigest()

    def moments(self, extractor: Extractor, features: np.ndarray) -> Moments:
        """Of its features (R, D)."""
        return moments(features)


class ArchivedSet:
    """The images or the moments of an .npz.

    Args:
        context: of the study.
        archive: read from it.
        key: of the setting that names it.
    """

    def __init__(self, context: EvaluationContext, archive: ImageArchive, key: str) -> None:
        self.context, self.archive, self.key = context, archive, key

    def __len__(self) -> int:
        return 0 if self.archive.images is None else len(self.archive.images)

    def __str__(self) -> str:
        return f"{len(self):,} images of {self.archive.path}" if len(self) else f"the statistics in {self.archive.path}"

    def images(self, positions: Sequence[int]) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] on the device."""
        return self.archive.images[list(positions)].to(self.context.accelerator.device) / 255

    def features(self, extractor: Extractor) -> np.ndarray | None:
        """(R, D), computed where they are not kept yet; None where the file holds no images."""
        images = self.archive.images
        if images is None:
            return None

        def computed() -> Kept:
            return {"features": torch.from_numpy(features_of(self.context, extractor, images))}

        place = {"file": str(Path(self.archive.path).resolve())}
        content = {"images": file_digest(Path(self.archive.path))}
        return _kept(self.context, extractor, place, content, computed)["features"].numpy()

    def moments(self, extractor: Extractor, features: np.ndarray | None) -> Moments:
        """Those in the file for Inception, as ADM's evaluator takes them, or where it holds no images; or of its
        features (R, D).

        Raises ConfigError: those in the file are of other features.
        """
        given = self.archive.moments
        if given is None or (len(self) and extractor.name != INCEPTION):
            return moments(features)
        size = self.context.image_size
        num_features = extractor(torch.zeros(1, 3, size, size, device=self.context.accelerator.device)).shape[1]
        if len(given[0]) != num_features:
            raise ConfigError(
                f"{self.key}: the statistics in {self.archive.path} are of {len(given[0])} features, {extractor.name} "
                f"has {num_features}"
            )
        return given


def _kept(
    context: EvaluationContext,
    extractor: Extractor,
    place: dict[str, Any],
    content: dict[str, str],
    computed: Callable[[], Kept],
) -> Kept:
    """What is kept of these images and this extractor, or what `computed` gives, which then is; for every process.

    Args:
        context: of the study, whose main process reads and writes.
        extractor: whose features.
        place: which images are asked for: plain values.
        content: digests of what these images are today.
        computed: "features" (R, D) and other tensors; for every process too.
    """
    place, content = place | {"extractor": extractor.name}, content | {"extractor": extractor.digest}
    key = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "latent_egc_features"
    path, is_main = folder / f"{extractor.name}-{key}.safetensors", context.accelerator.is_main_process
    # The main process's word: folders of several machines need not hold the same.
    (found,) = broadcast_object_list([_read(path, content) if is_main else None])
    if found is None:
        found = computed()
        if is_main:
            _write(path, found, place, content)
    return found


def _read(path: Path, content: dict[str, str]) -> Kept | None:
    """A whole file's tensors; None, with a warning, for one that is damaged or was made of something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["record"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if _facts(found) != record["tensors"]:
            raise ValueError("counts or checksums differ")
        other = [name for name, digest in content.items() if record["content"].get(name) != digest]
    except Exception as error:  # json, safetensors and torch have no common one for a damaged file
        warnings.warn(f"{path} is damaged, its features are computed again: {error}", stacklevel=4)
        return None
    if other:
        warnings.warn(f"{path} was made of other {' and '.join(other)}, its features are computed again", stacklevel=4)
        return None
    return found


def _write(path: Path, tensors: Kept, place: dict[str, Any], content: dict[str, str]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"record": json.dumps({"place": place, "content": content, "tensors": _facts(tensors)})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda unfinished: save_file(tensors, unfinished, metadata))
    except (OSError, CheckpointError) as error:  # a cache that cannot be written must not end a study
        warnings.warn(f"the reference's features are not kept for the next time: {error}", stacklevel=4)


def _facts(tensors: Kept) -> dict[str, list[int]]:
    """Number of rows and CRC-32 of each tensor."""
    return {name: [len(tensor), zlib.crc32(tensor.contiguous().numpy())] for name, tensor in tensors.items()}
