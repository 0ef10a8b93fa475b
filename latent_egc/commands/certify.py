"""Certify image files: a class, and the radius within which no change of the image makes it another.

example: latent-egc certify runs/quickstart photo.png folder/ --sigma 0.25 --output certificates.png

By the votes over noised copies of an image; where they are too close it has no class and the radius 0. An image that
cannot be read is a row with its error; then the exit status is 1.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_egc.commands.arguments import (
    add_device_argument,
    add_images_argument,
    add_pipeline_argument,
    image_files,
    load_pipeline,
    positive_integer,
    seed,
)

if TYPE_CHECKING:
    import numpy as np

SHOWN_IMAGES, SHOWN_CLASSES = 20, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to certify, by which noise, and how to say it."""
    add_pipeline_argument(parser)
    add_images_argument(parser)
    parser.add_argument("--sigma", type=float, required=True, help="of the noise; pixels are in [0, 1]")
    spaces = {"choices": ("pixels", "latents"), "default": "pixels"}
    parser.add_argument("--noise", **spaces, help="what it is added to; a radius of latents is not one of pixels")
    parser.add_argument("--n0", type=positive_integer, default=100, help="votes that choose the class (default 100)")
    parser.add_argument("--n", type=positive_integer, default=1000, help="votes that are counted (default 1000)")
    parser.add_argument("--alpha", type=float, default=0.001, help="probability of a wrong one (default 0.001)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--output", type=Path, default=None, metavar="PNG", help=f"draw the first {SHOWN_IMAGES} images"
    )
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="copies at once (default 64)")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default 0)")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Prints each image's class, radius and votes, or why it cannot be read; the latter gives exit status 1."""
    from latent_egc.data.sources import CorruptImageError, read_image
    from latent_egc.data.stream import noise_generator
    from latent_egc.pipelines.images import central_crop
    from latent_egc.training.figures import with_noised_copy

    files = image_files(options.images)
    pipeline = load_pipeline(options.pipeline, options.device)
    asked = {name: getattr(options, name) for name in ("sigma", "n0", "n", "alpha", "noise", "batch_size")}
    rows, pairs = [], []
    for number, file in enumerate(files):
        rows.append({"file": str(file)})
        try:
            image = central_crop(read_image(str(file), str(file)), pipeline.image_size)
        except CorruptImageError as error:
            rows[-1]["error"] = str(error)
            continue
        pipeline.set_progress_bar_config(desc=f"certify {file.name}", leave=False)
        output = pipeline.certify(image, generator=noise_generator(options.seed, number), **asked)
        votes = [[pipeline.id2label[i], count] for i, count in enumerate(output.votes[0].tolist()) if count]
        votes.sort(key=lambda vote: -vote[1])
        rows[-1] |= {"label": output.labels[0], "radius": float(output.radius), "space": output.space, "votes": votes}
        if options.output is not None and len(pairs) < SHOWN_IMAGES:
            generator = noise_generator(options.seed, number)
            pairs.append(with_noised_copy(pipeline, image, options.sigma, options.noise, generator))
    print(json.dumps(rows, indent=1)) if options.json else _print_table(rows)
    if pairs:
        _draw(options, rows, pairs)
    return int(any("error" in row for row in rows))


def _draw(options: argparse.Namespace, rows: Sequence[dict[str, Any]], pairs: Sequence["np.ndarray"]) -> None:
    from latent_egc.atomic import replace_file
    from latent_egc.methods.certification import largest_radius
    from latent_egc.training.figures import save_certificates

    shown = [row for row in rows if "error" not in row][: len(pairs)]
    names = [f"{Path(row['file']).name}: {row['label'] or 'abstains'}" for row in shown]
    largest = largest_radius(options.n, options.sigma, options.alpha)
    radius_name = "l2 radius, " + ("pixels in [0, 1]" if options.noise == "pixels" else "scaled latents")
    radii = [row["radius"] for row in shown]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(options.output, lambda file: save_certificates(pairs, names, radii, largest, file, radius_name))


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    width = max(len(row["file"]) for row in rows)
    print(f"{'file':<{width}}  {'radius':>7}  {'class':<12}  votes")
    for row in rows:
        if "error" in row:
            print(f"{row['file']:<{width}}  {row['error']}")
            continue
        votes = "  ".join(f"{name} {count}" for name, count in row["votes"][:SHOWN_CLASSES])
        print(f"{row['file']:<{width}}  {row['radius']:>7.3f}  {row['label'] or '(abstains)':<12}  {votes}")
