"""Files and folders that appear under their name whole or not at all: first a temporary one, then a rename.

Beside NAME a killed process may leave NAME.tmp, half written or half deleted, and NAME.old, a folder that was being
replaced; `finish_replacing` ends what it began.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from latent_egc.config import ConfigError


class CheckpointError(RuntimeError):
    """A file or folder of a run that cannot be written or read; the message says which, and what is left."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name `path`; the writers (torch, safetensors, json) have no common one for a full disk."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path} could not be written, it is as it was before: {error}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file beside `path` and renames it.

    Raises:
        CheckpointError: writing failed; `path` is as it was and nothing half-written stays.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with _naming(path):
            write(unfinished)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with a text."""
    replace_file(path, lambda unfinished: unfinished.write_text(text))


def remove(path: Path) -> None:
    """Deletes a file or folder; a folder is first renamed, so that half deleted it is not taken for a whole one."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix not in (".tmp", ".old"):
            unfinished = path.with_name(path.name + ".tmp")
            remove(unfinished)
            path = path.rename(unfinished)
        shutil.rmtree(path, ignore_errors=True)  # what cannot be deleted now, is the next time
    else:
        path.unlink(missing_ok=True)


def finish_replacing(path: Path) -> None:
    """Deletes what a killed process left beside `path`; a folder whose replacement did not come is put back."""
    unfinished, replaced = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    if replaced.is_dir() and not path.exists():
        replaced.rename(path)
    for leftover in (unfinished, replaced):
        remove(leftover)


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
    finish_replacing(folder)
    try:
        with _naming(folder):
            unfinished.mkdir(parents=True)
            write(unfinished)
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
    finally:
        finish_replacing(folder)


def try_lock(path: Path) -> IO[str] | None:
    """Locks a file, which is made where there is none.

    Returns:
        The lock, until it is closed or this process is no more; None: another process has it. Windows, and file systems
        without locks, give one to everybody.
    """
    file = path.open("a")
    try:
        # A record lock is the process's own: loaders' workers, which may outlive it, do not keep it.
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except (ImportError, OSError):
        pass
    return file
