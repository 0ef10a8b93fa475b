"""Measure what the energy costs beside noise prediction and the published steps, on random data.

example: latent-egc benchmark configs/digits.yaml training.train_batch_size=16 --repeats 10
"""

import argparse
import json
from pathlib import Path

from latent_egc.commands.arguments import add_config_arguments, add_device_argument, device_name, positive_integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, how often, and where the numbers go."""
    add_config_arguments(parser)
    parser.add_argument("--repeats", type=positive_integer, default=20, help="timings of each step (default 20)")
    # Not checked here, for the names would load torch.
    parser.add_argument("--groups", nargs="+", metavar="GROUP", help='rows to measure, such as "class embedding"')
    add_device_argument(parser)
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="file of all numbers (%(default)s)")


def run(options: argparse.Namespace) -> None:
    """Prints the table and writes the numbers."""
    from latent_egc.config import load_config
    from latent_egc.measuring.benchmark import benchmark

    config = load_config(options.config, options.overrides)
    options.output.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes
    report = benchmark(config, options.repeats, device_name(options.device), options.groups)
    print(report)
    options.output.write_text(json.dumps(report.to_dict(), indent=1))
