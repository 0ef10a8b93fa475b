"""Images that are read in order, once, from the Hub or from tar and parquet files, without a copy of them.

A stream's files, in at most `MAX_PIECES` groups of consecutive ones, are its pieces: what one worker of one process
reads from beginning to end, and where an interrupted reading goes on.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import fsspec
from PIL import Image

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.sources import (
    CorruptImageError,
    class_names,
    find_columns,
    load_rows,
    stored_image,
    with_stored_images,
)

MAX_PIECES = 256
ROWS_AT_ONCE = 16


@dataclass
class ImageStream:
    """One split of a stream.

    Args:
        rows: whose image column is not decoded.
        image_column: its name.
        label_column: None: all images count as unlabelled.
        num_classes: K.
        name: the split's, for messages.
    """

    rows: datasets.IterableDataset
    image_column: str
    label_column: str | None
    num_classes: int
    name: str

    @property
    def num_pieces(self) -> int:
        """In how many pieces the stream is read; a function of its files alone."""
        return min(self.rows.num_shards, MAX_PIECES)

    def read(self, piece: int, first: int = 0) -> Iterator[tuple[int, int, Callable[[], Image.Image]]]:
        """From row `first` of a piece on: the row's number, its label, and a function that decodes its image.

        Raises:
            ConfigError: a label that is not an integer in [-1, K). The function raises CorruptImageError.
        """
        rows = self.rows.shard(self.num_pieces, piece).skip(first)
        number = first
        for batch in rows.iter(ROWS_AT_ONCE):  # iterating over `rows` itself would share them among a loader's workers
            stored = batch[self.image_column]
            labels = [None] * len(stored) if self.label_column is None else batch[self.label_column]
            for image, label in zip(stored, labels, strict=True):
                name = f"{self.name} row {number} of piece {piece}"
                # Another number than those of any other row, whose views are drawn by it.
                yield piece << 32 | number, self._label_id(label, name), partial(_fetched_image, image, name)
                number += 1

    def _label_id(self, label: Any, name: str) -> int:
        if label is None or label != label:  # NaN
            return -1
        if isinstance(label, (int, float)) and label == int(label) and -1 <= label < self.num_classes:
            return int(label)
        raise ConfigError(
            f"label out of range: {name} has {label!r}, allowed are 0 to {self.num_classes - 1} and -1 for unlabelled"
        )


def load_streams(config: DataConfig, num_classes: int | None) -> tuple[ImageStream, ImageStream, list[str]]:
    """Opens the streams of the train and of the validation split, and names the classes.

    Args:
        config: where the images are.
        num_classes: K of the model; None ignores labels.

    Raises:
        ConfigError: no such dataset, split or column, no split to validate on, labels whose ids are not known before
            all are read, or a class count that is not K.
    """
    if config.dataset == "digits":
        raise ConfigError("data.streaming=true: the digits are in this machine's memory; set it to false")
    if config.validation_split is None:
        raise ConfigError("data.streaming=true needs data.validation_split: no images can be held out of a stream")
    train, validation = load_rows(config)
    if train.features is None:
        raise ConfigError(f"data.dataset={config.dataset!r} does not say what its columns hold, it cannot be streamed")
    image_column, label_column = find_columns(train, config, num_classes)
    names = []
    if label_column is not None:
        if getattr(train.features[label_column], "dtype", None) == "string":
            raise ConfigError(
                f"data.label_column={label_column!r} holds strings, whose ids are not known before a stream is read; "
                "choose a column of integers, or set data.streaming=false"
            )
        names = class_names(train, label_column, num_classes)
    splits = []
    for split, rows in (("train", train), ("validation", validation)):
        columns = [column for column in (image_column, label_column) if column is not None]
        if missing := [column for column in columns if column not in rows.column_names]:
            raise ConfigError(f"data.validation_split: no column {missing[0]!r} in it, only {rows.column_names}")
        rows = with_stored_images(rows.select_columns(columns), image_column)
        splits.append(ImageStream(rows, image_column, label_column, len(names), split))
    return splits[0], splits[1], names


def first_rows_digest(*streams: ImageStream) -> str:
    """Of each stream's first label and image: another dataset in the same place is noticed.

    Raises ConfigError: a stream without an image.
    """
    digest = hashlib.sha256()
    for stream in streams:
        pieces = (stream.read(piece) for piece in range(stream.num_pieces))
        first = next(itertools.chain.from_iterable(pieces), None)  # a file of a stream may be empty
        if first is None:
            raise ConfigError(f"data.dataset: the {stream.name} split holds no image")
        _, label, image = first
        digest.update(str(label).encode())
        try:
            digest.update(image().tobytes())
        except CorruptImageError:
            digest.update(b"corrupt")
    return digest.hexdigest()[:16]


def _fetched_image(stored: dict[str, Any] | None, name: str) -> Image.Image:
    """`stored_image`, of an address too."""
    if stored is not None and stored["bytes"] is None and "://" in (stored["path"] or ""):
        with fsspec.open(stored["path"], "rb") as file:
            stored = {"bytes": file.read(), "path": stored["path"]}
    return stored_image(stored, name)
