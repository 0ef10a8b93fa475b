"""Sample images: a labelled grid, and every image as a file of its own.

example: latent-egc sample runs/quickstart --classes 3 8 --num-images-per-label 4 --output samples
"""

import argparse
from pathlib import Path

from latent_egc.commands.arguments import (
    add_device_argument,
    add_pipeline_argument,
    load_pipeline,
    positive_integer,
    seed,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to sample, how, and where to."""
    add_pipeline_argument(parser)
    parser.add_argument("--output", type=Path, default=Path("samples"), help="folder for the files (default samples)")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--classes", nargs="+", default=None, help="names or ids; default: all, at most 10")
    labels.add_argument("--unlabelled", action="store_true", help="sample without labels, unguided")
    names = ("--num-images-per-label", "--images-per-class")  # the second is the former name
    parser.add_argument(*names, type=positive_integer, default=8, metavar="NUMBER", help="images a class (default 8)")
    parser.add_argument("--steps", type=positive_integer, default=50, help="solver steps (default 50)")
    parser.add_argument("--guidance-scale", type=float, default=None, help="default: the pipeline's own")
    shares = {"nargs": 2, "type": float, "default": (0.0, 1.0), "metavar": ("START", "STOP")}
    parser.add_argument("--guidance-interval", **shares, help="shares of the noise levels guided in (default 0 1)")
    parser.add_argument("--num-candidates", type=positive_integer, default=1, help="drawn for each image (default 1)")
    ways = {"choices": ("classifier", "density", "both"), "default": "classifier"}
    parser.add_argument("--select-by", **ways, help="which candidate is kept (default classifier)")
    parser.add_argument("--solver", default=None, help="such as UniPC or DPM-Solver++(2M); default: the pipeline's own")
    parser.add_argument("--seed", type=seed, default=0, help="of the starting noise (default 0)")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the grid and the images."""
    from PIL import Image
    from tqdm.auto import tqdm

    from latent_egc.pipelines.schedulers import solver
    from latent_egc.training.figures import sample_rows, save_grid

    pipeline = load_pipeline(options.pipeline, options.device)
    if options.solver is not None:
        pipeline.scheduler = solver(options.solver, pipeline.scheduler)
    names = pipeline.id2label
    class_ids = None
    if options.classes or (names and not options.unlabelled):
        wanted = [int(c) if c.isdigit() and c not in names.values() else c for c in options.classes or []]
        class_ids = pipeline.label_ids(wanted or list(names)[:10]).tolist()
    guidance = {"guidance_scale": options.guidance_scale, "guidance_interval": tuple(options.guidance_interval)}
    guidance |= {"num_candidates": options.num_candidates, "select_by": options.select_by}
    sizes = options.num_images_per_label, options.steps
    images = sample_rows(pipeline, class_ids, *sizes, seed=options.seed, **guidance)
    row_names = None if class_ids is None else [names[i] for i in class_ids]
    options.output.mkdir(parents=True, exist_ok=True)
    save_grid(images, options.output / "grid.png", row_names)
    for row, row_images in enumerate(tqdm(images, desc="write")):
        # The row's number keeps apart classes that are asked for twice or whose names become equal here.
        label = f"row{row:02d}"
        if row_names is not None:
            label += "_" + row_names[row].replace("/", "-").replace(" ", "_")
        for column, image in enumerate(row_images):
            Image.fromarray((image * 255).round().astype("uint8")).save(options.output / f"{label}_{column:03d}.png")
    print(f"{images.shape[0] * images.shape[1]} images and grid.png written to {options.output}")
