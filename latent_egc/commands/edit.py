"""Edit image files: another form, a part painted anew, one image into another, another class.

example: latent-egc edit counterfactual runs/quickstart photo.png --output edited

Each action writes its images and grid.png, on which they stand beside what they were made of, and prints how far they
are from it. A difference is drawn around grey.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_egc.commands.arguments import (
    add_device_argument,
    add_pipeline_argument,
    load_pipeline,
    positive_integer,
    seed,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from latent_egc.pipelines import EGCPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An action, and what it takes."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str, strength: float | None = None, labels: str | None = None) -> Any:
        own = actions.add_parser(name, help=summary, description=summary)
        add_pipeline_argument(own)
        own.add_argument("--output", type=Path, default=Path("edited"), help="folder for the files (default edited)")
        own.add_argument("--steps", type=positive_integer, default=50, help="solver steps (default 50)")
        if strength is not None:
            text = f"share of the way to noise, in [0, 1] (default {strength})"
            own.add_argument("--strength", type=float, default=strength, help=text)
        if labels is not None:
            own.add_argument("--class", dest="label", required=labels == "", help="name or id" + labels)
            own.add_argument("--guidance-scale", type=float, default=None, help="default: the pipeline's own")
        add_device_argument(own)
        return own

    of_files = {"nargs": "+", "type": Path, "help": "image files"}
    own = action("image-to-image", "noise images and denoise them", 0.8, "; default: open, unguided")
    own.add_argument("images", **of_files)
    own.add_argument("--seed", type=seed, default=0, help="of the noise (default 0)")
    own = action("inpaint", "paint a part of an image anew", 1.0, "; default: open, unguided")
    own.add_argument("image", type=Path, help="image file")
    own.add_argument("mask", type=Path, help="image file of the same size, white where it is painted anew")
    own.add_argument("--num-images", type=positive_integer, default=4, help="forms of it (default 4)")
    own.add_argument("--seed", type=seed, default=0, help="of the noise (default 0)")
    own = action("interpolate", "one image into another, by the noise of which both are made", None, "; default: open")
    own.add_argument("images", nargs=2, type=Path, help="two image files")
    own.add_argument("--num-images", type=positive_integer, default=8, help="images with both ends (default 8)")
    action("reconstruct", "images to their noise and back").add_argument("images", **of_files)
    action("class", "images as of another class", 0.8, "").add_argument("images", **of_files)
    own = action(
        "counterfactual", "the smallest change that another class takes", 0.8, "; default: the second likeliest"
    )
    own.add_argument("images", **of_files)
    own.add_argument("--distance-scale", type=float, default=0.3, help="how strongly it is held near (default 0.3)")


@dataclass
class Edited:
    """What an action made.

    Args:
        images: (N, H, W, 3) in [0, 1].
        columns: name -> (R, H, W, 3) in [0, 1], what the picture shows from left to right.
        row_names: R of them.
        lines: what is printed.
    """

    images: "np.ndarray"
    columns: dict[str, "np.ndarray"]
    row_names: list[str]
    lines: list[str]


def run(options: argparse.Namespace) -> None:
    """Writes the images and the grid, and prints their distances."""
    import numpy as np
    from PIL import Image

    from latent_egc.training.figures import save_grid

    pipeline = load_pipeline(options.pipeline, options.device)
    edited = ACTIONS[options.action](pipeline, options)
    options.output.mkdir(parents=True, exist_ok=True)
    columns = np.stack(list(edited.columns.values()), axis=1)
    save_grid(columns, options.output / "grid.png", edited.row_names, ", ".join(edited.columns))
    for number, image in enumerate(edited.images):
        Image.fromarray((image * 255).round().astype("uint8")).save(options.output / f"{number:03d}.png")
    print("\n".join(edited.lines))
    print(f"{len(edited.images)} images and grid.png written to {options.output}")


# --- the actions ----------------------------------------------------------------------------------------------------


def _image_to_image(pipeline: "EGCPipeline", options: argparse.Namespace) -> Edited:
    from latent_egc.data.stream import noise_generator

    images = _read(options.images)
    generators = [noise_generator(options.seed, number) for number in range(len(images))]
    after = pipeline.image_to_image(images, generator=generators, **_guided(pipeline, options)).images
    return _compared(pipeline, options.images, images, after)


def _edit_class(pipeline: "EGCPipeline", options: argparse.Namespace) -> Edited:
    images = _read(options.images)
    after = pipeline.edit_class(images, **_guided(pipeline, options)).images
    return _compared(pipeline, options.images, images, after)


def _inpaint(pipeline: "EGCPipeline", options: argparse.Namespace) -> Edited:
    import numpy as np

    from latent_egc.data.stream import noise_generator
    from latent_egc.pipelines.images import crop_masks

    count = options.num_images
    (image, mask), size = _read([options.image, options.mask]), pipeline.image_size
    generators = [noise_generator(options.seed, number) for number in range(count)]
    images = [image] * count
    after = pipeline.inpaint(images, mask, generator=generators, **_guided(pipeline, options)).images
    marked = np.repeat(crop_masks(mask, images, size).numpy().astype(np.float32), 3, axis=1).transpose(0, 2, 3, 1)
    edited = _compared(pipeline, [options.image] * count, images, after)
    before, *rest = edited.columns.items()
    edited.columns = dict([before, ("mask", marked), *rest])
    outside = np.abs(edited.images - before[1])[marked == 0]
    edited.lines.append(f"largest change outside the mask: {255 * outside.max(initial=0):g} of 255")
    return edited


def _reconstruct(pipeline: "EGCPipeline", options: argparse.Namespace) -> Edited:
    images = _read(options.images)
    before = _cropped(pipeline, images)
    alone = pipeline.image_to_image(images, strength=0.0, output_type="np").images
    after = pipeline.reconstruct(images, num_inference_steps=options.steps, output_type="np").images
    lines = [
        f"{path}: PSNR {_psnr(found, image):.2f} dB, of the autoencoder alone {_psnr(decoded, image):.2f} dB"
        for path, found, decoded, image in zip(options.images, after, alone, before, strict=True)
    ]
    columns = {"before": before, "autoencoder": alone, "inverted": after, "difference": _difference(before, after)}
    return Edited(after, columns, [path.stem for path in options.images], lines)


def _interpolate(pipeline: "EGCPipeline", options: argparse.Namespace) -> Edited:
    images, guided = _read(options.images), _guided(pipeline, options)
    between = pipeline.interpolate(*images, num_images=options.num_images, **guided).images
    names = [f"{number / (len(between) - 1):.2f}" for number in range(len(between))]
    lines = []
    if pipeline.id2label:
        found = [labels[0] for labels in pipeline.classify(between).labels]
        lines.append("classified along the way: " + ", ".join(found))
        names = [f"{name} {label}" for name, label in zip(names, found, strict=True)]
    before = _cropped(pipeline, images)
    ends = [_psnr(between[end], before[end]) for end in (0, -1)]
    lines.append(f"PSNR of the ends: {ends[0]:.2f} and {ends[1]:.2f} dB")
    columns = {name: image[None] for name, image in zip(names, between, strict=True)}
    return Edited(between, columns, [" to ".join(path.stem for path in options.images)], lines)


def _counterfactual(pipeline: "EGCPipeline", options: argparse.Namespace) -> Edited:
    images, guided = _read(options.images), _guided(pipeline, options)
    output = pipeline.counterfactual(images, distance_scale=options.distance_scale, **guided)
    changes = [f"{old} -> {new}" for old, new in zip(output.labels_before, output.labels_after, strict=True)]
    lines = [
        f"{path}: {change}, {'flipped' if flipped else f'not the {asked} that was asked for'} at guidance scale "
        f"{scale:g}; l2 distance {pixels:.2f} of pixels in [0, 1] (the autoencoder alone {alone:.2f}), "
        f"{latents:.2f} of latents"
        for path, change, flipped, asked, scale, pixels, alone, latents in zip(
            options.images,
            changes,
            output.flipped,
            output.labels_asked,
            output.guidance_scales,
            output.pixel_distance,
            output.autoencoder_distance,
            output.latent_distance,
            strict=True,
        )
    ]
    before, after = _cropped(pipeline, images), output.images
    return Edited(after, {"before": before, "after": after, "difference": _difference(before, after)}, changes, lines)


ACTIONS = {
    "image-to-image": _image_to_image,
    "inpaint": _inpaint,
    "interpolate": _interpolate,
    "reconstruct": _reconstruct,
    "class": _edit_class,
    "counterfactual": _counterfactual,
}


# --- what they share ------------------------------------------------------------------------------------------------


def _read(paths: Sequence[Path]) -> list["Image.Image"]:
    from latent_egc.data.sources import read_image

    return [read_image(path, str(path)) for path in paths]


def _guided(pipeline: "EGCPipeline", options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that most methods have in common."""
    label = options.label
    if label is not None and label.isdigit() and label not in pipeline.id2label.values():
        label = int(label)
    arguments = {"class_labels": label, "guidance_scale": options.guidance_scale, "num_inference_steps": options.steps}
    strength = {"strength": options.strength} if "strength" in options else {}
    return arguments | strength | {"output_type": "np"}


def _cropped(pipeline: "EGCPipeline", images: Sequence["Image.Image"]) -> "np.ndarray":
    """(N, H, W, 3) in [0, 1], as the pipeline sees them."""
    from latent_egc.pipelines.images import crop_images

    return crop_images(images, pipeline.image_size).permute(0, 2, 3, 1).numpy()


def _compared(
    pipeline: "EGCPipeline", paths: Sequence[Path], images: Sequence["Image.Image"], after: "np.ndarray"
) -> Edited:
    """Before, after and their difference; l2 distances, and what the autoencoder alone changes."""
    import numpy as np

    before = _cropped(pipeline, images)
    alone = pipeline.image_to_image(images, strength=0.0, output_type="np").images
    far, floor = (np.linalg.norm((found - before).reshape(len(before), -1), axis=1) for found in (after, alone))
    names = [path.stem for path in paths]
    if pipeline.id2label:
        old, new = ([labels[0] for labels in pipeline.classify(found).labels] for found in (before, after))
        names = [f"{first} -> {second}" for first, second in zip(old, new, strict=True)]
    lines = [
        f"{path}: {name}; l2 distance {distance:.2f} of pixels in [0, 1] (the autoencoder alone {share:.2f})"
        for path, name, distance, share in zip(paths, names, far, floor, strict=True)
    ]
    columns = {"before": before, "after": after, "difference": _difference(before, after)}
    return Edited(after, columns, names, lines)


def _difference(before: "np.ndarray", after: "np.ndarray") -> "np.ndarray":
    """Grey where there is none."""
    return 0.5 + (after - before) / 2


def _psnr(image: "np.ndarray", original: "np.ndarray") -> float:
    """In decibels, of values in [0, 1]."""
    import numpy as np

    return float(-10 * np.log10(np.square(image - original).mean() + 1e-12))
