"""Arguments that several verbs take, and what they mean."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

    from latent_egc.pipelines import EGCPipeline

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def positive_integer(text: str) -> int:
    """An argument's type: an integer of at least 1, and not beyond what PyTorch counts with."""
    return _integer(text, 1, 2**31 - 1)


def seed(text: str) -> int:
    """An argument's type: an integer in [0, 2^32), as `training.seed`."""
    return _integer(text, 0, 2**32 - 1)


def _integer(text: str, minimum: int, maximum: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if not minimum <= number <= maximum:
        raise argparse.ArgumentTypeError(f"must be an integer in [{minimum}, {maximum}], got {text[:40]}")
    return number


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A run's configuration file and overrides of it."""
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="such as training.max_steps=500")


def add_pipeline_argument(parser: argparse.ArgumentParser) -> None:
    """The pipeline that `load_pipeline` loads."""
    parser.add_argument("pipeline", help="a run's folder, a pipeline's folder, or a Hub id")


def add_images_argument(parser: argparse.ArgumentParser) -> None:
    """The images that `image_files` finds."""
    parser.add_argument("images", nargs="+", type=Path, help="image files, or folders that are searched for them")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """The device that `device_name` completes."""
    parser.add_argument("--device", default=None, help="such as cuda; default: an accelerator if there is one")


def device_name(name: str | None) -> str:
    """The device asked for, or an accelerator if there is one. Raises ConfigError for one that cannot be used."""
    import torch
    from accelerate import PartialState

    from latent_egc.config import ConfigError

    if name is None:
        return PartialState().device.type
    try:
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # each device, compiled in or not, has its own
        raise ConfigError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def launched_processes(device: str | None) -> tuple["PartialState", str]:
    """The processes that share a verb's work, and the device asked for, or this process's own of that type.

    Raises ConfigError for a device that cannot be used, and where processes would each do everything.
    """
    from latent_egc.data.encoding import start_processes

    processes = start_processes()
    own = device in (None, processes.device.type)
    return processes, str(processes.device) if own else device_name(device)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are meant, those of folders in order. Raises FileNotFoundError where there is none."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir())
        regular = [file for file in found if file.is_file()]
        for special in sorted({*found}.difference(regular)):
            print(f"skipped, it is not a regular file: {special}", file=sys.stderr)
        if not regular:
            raise FileNotFoundError(f"no image in {path}")
        files += regular
    return files


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Within it, diffusers draws no bars of the components that it loads; those of downloads stay."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_pipeline(name: str, device: str | None = None) -> "EGCPipeline":
    """The pipeline that a name means, on a device.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it cannot be loaded, or the device cannot be used.
    """
    from latent_egc.config import ConfigError
    from latent_egc.pipelines import EGCPipeline
    from latent_egc.training.checkpoints import resolve_pipeline

    device, source = device_name(device), resolve_pipeline(name)
    try:
        with without_loading_bars():
            pipeline = EGCPipeline.from_pretrained(source)
    except Exception as error:  # diffusers has no common error for a folder with a damaged file
        what = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"the pipeline {source} cannot be loaded: {what}") from error
    return pipeline.to(device)
