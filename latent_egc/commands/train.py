"""Train an energy network in this process; `accelerate launch train.py` starts several.

example: latent-egc train configs/digits.yaml training.max_steps=500 output_dir=runs/a
"""

import argparse

from latent_egc.commands.arguments import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and sizes; write nothing")


def run(options: argparse.Namespace) -> None:
    """Trains, or says what would be trained."""
    from latent_egc.training.build import describe
    from latent_egc.training.loop import train
    from latent_egc.training.run_folder import load_run_config

    config = load_run_config(options.config, options.overrides)
    if options.dry_run:
        print(describe(config), end="")
    else:
        train(config)
