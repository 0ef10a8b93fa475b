"""Measure what a frozen denoiser's features know of the classes, by block and timestep, into one report.

example: latent-egc probe runs/quickstart --analysis heatmap,pooling --set timesteps=[30,90]
"""

import argparse
from pathlib import Path

from latent_egc.commands.evaluate import own_config_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on which data, and where the report goes."""
    parser.add_argument(
        "pipeline",
        help="a run's folder, or a folder or Hub id of a pipeline or network: energy network, UNet2DModel, DiT",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help="a YAML file with a data section, whose classes may be any; default: the run's own config.yaml",
    )
    parser.add_argument(
        "--analysis",
        default="heatmap,pooling,heads",
        help="one or more of heatmap, pooling, heads, cka, fusion, few_shot, comparison, with commas "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="folder of the report and of the feature cache, which takes rows x channels of all blocks x p x p x 2 "
        "bytes a timestep (default: probe, in the run's folder)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="settings such as num_train_images=5000; all are in latent_egc/probing/settings.py",
    )


def run(options: argparse.Namespace) -> None:
    """Writes the report and prints its table."""
    from accelerate import Accelerator

    from latent_egc.config import ConfigError, load_data_config

    try:
        from latent_egc.measuring.denoisers import load_denoiser
        from latent_egc.measuring.probe import probe
        from latent_egc.measuring.probe_settings import parse_settings
    except ModuleNotFoundError as error:
        raise ConfigError(f"probe needs more packages ({error}): pip install 'latent-egc[eval]'") from error

    settings = parse_settings(options.set)
    own_config = own_config_file(options)
    data = load_data_config(options.data or own_config)
    accelerator = Accelerator()
    report = probe(
        load_denoiser(options.pipeline, accelerator.device),
        data,
        options.analysis.split(","),
        options.output or (own_config.parent if own_config.is_file() else Path()) / "probe",
        settings,
        accelerator,
    )
    if report is not None:
        print(f"\n{report.table()}\n\nreport: {report.folder / 'report.html'}")
