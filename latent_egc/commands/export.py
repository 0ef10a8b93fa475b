"""Write one self-contained folder for the Hugging Face Hub: weights, code, model card.

example: latent-egc export runs/quickstart exported --push-to-hub USER/NAME
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, and where to."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("folder", type=Path, help="the folder to write; must not exist or be empty")
    parser.add_argument("--push-to-hub", metavar="REPO", default=None, help="upload the folder to this repository")


def run(options: argparse.Namespace) -> None:
    """Writes the folder and uploads it where that is asked for."""
    from latent_egc.exchange.export import export

    export(options.run, options.folder, push_to_hub=options.push_to_hub)
    print(f"exported to {options.folder}" + (f" and {options.push_to_hub}" if options.push_to_hub else ""))
