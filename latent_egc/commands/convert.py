"""Write a checkpoint of another implementation as a pipeline of this one.

example: latent-egc convert --from-egc 256x256_EGC.pt imagenet256
"""

import argparse
from pathlib import Path

from latent_egc.commands.arguments import positive_integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to convert, and what it does not say itself."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-egc", type=Path, metavar="FILE", help="the published EGC's U-Net, .pt or .safetensors")
    source.add_argument("--from-dit", metavar="SOURCE", help="a diffusers DiT to train on: a Hub id or a folder")
    parser.add_argument("folder", type=Path, help="the folder to write; must not exist or be empty")
    autoencoder = "whose latents it was trained on, Hub id or folder (default stabilityai/sd-vae-ft-mse; DiT: its own)"
    parser.add_argument("--autoencoder", default=None, help=autoencoder)
    only_egc = parser.add_argument_group("what the file of --from-egc does not say")
    only_egc.add_argument("--sample-size", type=positive_integer, help="height and width of the latents (default 32)")
    only_egc.add_argument("--num-attention-heads", type=positive_integer, help="of every block (default 4)")
    only_egc.add_argument("--class-names", type=Path, help="a text file, one class a line; default: ids")


def run(options: argparse.Namespace) -> None:
    """Writes the pipeline."""
    from latent_egc.exchange.from_dit import from_dit
    from latent_egc.exchange.from_egc import from_egc

    names = ("autoencoder", "sample_size", "num_attention_heads", "class_names")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.from_dit is not None:
        others = [f"--{name.replace('_', '-')}" for name in given if name != "autoencoder"]
        if others:
            raise ValueError(f"--from-dit reads from its source what {', '.join(others)} would say; leave it out")
        from_dit(options.from_dit, options.folder, **given)
    else:
        if "class_names" in given:
            names = given.pop("class_names")
            try:
                given["id2label"] = dict(enumerate(names.read_text().splitlines()))
            except UnicodeDecodeError as error:
                raise ValueError(f"--class-names {names} is no text file: {error}") from error
        from_egc(options.from_egc, options.folder, **given)
    print(f"pipeline written: {options.folder}")
