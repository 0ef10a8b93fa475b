"""Encode a dataset once, in several views, into the latent cache that a config names.

example: latent-egc encode configs/imagenette64.yaml
"""

import argparse

from latent_egc.commands.arguments import add_config_arguments, add_device_argument, device_name, positive_integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to encode, and how fast."""
    add_config_arguments(parser)
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="images encoded at once (default 64)")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the cache."""
    from latent_egc.config import load_config
    from latent_egc.data.latent_cache import encode
    from latent_egc.training.build import resolve_model

    config = load_config(options.config, options.overrides)
    num_classes = resolve_model(config.model)["num_classes"]
    folder = encode(config.data, config.autoencoder, num_classes, options.batch_size, device_name(options.device))
    print(f"latent cache written: {folder}")
