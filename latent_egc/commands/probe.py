"""Measure what a frozen denoiser's features know of the classes, by block and timestep, into one report.

example: latent-egc probe runs/quickstart --suite heatmap,pooling --set timesteps=[30,90]

The suites are heatmap, pooling, heads, cka, fusion, few_shot and comparison. The report's folder also holds the feature
cache, which takes rows x channels of all blocks x p x p x 2 bytes a timestep.
"""

import argparse
from pathlib import Path

from latent_egc.commands.evaluate import add_study_arguments, data_and_folder, extra_packages, print_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on which data, and where the report goes."""
    parser.add_argument(
        "pipeline",
        help="a run's folder, or a folder or Hub id of a pipeline or network: energy network, UNet2DModel, DiT",
    )
    add_study_arguments(parser, "probe", "heatmap,pooling,heads", example="num_train_images=5000")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="write the best linear probe there, beside its network, as a classifier that transformers loads",
    )


def run(options: argparse.Namespace) -> None:
    """Writes the report and prints its table."""
    from accelerate import Accelerator

    with extra_packages():
        from latent_egc.measuring.denoisers import load_denoiser
        from latent_egc.measuring.study import ProbeSettings, probe

    settings = ProbeSettings.parse(options.set)
    data, folder = data_and_folder(options, "probe")
    accelerator = Accelerator()
    denoiser = load_denoiser(options.pipeline, accelerator.device)
    report = probe(denoiser, data, options.suite.split(","), folder, settings, accelerator, options.save)
    if accelerator.is_main_process:
        print_report(report)
        if options.save is not None:
            print(f"probe: {options.save}")
