"""Encode a dataset once, in several views, into the latent cache that a config names; several processes share it.

example: latent-egc encode configs/imagenette64.yaml
         accelerate launch -m latent_egc encode configs/imagenette64.yaml
"""

import argparse

from latent_egc.commands.arguments import (
    add_config_arguments,
    add_device_argument,
    launched_processes,
    positive_integer,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to encode, and how fast."""
    add_config_arguments(parser)
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="views encoded at once (default 64)")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the cache."""
    from latent_egc.data.encoding import encode
    from latent_egc.training.build import resolve_model
    from latent_egc.training.run_folder import load_run_config

    config = load_run_config(options.config, options.overrides)
    num_classes = resolve_model(config.model)["num_classes"]
    processes, device = launched_processes(options.device)
    folder = encode(config.data, config.autoencoder, num_classes, options.batch_size, device)
    processes.print(f"latent cache written: {folder}")
