"""Files and folders that appear under their name whole or not at all: first a temporary one, then a rename."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from latent_egc.config import ConfigError


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which, and what is left."""


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file beside `path` and renames it; `path` is as it was where writing fails."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with a text."""
    replace_file(path, lambda unfinished: unfinished.write_text(text))


def check_unoccupied(folder: Path) -> None:
    """Raises ConfigError where `folder` is a file or already holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already holds something; choose another folder")


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary folder beside `folder` and renames it, replacing an older one only then.

    Raises:
        CheckpointError: writing failed, a full disk for example; `folder` is as it was and nothing half-written stays.
    """
    unfinished, replaced = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, Exception):
            # The writers (torch, safetensors, json) have no common error for a full disk.
            raise CheckpointError(f"{folder} could not be written, it is as it was before: {error}") from error
        raise
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(unfinished, folder)
    shutil.rmtree(replaced, ignore_errors=True)
