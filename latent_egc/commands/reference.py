"""Write a split's images as the .npz with which the evaluator of ADM, or `evaluate`, compares samples.

example: latent-egc reference configs/cifar10_small.yaml reference.npz --num-images 10000

The images are the centre crops of `data.image_size` that a network of that size is judged by, with their classes.
"""

import argparse
from pathlib import Path

from latent_egc.commands.arguments import add_device_argument, device_name, positive_integer, seed
from latent_egc.commands.evaluate import extra_packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and where to."""
    parser.add_argument("config", help="a YAML file with a data section, a training config for example")
    parser.add_argument("output", type=Path, metavar="FILE.npz", help="the file to write")
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="default %(default)s")
    parser.add_argument("--num-images", type=positive_integer, default=None, help="drawn by the seed (default all)")
    parser.add_argument("--seed", type=seed, default=0, help="default %(default)s")
    parser.add_argument(
        "--through-autoencoder",
        action="store_true",
        help="each image through the config's autoencoder and back, as samples are decoded",
    )
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the file, whole or not at all."""
    from latent_egc.config import ConfigError, load_config, load_data_config
    from latent_egc.data.autoencoders import latent_shape, load_autoencoder
    from latent_egc.data.sources import NoObviousColumnError, load_splits

    with extra_packages():
        from latent_egc.measuring.image_archives import write_split

    data, vae, through = load_data_config(options.config), None, ""
    if options.through_autoencoder:
        autoencoder = load_config(options.config).autoencoder
        if autoencoder.path is None:
            raise ConfigError(f"--through-autoencoder: {options.config} is in pixel space, autoencoder.path is null")
        vae, through = load_autoencoder(autoencoder, device_name(options.device)), f", through {autoencoder.path}"
        latent_shape(vae, data.image_size)  # raises where they do not fit each other
    try:
        splits = load_splits(data, "any")
    except NoObviousColumnError:
        splits = load_splits(data, None)  # images without labels are a reference too
    table = getattr(splits, options.split)
    count = write_split(table, data, options.output, options.num_images, options.seed, vae)
    print(f"{count:,} images written{through}: {options.output}")
