"""Images and labels: from scikit-learn's digits, or any source that `datasets` reads, to one table a split.

Images are decoded when asked for, labels stand in memory; -1 is an image without a label.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from PIL import Image

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.image_folders import folder_splits
from latent_egc.pipelines.images import load_rgb

IMAGE_COLUMN_NAMES = ("image", "img", "images", "pixel_values")
LABEL_COLUMN_NAMES = ("label", "labels", "class", "target", "fine_label", "cls")


Rows = datasets.Dataset | datasets.IterableDataset


class NoObviousColumnError(ConfigError):
    """No column of a table is an obvious choice; the message names the key that chooses one."""


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message names its file or row."""


def read_image(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    """An image file as RGB, its EXIF orientation applied. Raises CorruptImageError, which begins with `name`.

    Above Pillow's limit, `PIL.Image.MAX_IMAGE_PIXELS` doubled (179 million), an image counts as corrupt.
    """
    try:
        if not isinstance(source, io.BytesIO) and Path(source).exists() and not Path(source).is_file():
            raise OSError("it is not a regular file")  # reading a FIFO would wait for ever
        with Image.open(source) as image:
            image.load()
            image = load_rgb(image)
            image.info.pop("exif", None)  # it is applied; a crop of the image would read it, perhaps damaged, again
            return image
    # Bytes of strangers: each of Pillow's plugins, and the libraries below them, have their own errors for broken ones.
    except Exception as error:
        raise CorruptImageError(f"corrupt image: {name}: {error or type(error).__name__}") from error


def stored_image(stored: dict[str, Any] | None, name: str) -> Image.Image:
    """`read_image` of what `datasets` stores of an image, its bytes or a path. Raises CorruptImageError."""
    if stored is None:
        raise CorruptImageError(f"corrupt image: {name}: it is missing")
    if stored["path"]:
        name += f" ({stored['path']})"
    return read_image(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]), name)


@dataclass
class ImageTable:
    """One split: images decoded when asked for, labels in memory.

    Args:
        rows: a `datasets` split whose image column is not decoded.
        image_column: its name.
        labels: (rows,) int64 in [-1, K); -1 = unlabelled.
        name: the split's, for messages.
    """

    rows: datasets.Dataset
    image_column: str
    labels: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """Row `index` as RGB, its EXIF orientation applied. Raises CorruptImageError."""
        return stored_image(self.rows[int(index)][self.image_column], f"{self.name} row {index}")

    def is_readable(self, index: int) -> bool:
        """Whether the image of row `index` can be decoded."""
        try:
            self.image(index)
        except CorruptImageError:
            return False
        return True


@dataclass
class Splits:
    """What a run trains and validates on."""

    train: ImageTable
    validation: ImageTable
    class_names: list[str]  # empty for an unlabelled model


def load_splits(config: DataConfig, num_classes: int | Literal["any"] | None) -> Splits:
    """Loads the dataset, finds its columns, splits it and checks its labels.

    Args:
        config: where the images are.
        num_classes: K of the model; "any": as many as the labels have; None ignores labels.

    Raises:
        ConfigError: no such dataset, split or column, no image, labels out of [-1, K), a class count that is not K, or
            a stream; NoObviousColumnError where several columns, or none, may be meant.
    """
    if config.streaming:
        raise ConfigError(
            "data.streaming=true: a stream can only be read in order, by `latent-egc encode` into data.latent_cache; "
            "training without that cache, evaluating and probing need data.streaming=false, which keeps a copy"
        )
    train, validation = load_rows(config)
    image_column, label_column = find_columns(train, config, num_classes)
    names = []
    if label_column is not None:
        names = class_names(train, label_column, num_classes)
        _label_ids(train, label_column, names, "train")  # a wrong label is reported by its row before the split
    if validation is None:
        train, validation = _hold_out(train, label_column, config.validation_fraction)
    tables = []
    for split_name, rows in (("train", train), ("validation", validation)):
        if image_column not in rows.column_names:
            raise ConfigError(f"data.validation_split: no column {image_column!r} in it, only {rows.column_names}")
        if len(rows) == 0:
            raise ConfigError(f"data.dataset: the {split_name} split of {config.dataset!r} holds no image")
        if label_column is None:
            labels = np.full(len(rows), -1, dtype=np.int64)
        else:
            labels = _label_ids(rows, label_column, names, split_name)
        rows = with_stored_images(rows.select_columns([image_column]), image_column)
        tables.append(ImageTable(rows, image_column, labels, split_name))
    return Splits(tables[0], tables[1], names)


def with_stored_images(rows: Rows, image_column: str) -> Rows:
    """Rows whose images stay as they are stored, not decoded. Raises ConfigError where the column holds none."""
    try:
        return rows.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, NotImplementedError, ValueError) as error:  # what datasets raises for text, numbers, lists
        raise ConfigError(f"data.image_column: column {image_column!r} does not hold images: {error}") from error


def digits_rows() -> datasets.Dataset:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 px, as a `datasets` table like any other."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray(np.round(values * 255 / 16).astype(np.uint8)) for values in digits.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def load_rows(config: DataConfig) -> tuple[Rows, Rows | None]:
    """The train and, where the configuration names one, the validation split. Raises ConfigError."""
    if config.dataset == "digits":
        if config.validation_split is not None:
            raise ConfigError("data.validation_split: the digits have one split; use data.validation_fraction")
        return digits_rows(), None
    builders = ("imagefolder", "parquet", "arrow", "webdataset")
    if config.dataset in builders and config.data_dir is None and config.data_files is None:
        raise ConfigError(f"data.dataset={config.dataset!r} needs data.data_dir or data.data_files")
    files, splits = config.data_files, []
    if files is None and config.dataset == "imagefolder":
        files = folder_splits(Path(config.data_dir), config.validation_split)
    for key, split in (("train_split", config.train_split), ("validation_split", config.validation_split)):
        if split is None:
            splits.append(None)
            continue
        try:
            options = {"data_dir": config.data_dir, "data_files": files, "streaming": config.streaming}
            rows = datasets.load_dataset(config.dataset, config.subset, split=split, **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(
                f"data.dataset={config.dataset!r} with data.{key}={split!r} cannot be loaded: {error}"
            ) from error
        splits.append(rows)
    return splits[0], splits[1]


def find_columns(rows: Rows, config: DataConfig, num_classes: int | Literal["any"] | None) -> tuple[str, str | None]:
    """The columns of images and of labels, None for a model without classes. Raises ConfigError."""
    image_column = _find_column(rows, "image_column", config.image_column, IMAGE_COLUMN_NAMES, datasets.Image)
    if num_classes is None:
        return image_column, None
    return image_column, _find_column(
        rows, "label_column", config.label_column, LABEL_COLUMN_NAMES, datasets.ClassLabel
    )


def _find_column(rows: Rows, key: str, wanted: str | None, usual: tuple[str, ...], kind: type) -> str:
    """The configured column, else the only one of the right type, else one with a usual name."""
    if wanted is not None:
        if wanted not in rows.column_names:
            raise ConfigError(f"data.{key}={wanted!r} is not a column; there are {rows.column_names}")
        return wanted
    typed = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(typed) == 1:
        return typed[0]
    named = [name for name in usual if name in (typed or rows.column_names)]
    if not named:
        raise NoObviousColumnError(f"data.{key}: set it, none of {rows.column_names} is an obvious choice")
    return named[0]


def class_names(rows: Rows, column: str, num_classes: int | Literal["any"]) -> list[str]:
    """The names of the ids of a column of labels. Raises ConfigError: there are not `num_classes`."""
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif getattr(feature, "dtype", None) == "string":
        names = sorted(set(rows[column]) - {None})
    elif num_classes == "any":
        # Wrong labels are left to the check that names their row.
        known = [v for v in rows[column] if isinstance(v, (int, float)) and v == v]
        names = [str(i) for i in range(int(max(known, default=-1)) + 1)]
    else:
        names = [str(i) for i in range(num_classes)]
    if num_classes not in ("any", len(names)):
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ConfigError(
            f"model.num_classes={num_classes}, but the label column {column!r} has {len(names)} classes: {shown}"
        )
    return names


def _label_ids(rows: datasets.Dataset, column: str, names: list[str], split_name: str) -> np.ndarray:
    if column not in rows.column_names:
        raise ConfigError(f"data.label_column: no column {column!r} in the {split_name} split")
    feature, values = rows.features[column], rows[column]
    if getattr(feature, "dtype", None) == "string":
        name_to_id = {name: i for i, name in enumerate(names)}
        unknown = sorted({value for value in values if value is not None and value not in name_to_id})
        if unknown:
            raise ConfigError(f"data.label_column: {split_name} has labels that train has not: {unknown[:5]}")
        values = [-1 if value is None else name_to_id[value] for value in values]
    # A table with missing integer labels often stores them as floats with NaN.
    numbers = np.array([-1 if value is None or value != value else value for value in values])
    labels = numbers.astype(np.int64) if numbers.ndim == 1 and numbers.dtype.kind in "iufb" else None
    if labels is None or not np.array_equal(labels, numbers):
        raise ConfigError(f"data.label_column: column {column!r} must hold strings or integers, got {feature}")
    wrong = np.flatnonzero((labels < -1) | (labels >= len(names)))
    if len(wrong):
        raise ConfigError(
            f"label out of range: {split_name} row {wrong[0]} has {labels[wrong[0]]}, allowed are 0 to "
            f"{len(names) - 1} and -1 for unlabelled ({len(wrong)} such rows)"
        )
    return labels


def _hold_out(
    rows: datasets.Dataset, label_column: str | None, fraction: float
) -> tuple[datasets.Dataset, datasets.Dataset]:
    if fraction == 0:
        raise ConfigError("data.validation_fraction must be above 0 where data.validation_split is null")
    if len(rows) < 2:
        raise ConfigError(f"data.dataset: {len(rows)} images are too few to hold some out for validation")
    # The split's seed is fixed: runs with other seeds must be judged by the same images.
    stratify = label_column if isinstance(rows.features.get(label_column), datasets.ClassLabel) else None
    try:
        halves = rows.train_test_split(test_size=fraction, seed=0, stratify_by_column=stratify)
    except ValueError as error:  # too few images of some class
        warnings.warn(f"the validation split is not stratified by label: {error}", stacklevel=2)
        halves = rows.train_test_split(test_size=fraction, seed=0)
    return halves["train"], halves["test"]
