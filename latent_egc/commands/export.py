"""Write one self-contained folder for the Hugging Face Hub: weights, code, model card.

example: latent-egc export runs/quickstart exported --push-to-hub USER/NAME
         latent-egc export runs/quickstart classifier --onnx
         latent-egc export runs/imagenette64 exported --autoencoder madebyollin/taesd --dtype float16
"""

import argparse
from pathlib import Path

from latent_egc.commands.arguments import load_pipeline, without_loading_bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, and where to."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("folder", type=Path, help="the folder to write; must not exist or be empty")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--push-to-hub", metavar="REPO", default=None, help="upload the folder to this repository")
    what.add_argument(
        "--onnx", action="store_true", help="only FOLDER/classifier.onnx: pixels to logits and energy (extra onnx)"
    )
    parser.add_argument(
        "--autoencoder", metavar="NAME", help="Hub id or folder that is named in place of the autoencoder's weights"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="in which the weights are stored"
    )
    parser.add_argument("--license", help="of the weights, for the model card, such as mit")
    parser.add_argument(
        "--training-data", metavar="TEXT", help="for the model card: what it was trained on, and on which terms"
    )


def run(options: argparse.Namespace) -> None:
    """Writes the folder and uploads it where that is asked for."""
    if options.onnx:
        from latent_egc.config import ConfigError
        from latent_egc.exchange.onnx import export_onnx

        if options.autoencoder or options.license or options.training_data or options.dtype != "float32":
            raise ConfigError(
                "--autoencoder, --dtype, --license and --training-data are for a folder of weights, not for --onnx"
            )
        print(f"exported to {export_onnx(load_pipeline(options.run, 'cpu'), options.folder)}")
        return
    import torch

    from latent_egc.exchange.export import export

    with without_loading_bars():
        export(
            options.run,
            options.folder,
            push_to_hub=options.push_to_hub,
            autoencoder=options.autoencoder,
            dtype=getattr(torch, options.dtype),
            license=options.license,
            training_data=options.training_data,
        )
    print(f"exported to {options.folder}" + (f" and {options.push_to_hub}" if options.push_to_hub else ""))
