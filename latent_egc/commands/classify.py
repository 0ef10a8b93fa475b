"""Classify image files and folders of them.

example: latent-egc classify runs/quickstart photo.png folder/ --top-k 3 --json

An image that cannot be read is a row with its error; then the exit status is 1.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from latent_egc.commands.arguments import (
    add_device_argument,
    add_images_argument,
    add_pipeline_argument,
    image_files,
    load_pipeline,
    positive_integer,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """By what to classify, what, and how to say it."""
    add_pipeline_argument(parser)
    add_images_argument(parser)
    parser.add_argument("--top-k", type=int, default=1, help="classes named for each image (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="images at once (default 64)")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Prints each image's energy and most probable classes, or why it cannot be read; the latter gives exit status 1.

    Memory holds one image at its own size, and a batch at the pipeline's.
    """
    from tqdm.auto import tqdm

    from latent_egc.data.sources import CorruptImageError, read_image
    from latent_egc.pipelines.images import central_crop

    files = image_files(options.images)
    pipeline = load_pipeline(options.pipeline, options.device)
    rows = [{"file": str(file)} for file in files]
    batches = range(0, len(files), options.batch_size)
    for first in tqdm(batches, desc="classify", disable=len(batches) < 2):
        images, read = [], []
        for row in rows[first : first + options.batch_size]:
            try:
                images.append(central_crop(read_image(row["file"], row["file"]), pipeline.image_size))
                read.append(row)
            except CorruptImageError as error:
                row["error"] = str(error)
        if not images:
            continue
        output = pipeline.classify(images, top_k=options.top_k)
        top = output.probabilities.topk(options.top_k, dim=-1).values.tolist()
        for row, labels, probabilities, energy in zip(read, output.labels, top, output.energy.tolist(), strict=True):
            row |= {"labels": labels, "probabilities": probabilities, "energy": energy}
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
    return int(any("error" in row for row in rows))


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    width = max(len(row["file"]) for row in rows)
    print(f"{'file':<{width}}  {'energy':>10}  classes")
    for row in rows:
        if "error" in row:
            print(f"{row['file']:<{width}}  {row['error']}")
            continue
        classes = "  ".join(f"{n} {p:.3f}" for n, p in zip(row["labels"], row["probabilities"], strict=True))
        print(f"{row['file']:<{width}}  {row['energy']:>10.3f}  {classes}")
