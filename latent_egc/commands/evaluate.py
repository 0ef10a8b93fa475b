"""Measure a pipeline on a dataset's validation split, suite by suite, into one report.

example: latent-egc evaluate runs/quickstart --suite classification,calibration --set num_images=200
"""

import argparse
import json
from pathlib import Path

from latent_egc.commands.arguments import add_pipeline_argument, load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on which data, and where the report goes."""
    add_pipeline_argument(parser)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help="a YAML file with a data section, a training config for example; default: the run's own config.yaml",
    )
    parser.add_argument(
        "--suite", default="classification,calibration", help="one or more, with commas (default %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="the report's folder (default: evaluation, in the run's folder)"
    )
    parser.add_argument(
        "--no-data-images",
        action="store_true",
        help="leave the pictures that show images of the dataset out of report.html, so that it can be published",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="EXTRACTOR",
        help="of the suite generation (generation.features): TorchScript files, DINOv2 of transformers, or inception",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="settings such as num_images=500; all are in latent_egc/evaluation/settings.py",
    )


def run(options: argparse.Namespace) -> None:
    """Writes the report and prints its table."""
    from accelerate import Accelerator

    from latent_egc.config import ConfigError, load_data_config

    try:
        from latent_egc.measuring import evaluate, parse_settings
    except ModuleNotFoundError as error:
        raise ConfigError(f"evaluate needs more packages ({error}): pip install 'latent-egc[eval]'") from error

    features = [f"generation.features={json.dumps(options.features)}"] if options.features else []
    settings = parse_settings([*features, *options.set])
    own_config = own_config_file(options)
    data = load_data_config(options.data or own_config)
    accelerator = Accelerator()
    report = evaluate(
        load_pipeline(options.pipeline, str(accelerator.device)),
        data,
        options.suite.split(","),
        options.output or (own_config.parent if own_config.is_file() else Path()) / "evaluation",
        settings,
        options.pipeline,
        accelerator,
        with_data_images=not options.no_data_images,
    )
    if accelerator.is_main_process:
        print(f"\n{report.table()}\n\nreport: {report.folder / 'report.html'}")


def own_config_file(options: argparse.Namespace) -> Path:
    """Where a run keeps its config.yaml. Raises ConfigError where neither it nor --data says what the images are."""
    from latent_egc.config import ConfigError

    own_config = Path(options.pipeline) / "config.yaml"
    if options.data is None and not own_config.is_file():
        raise ConfigError(
            f"--data: {options.pipeline} is no run with a config.yaml; name a YAML file that has a data section"
        )
    return own_config
