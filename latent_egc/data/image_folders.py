"""Which folders of a tree of images are its splits: those of SPLIT/CLASS/IMAGE, in CLASS/IMAGE none.

`datasets` takes every folder or file with a name such as train or test_1 for a split, wherever it lies, and leaves out
all others without a word: of the classes "train" and "tram", the images of one are lost.
"""

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from latent_egc.config import ConfigError

# The names that `datasets` takes for splits.
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def folder_splits(folder: Path, validation_split: str | None) -> dict[str, list[str]] | None:
    """Split -> patterns of its files below `folder`, as `datasets.load_dataset` takes them.

    Args:
        folder: the tree; the folder that an image lies in is its class.
        validation_split: the one that the user names, if any: without classes, SPLIT/IMAGE then is a tree of splits.

    Returns:
        None, which leaves it to `datasets`, where a metadata file or an archive and not the tree describes the images.

    Raises:
        ConfigError: a tree that can be understood in two ways.
    """
    places = set()
    for names, file in _files(folder):
        if file in ImageFolder.METADATA_FILENAMES:
            return None
        if Path(file).suffix.lower() in ImageFolder.EXTENSIONS:
            places.add(names)
    if not places:
        return None
    split_above_class = any(any(map(_split_of, names[:-1])) for names in places)
    named_as_splits = [bool(names and _split_of(names[-1])) for names in places]
    if not split_above_class and not all(named_as_splits) and not (() in places and any(named_as_splits)):
        return {"train": ["**"]}
    first = {names[0]: _split_of(names[0]) for names in places if names}
    only_splits_on_top = () not in places and all(first.values())
    two_levels = all(len(names) >= 2 and not any(map(_split_of, names[1:-1])) for names in places)
    one_level = all(len(names) == 1 for names in places) and (validation_split is not None or len(first) == 1)
    if only_splits_on_top and (two_levels or one_level):
        splits: dict[str, list[str]] = {}
        for name, split in sorted(first.items()):
            splits.setdefault(split, []).append(f"{name}/**")
        return splits
    shown = ", ".join(sorted("/".join(names) or "." for names in places)[:8])
    raise ConfigError(
        f"data.data_dir={str(folder)!r}: are folders such as train and test splits or classes here? Images lie in "
        f"{shown}. A tree is either SPLIT/CLASS/IMAGE or CLASS/IMAGE, or SPLIT/IMAGE where data.validation_split names "
        "a split; rename or move folders, or name the files of each split in data.data_files"
    )


def _files(folder: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Folders below `folder` and name of every file that `datasets` sees; a FIFO is skipped with a warning."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for file in files:
            if file.startswith((".", "__")):
                continue
            if Path(place, file).is_file():
                yield Path(place).relative_to(folder).parts, file
            else:
                warnings.warn(f"skipped, it is not a regular file: {Path(place, file)}", stacklevel=2)


def _split_of(name: str) -> str | None:
    """The split that a folder's name, such as val or test-images, may mean."""
    words = re.split(r"[-._ 0-9]+", name)
    return next((split for split, keywords in KEYWORDS.items() if words[0] in keywords), None)
