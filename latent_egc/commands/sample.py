"""Sample images: a labelled grid, and every image as a file of its own; or, without a grid, very many.

example: latent-egc sample runs/quickstart --classes 3 8 --num-images-per-label 4 --output samples
         latent-egc sample runs/quickstart --all-of 3 8 --corrector mala
         accelerate launch -m latent_egc sample runs/quickstart --num-images 50000 --npz --output many

With --num-images the processes of a launcher share the work, and a stopped job goes on where it was.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_egc.commands.arguments import (
    add_device_argument,
    add_pipeline_argument,
    launched_processes,
    load_pipeline,
    positive_integer,
    seed,
)

if TYPE_CHECKING:
    from latent_egc.pipelines import EGCPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to sample, how, and where to."""
    add_pipeline_argument(parser)
    parser.add_argument("--output", "--out", type=Path, default=Path("samples"), help="folder (default samples)")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--classes", nargs="+", default=None, help="names or ids; default: all, at most 10")
    labels.add_argument("--unlabelled", action="store_true", help="sample without labels, unguided")
    sizes = parser.add_mutually_exclusive_group()
    names = ("--num-images-per-label", "--images-per-class")  # the second is the former name
    sizes.add_argument(*names, type=positive_integer, default=8, metavar="NUMBER", help="images a class (default 8)")
    sizes.add_argument("--num-images", type=positive_integer, default=None, help="in all, classes in turn; no grid")
    parser.add_argument("--npz", action="store_true", help="with --num-images: one file, as ADM's evaluator reads it")
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="of --num-images (default 64)")
    parser.add_argument("--steps", type=positive_integer, help="solver steps (default: the pipeline's own)")
    parser.add_argument("--guidance-scale", type=float, default=None, help="default: the pipeline's own")
    shares = {"nargs": 2, "type": float, "default": (0.0, 1.0), "metavar": ("START", "STOP")}
    parser.add_argument("--guidance-interval", **shares, help="shares of the noise levels guided in (default 0 1)")
    for name, meaning in (("all", "at once"), ("any", "one of them"), ("none", "none of them")):
        parser.add_argument(f"--{name}-of", nargs="+", default=None, metavar="CLASS", help=f"images that are {meaning}")
    kinds = ("ula", "mala", "hmc")
    parser.add_argument("--corrector", choices=kinds, default=None, help="chain at each noise level (default: none)")
    parser.add_argument("--num-candidates", type=positive_integer, default=1, help="drawn for each image (default 1)")
    ways = {"choices": ("classifier", "density", "both"), "default": "classifier"}
    parser.add_argument("--select-by", **ways, help="which candidate is kept (default classifier)")
    parser.add_argument("--solver", default=None, help="such as UniPC or DPM-Solver++(2M); default: the pipeline's own")
    parser.add_argument("--seed", type=seed, default=0, help="of the starting noise (default 0)")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the grid and the images, or many images."""
    from latent_egc.config import ConfigError

    if options.npz and options.num_images is None:
        raise ConfigError("--npz is for many images: it needs --num-images")
    composed = options.all_of or options.any_of or options.none_of
    if composed and (options.classes or options.unlabelled or options.num_images is not None):
        raise ConfigError("--all-of, --any-of and --none-of exclude --classes, --unlabelled and --num-images")
    call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    call |= {"guidance_interval": tuple(options.guidance_interval), "corrector": options.corrector}
    call |= {"num_candidates": options.num_candidates, "select_by": options.select_by}
    if options.num_images is None:
        _write_grid(options, _pipeline(options, options.device), call)
    else:
        _write_many(options, call)


def _pipeline(options: argparse.Namespace, device: str | None) -> "EGCPipeline":
    from latent_egc.pipelines.schedulers import solver

    pipeline = load_pipeline(options.pipeline, device)
    if options.solver is not None:
        pipeline.scheduler = solver(options.solver, pipeline.scheduler)
    return pipeline


def _class_ids(options: argparse.Namespace, pipeline: "EGCPipeline", at_most: int | None) -> list[int] | None:
    """The classes that are asked for, by default the first ones; None without labels."""
    names = pipeline.id2label
    if not (options.classes or (names and not options.unlabelled)):
        return None
    return pipeline.label_ids(_as_labels(options.classes, pipeline) or list(names)[:at_most]).tolist()


def _as_labels(given: list[str] | None, pipeline: "EGCPipeline") -> list[str | int]:
    """Names as they are, and ids as numbers where no class is called so."""
    names = pipeline.id2label.values()
    return [int(label) if label.isdigit() and label not in names else label for label in given or []]


def _composed(options: argparse.Namespace, pipeline: "EGCPipeline") -> dict[str, list[str | int]]:
    """The arguments of `EGCPipeline.composed_potential` that are given."""
    given = {name: getattr(options, name) for name in ("all_of", "any_of", "none_of")}
    return {name: _as_labels(labels, pipeline) for name, labels in given.items() if labels}


def _write_many(options: argparse.Namespace, call: dict[str, Any]) -> None:
    from latent_egc.measuring.sample_sets import draw_sample_set

    processes, device = launched_processes(options.device)
    pipeline = _pipeline(options, device)
    class_ids = _class_ids(options, pipeline, None)
    job = {"seed": options.seed, "batch_size": options.batch_size, "as_npz": options.npz}
    written = draw_sample_set(pipeline, options.output, options.num_images, class_ids, **job, **call)
    processes.print(f"{options.num_images} images written: {written}")


def _write_grid(options: argparse.Namespace, pipeline: "EGCPipeline", call: dict[str, Any]) -> None:
    from PIL import Image
    from tqdm.auto import tqdm

    from latent_egc.measuring.sample_sets import file_label
    from latent_egc.training.figures import sample_rows, save_grid

    class_ids = None
    if composed := _composed(options, pipeline):
        call["potential"] = pipeline.composed_potential(**composed, guidance_scale=call.pop("guidance_scale"))
    else:
        class_ids = _class_ids(options, pipeline, 10)
    images = sample_rows(pipeline, class_ids, options.num_images_per_label, seed=options.seed, **call)
    row_names = None if class_ids is None else [pipeline.id2label[i] for i in class_ids]
    options.output.mkdir(parents=True, exist_ok=True)
    save_grid(images, options.output / "grid.png", row_names)
    for row, row_images in enumerate(tqdm(images, desc="write")):
        # The row's number keeps apart classes that are asked for twice or whose names become equal here.
        label = f"row{row:02d}"
        if row_names is not None:
            label += "_" + file_label(row_names[row])
        for column, image in enumerate(row_images):
            Image.fromarray((image * 255).round().astype("uint8")).save(options.output / f"{label}_{column:03d}.png")
    print(f"{images.shape[0] * images.shape[1]} images and grid.png written to {options.output}")
