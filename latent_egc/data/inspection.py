"""What a source of images holds, looked at before anything is configured: splits, classes, sizes, damage."""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from tqdm.auto import tqdm

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.image_folders import folder_splits
from latent_egc.data.sources import CorruptImageError, NoObviousColumnError, load_splits

MAX_LOOKED_AT = 1000  # images that are decoded: a good estimate of sizes, in a minute or two for large photographs
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Args:
        source: the keys of a data section that name the images and their splits.
        class_counts: images of each class, both splits together, in the order of their labels; empty without labels.
        num_train, num_validation: images of the splits.
        num_unlabelled: how many of them have no label.
        sizes: (images, 2), width and height of those that were looked at and can be read.
        num_unreadable: how many of those looked at cannot be read.
        why_unlabelled: what was looked for in vain, where no column is obviously the labels'.
    """

    source: dict[str, str]
    class_counts: dict[str, int]
    num_train: int
    num_validation: int
    num_unlabelled: int
    sizes: np.ndarray
    num_unreadable: int
    why_unlabelled: str | None = None

    @property
    def num_images(self) -> int:
        """Of both splits."""
        return self.num_train + self.num_validation

    @property
    def num_looked_at(self) -> int:
        """Images that were decoded, or should have been."""
        return len(self.sizes) + self.num_unreadable


def inspect_images(name: str, label_column: str | None = None) -> Inspection:
    """Looks at images: their labels all, at most `MAX_LOOKED_AT` of the images themselves, evenly spread.

    Args:
        name: a folder of images or parquet files, a parquet file or pattern, a Hub dataset's id, or "digits".
        label_column: of the labels; None: found by its type or name.

    Raises:
        ConfigError: nothing there, no image in it, none that can be read, or labels that cannot be used.
    """
    source = _find_source(name)
    splits, labelled = _find_splits(source)
    train = "train" if "train" in splits else splits[0]
    source |= {} if train == "train" else {"train_split": train}
    validation = next((split for split in VALIDATION_NAMES if split in splits and split != train), None)
    source |= {} if validation is None else {"validation_split": validation}
    source |= {} if label_column is None else {"label_column": label_column}
    config = DataConfig(**source)
    why_unlabelled = None
    try:
        found = load_splits(config, "any" if labelled or label_column else None)
    except NoObviousColumnError as error:
        why_unlabelled = str(error)
        found = load_splits(config, None)  # raises again where it is the images that are not found
    tables = (found.train, found.validation)
    labels = np.concatenate([table.labels for table in tables])
    counts = np.bincount(labels[labels >= 0], minlength=len(found.class_names)).tolist()

    every = [(table, index) for table in tables for index in range(len(table))]
    chosen = np.linspace(0, len(every) - 1, min(len(every), MAX_LOOKED_AT)).round().astype(int)
    sizes, unreadable = [], []
    for position in tqdm(chosen, desc="look at images", unit="image"):
        table, index = every[position]
        try:
            sizes.append(table.image(index).size)
        except CorruptImageError as error:
            unreadable.append(error)
    if not sizes:
        raise ConfigError(f"{name}: none of {len(unreadable)} images looked at can be read; the first: {unreadable[0]}")
    return Inspection(
        source=source,
        class_counts=dict(zip(found.class_names, counts, strict=True)),
        num_train=len(tables[0]),
        num_validation=len(tables[1]),
        num_unlabelled=int((labels < 0).sum()),
        sizes=np.array(sizes),
        num_unreadable=len(unreadable),
        why_unlabelled=why_unlabelled,
    )


def _find_source(name: str) -> dict[str, str]:
    """What kind of source a name means, as keys of a data section. Raises ConfigError."""
    path = Path(name)
    if path.is_dir():
        if _holds(path, lambda file: file.suffix.lower() in ImageFolder.EXTENSIONS):
            return {"dataset": "imagefolder", "data_dir": name}
        if _holds(path, lambda file: file.suffix == ".parquet"):
            return {"dataset": "parquet", "data_dir": name}
        raise ConfigError(f"{name} holds no image (.jpg, .png, ...) and no .parquet file, nor do the folders in it")
    if name.endswith(".parquet"):
        if not glob.glob(name, recursive=True):
            raise ConfigError(f"{name}: no such file")
        return {"dataset": "parquet", "data_files": name}
    if path.exists():
        raise ConfigError(f"{name} is neither a folder nor a .parquet file")
    return {"dataset": name}


def _holds(folder: Path, wanted: Callable[[Path], bool]) -> bool:
    walk = os.walk(folder, followlinks=True)
    return any(wanted(Path(place, file)) for place, _, files in walk for file in files if not file.startswith("."))


def _find_splits(source: dict[str, str]) -> tuple[list[str], bool]:
    """Names of the splits, and whether folders or columns may be classes. Raises ConfigError."""
    if source["dataset"] == "digits":
        return ["train"], True
    if source["dataset"] == "imagefolder":
        folder = Path(source["data_dir"])
        try:
            splits = folder_splits(folder, None)
        except ConfigError:
            # SPLIT/IMAGE, where its names leave no doubt.
            splits = folder_splits(folder, "validation")
            if splits is None or not {"train", "validation"} <= splits.keys():
                raise
            return list(splits), False
        if splits is not None:
            return list(splits), True
    arguments = {key: value for key, value in source.items() if key != "dataset"}
    try:
        return datasets.get_dataset_split_names(source["dataset"], **arguments), True
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = "as a dataset" if arguments else "no such file or folder here, and as a dataset of the Hub"
        what = " ".join(str(error).split())
        raise ConfigError(f"{source.get('data_dir', source['dataset'])}: {where} it cannot be read: {what}") from error
