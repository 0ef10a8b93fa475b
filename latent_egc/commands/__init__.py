"""The command line: one module a verb, whose docstring is its help, with `add_arguments(parser)` and `run(options)`.

Nothing here imports torch before a verb runs, so that help comes at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from latent_egc.commands import (
    benchmark,
    classify,
    convert,
    encode,
    evaluate,
    export,
    info,
    probe,
    report,
    sample,
    train,
)

VERBS = (encode, train, sample, classify, evaluate, probe, report, info, export, convert, benchmark)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; errors that a user can mend are printed without a traceback and give exit status 2."""
    parser = argparse.ArgumentParser(
        prog="latent-egc", description="Train, sample and classify with one energy network in an autoencoder's latents."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in VERBS:
        _add_arguments(verb, verbs.add_parser(_name(verb), help=_help(verb)))
    options = parser.parse_args(arguments)
    return _run({_name(verb): verb.run for verb in VERBS}[options.verb], options)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """What train.py does: the verb `train`, as a script that `accelerate launch` and `torchrun` can start."""
    parser = argparse.ArgumentParser()
    _add_arguments(train, parser)
    parser.epilog = parser.epilog.replace("latent-egc train", "accelerate launch train.py")
    return _run(train.run, parser.parse_intermixed_args(arguments))


def _name(verb: ModuleType) -> str:
    return verb.__name__.rpartition(".")[2]


def _help(verb: ModuleType) -> str:
    return verb.__doc__.partition("\n\n")[0]


def _add_arguments(verb: ModuleType, parser: argparse.ArgumentParser) -> None:
    parser.description, _, parser.epilog = verb.__doc__.strip().partition("\n\n")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.add_arguments(parser)


def _run(verb: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    from latent_egc.atomic import CheckpointError

    try:
        verb(options)
    except (CheckpointError, FloatingPointError, OSError, ValueError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
