"""Draw what a pipeline can do: one labelled picture for each of its capabilities.

example: latent-egc gallery runs/quickstart --output gallery --classes 3 8

guidance, solvers, composition, editing, certificates and selection; each is written when it is ready. Nothing in them
is selected: they show the first classes, the first noises and the first images.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from latent_egc.commands.arguments import (
    add_device_argument,
    add_pipeline_argument,
    image_files,
    load_pipeline,
    positive_integer,
    seed,
)

if TYPE_CHECKING:
    import torch

    from latent_egc.pipelines import EGCPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw, of which images, and where to."""
    add_pipeline_argument(parser)
    parser.add_argument("--output", type=Path, default=Path("gallery"), help="folder (default gallery)")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="default: all")
    text = "files or folders, to be edited and certified; default: of the run's validation split, else own samples"
    parser.add_argument("--images", nargs="+", type=Path, default=None, metavar="FILE", help=text)
    parser.add_argument("--classes", nargs=2, default=None, help="names or ids that are composed (default: the first)")
    parser.add_argument("--steps", type=positive_integer, default=20, help="solver steps (default 20)")
    parser.add_argument("--guidance-scale", type=float, default=None, help="default: the pipeline's own")
    text = "of edits into other classes and of counterfactuals, in [0, 1] (default 0.8)"
    parser.add_argument("--strength", type=float, default=0.8, help=text)
    text = "of the noise on pixels in [0, 1] and on scaled latents (default 0.12 0.5)"
    parser.add_argument("--sigmas", nargs=2, type=float, default=(0.12, 0.5), metavar=("PIXELS", "LATENTS"), help=text)
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="of the pictures (default png)")
    parser.add_argument("--seed", type=seed, default=0, help="of the starting noise (default 0)")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the pictures, one by one."""
    from tqdm.auto import tqdm

    from latent_egc.atomic import replace_file
    from latent_egc.config import ConfigError
    from latent_egc.measuring.gallery import PICTURES, Gallery
    from latent_egc.training.figures import save_panels

    names = dict.fromkeys(options.only or PICTURES)
    if unknown := [name for name in names if name not in PICTURES]:
        raise ConfigError(f"--only: there is no picture {unknown[0]!r}, only {', '.join(PICTURES)}")
    files = {name: options.output / f"{name}.{options.format}" for name in names}
    existing = [str(file) for file in files.values() if file.exists()]
    if existing:
        raise ConfigError(f"--output: {', '.join(existing)} exists already; choose another folder, or others by --only")
    pipeline = load_pipeline(options.pipeline, options.device)
    if len(pipeline.id2label) < 2:
        raise ConfigError(f"{options.pipeline} was trained without classes, two of which the pictures need")
    gallery = Gallery(
        pipeline,
        _images(pipeline, options),
        classes=_classes(pipeline, options),
        guidance_scale=options.guidance_scale,
        num_inference_steps=options.steps,
        strength=options.strength,
        sigmas=tuple(options.sigmas),
        seed=options.seed,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    for name, file in (bar := tqdm(files.items())):
        bar.set_description(name)
        panels = PICTURES[name](gallery)
        replace_file(file, lambda unfinished, panels=panels: save_panels(panels, unfinished, options.format))
    print(f"{', '.join(file.name for file in files.values())} written to {options.output}")


def _classes(pipeline: "EGCPipeline", options: argparse.Namespace) -> tuple[int, int]:
    if options.classes is None:
        return 0, 1
    names = pipeline.id2label.values()
    given = [int(label) if label.isdigit() and label not in names else label for label in options.classes]
    return tuple(pipeline.label_ids(given).tolist())


def _images(pipeline: "EGCPipeline", options: argparse.Namespace) -> "torch.Tensor":
    """(N, 3, H, W) in [0, 1]: the given ones, the first of the run's validation split, or else its own samples."""
    from latent_egc.config import ConfigError, load_data_config
    from latent_egc.data.sources import read_image
    from latent_egc.measuring.gallery import first_images, own_samples
    from latent_egc.pipelines.images import central_crop, crop_images

    size = pipeline.image_size
    if options.images is not None:
        files = image_files(options.images)
        return crop_images([central_crop(read_image(file, str(file)), size) for file in files], size)
    run_config = Path(options.pipeline) / "config.yaml"
    if run_config.is_file():
        try:
            return first_images(pipeline, load_data_config(run_config))
        except (ConfigError, OSError) as error:
            print(f"the images of {run_config} cannot be read, own samples are edited: {error}", file=sys.stderr)
    return own_samples(pipeline, options.steps)
