"""Arguments that several verbs take, and what they mean."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latent_egc.pipelines import EGCPipeline


def positive_integer(text: str) -> int:
    """An argument's type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A run's configuration file and overrides of it."""
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="such as training.max_steps=500")


def add_pipeline_argument(parser: argparse.ArgumentParser) -> None:
    """The pipeline that `load_pipeline` loads."""
    parser.add_argument("pipeline", help="a run's folder, a pipeline's folder, or a Hub id")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """The device that `device_name` completes."""
    parser.add_argument("--device", default=None, help="such as cuda; default: an accelerator if there is one")


def device_name(name: str | None) -> str:
    """The device asked for, or an accelerator if there is one."""
    from accelerate import PartialState

    return name or PartialState().device.type


def load_pipeline(name: str, device: str | None = None) -> "EGCPipeline":
    """The pipeline that a name means, on a device. Raises FileNotFoundError where there is none."""
    from latent_egc.pipelines import EGCPipeline
    from latent_egc.training.checkpoints import resolve_pipeline

    return EGCPipeline.from_pretrained(resolve_pipeline(name)).to(device_name(device))
