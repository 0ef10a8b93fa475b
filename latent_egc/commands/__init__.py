"""The command line: one module a verb, whose docstring is its help, with `add_arguments(parser)` and `run(options)`,
which returns an exit status or None for 0.

Nothing here imports torch before a verb runs, so that help comes at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

VERBS = (
    "init",
    "encode",
    "train",
    "sample",
    "classify",
    "certify",
    "edit",
    "gallery",
    "demo",
    "evaluate",
    "probe",
    "report",
    "compare",
    "reference",
    "info",
    "export",
    "convert",
    "benchmark",
)
# They run as printed in an empty folder, one after the other, and download nothing.
FIRST_COMMANDS = """\
To begin, on scikit-learn's digits; a folder of photographs in their place does as well:

  latent-egc init digits --autoencoder digits_vae > digits.yaml
  latent-egc train digits.yaml data.latent_cache=null "model.block_out_channels=[32, 64]" training.learning_rate=2e-3
  latent-egc sample runs/digits32 --classes 3 8 --output samples
  latent-egc classify runs/digits32 samples
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; errors that a user can mend are printed without a traceback and give exit status 2."""
    parser = argparse.ArgumentParser(
        prog="latent-egc",
        description="Train, sample and classify with one energy network in an autoencoder's latents.",
        epilog=FIRST_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="name", metavar="VERB")
    for name in VERBS:
        _add_verb(name, verbs.add_parser(name, help=_module(name).__doc__.partition("\n\n")[0]))
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.exit(2, f"{parser.format_usage()}\n{FIRST_COMMANDS}")
    return _run(options)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """What train.py does: the verb `train`, as a script that `accelerate launch` and `torchrun` can start."""
    parser = argparse.ArgumentParser()
    _add_verb("train", parser)
    parser.epilog = parser.epilog.replace("latent-egc train", "accelerate launch train.py")
    return _run(parser.parse_intermixed_args(arguments))


def _module(name: str) -> ModuleType:
    return import_module(f"latent_egc.commands.{name}")


def _add_verb(name: str, parser: argparse.ArgumentParser) -> None:
    parser.description, _, parser.epilog = _module(name).__doc__.strip().partition("\n\n")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _module(name).add_arguments(parser)
    parser.set_defaults(verb=_module(name))


def _run(options: argparse.Namespace) -> int:
    from latent_egc.atomic import CheckpointError

    try:
        return options.verb.run(options) or 0
    except (CheckpointError, FloatingPointError, OSError, ValueError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
