"""Measure a pipeline on a dataset's validation split, suite by suite, into one report.

example: latent-egc evaluate runs/quickstart --suite classification,calibration --set num_images=200
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latent_egc.commands.arguments import add_pipeline_argument, load_pipeline

if TYPE_CHECKING:
    from latent_egc.config import DataConfig
    from latent_egc.measuring.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on which data, and where the report goes."""
    add_pipeline_argument(parser)
    add_study_arguments(parser, "evaluation", "classification,calibration", example="num_images=500")
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
        help="of the suites generation, guidance and solvers (SUITE.features): DINOv2 of transformers, inception, or "
        "TorchScript files, which are programs and can write files: only from those whom you trust",
    )


def run(options: argparse.Namespace) -> None:
    """Writes the report and prints its table."""
    from accelerate import Accelerator

    with extra_packages():
        from latent_egc.measuring.study import EvaluationSettings, evaluate

    judges_samples = ("generation", "guidance", "solvers") if options.features else ()
    features = [f"{suite}.features={json.dumps(options.features)}" for suite in judges_samples]
    settings = EvaluationSettings.parse([*features, *options.set])
    data, folder = data_and_folder(options, "evaluation")
    accelerator = Accelerator()
    pipeline = load_pipeline(options.pipeline, str(accelerator.device))
    suites, shown = options.suite.split(","), not options.no_data_images
    report = evaluate(pipeline, data, suites, folder, settings, options.pipeline, accelerator, shown)
    if accelerator.is_main_process:
        print_report(report)


@contextmanager
def extra_packages() -> Iterator[None]:
    """For the imports of what measures. Raises ConfigError: a package of the extra `eval` is not installed."""
    from latent_egc.config import ConfigError

    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"this needs one more package ({error}): pip install 'latent-egc[eval]'") from error


def add_study_arguments(parser: argparse.ArgumentParser, folder: str, suites: str, example: str) -> None:
    """What the verbs of both kinds of study take besides what they study.

    Args:
        parser: of the verb.
        folder: the report's in the run's.
        suites: the default ones.
        example: of a setting.
    """
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help="a YAML file with a data section, a training config for example; default: the run's own config.yaml",
    )
    spellings = ["--suite", "--analysis"] if folder == "probe" else ["--suite"]
    parser.add_argument(*spellings, default=suites, help="one or more, with commas (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=None, help=f"the report's folder (default: {folder}, in the run's folder)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY.SUB=VALUE",
        help=f"settings such as {example}; a suite's own are in latent_egc/measuring/suites/SUITE.py",
    )


def data_and_folder(options: argparse.Namespace, folder: str) -> tuple["DataConfig", Path]:
    """The images, and where the report goes. Raises ConfigError where neither --data nor a run says the images."""
    from latent_egc.config import ConfigError, load_data_config

    own_config = Path(options.pipeline) / "config.yaml"
    if options.data is None and not own_config.is_file():
        raise ConfigError(
            f"--data: {options.pipeline} is no run with a config.yaml; name a YAML file that has a data section"
        )
    data = load_data_config(options.data or own_config)
    return data, options.output or (own_config.parent if own_config.is_file() else Path()) / folder


def print_report(report: "Report") -> None:
    """The table of every metric, and where the page lies."""
    print(f"\n{report.table()}\n\nreport: {report.folder / 'report.html'}")
