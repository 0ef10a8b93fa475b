"""Classify image files and folders of them.

example: latent-egc classify runs/quickstart photo.png folder/ --top-k 3 --json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from latent_egc.commands.arguments import add_device_argument, add_pipeline_argument, load_pipeline, positive_integer

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """By what to classify, what, and how to say it."""
    add_pipeline_argument(parser)
    parser.add_argument("images", nargs="+", type=Path, help="image files, or folders that are searched for them")
    parser.add_argument("--top-k", type=int, default=1, help="classes named for each image (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="images at once (default 64)")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Prints each image's energy and most probable classes."""
    from tqdm.auto import tqdm

    from latent_egc.data.sources import read_image

    files = _image_files(options.images)
    pipeline = load_pipeline(options.pipeline, options.device)
    rows = []
    batches = range(0, len(files), options.batch_size)
    for first in tqdm(batches, desc="classify", disable=len(batches) < 2):
        batch = files[first : first + options.batch_size]
        output = pipeline.classify([read_image(file, str(file)) for file in batch], top_k=options.top_k)
        top = output.probabilities.topk(options.top_k, dim=-1).values.tolist()
        for file, labels, probabilities, energy in zip(batch, output.labels, top, output.energy.tolist(), strict=True):
            rows.append({"file": str(file), "labels": labels, "probabilities": probabilities, "energy": energy})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    width = max(len(row["file"]) for row in rows)
    print(f"{'file':<{width}}  {'energy':>10}  classes")
    for row in rows:
        classes = "  ".join(f"{n} {p:.3f}" for n, p in zip(row["labels"], row["probabilities"], strict=True))
        print(f"{row['file']:<{width}}  {row['energy']:>10.3f}  {classes}")


def _image_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise FileNotFoundError(f"no image in the folder {path}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return files
