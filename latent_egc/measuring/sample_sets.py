"""Many samples as files, for a study of them: processes share the work, and what is there is not drawn again.

Image i has the class and the starting noise of its number. How many processes there are, how many images a batch has
and where a job was stopped therefore change nothing but the last bits of rounding.

FOLDER/samples.json  and  000000_cat.png 000001_dog.png ...  or, once all of them are drawn, samples.npz in their place
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from latent_egc.atomic import check_unoccupied, remove, replace_file, replace_text
from latent_egc.config import ConfigError
from latent_egc.data.autoencoders import fingerprint
from latent_egc.data.encoding import start_processes
from latent_egc.data.sources import read_image
from latent_egc.data.stream import noise_generator
from latent_egc.measuring.image_archives import write_archive
from latent_egc.pipelines import EGCPipeline

RECORD, ARCHIVE = "samples.json", "samples.npz"


def file_label(class_name: str) -> str:
    """A class's name as a part of a file's."""
    return re.sub(r"[^\w.-]+", "_", class_name)[:80]


def sampler_of(pipeline: EGCPipeline) -> dict[str, Any]:
    """What a call that does not say otherwise samples by, besides the networks; plain values."""
    scheduler = json.loads(pipeline.scheduler.to_json_string())
    scheduler.pop("_diffusers_version", None)
    defaults = ("default_guidance_scale", "default_num_inference_steps")
    return {"scheduler": scheduler} | {name: pipeline.config[name] for name in defaults}


def draw_sample_set(
    pipeline: EGCPipeline,
    folder: Path,
    num_images: int,
    class_ids: Sequence[int] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    as_npz: bool = False,
    **options: Any,
) -> Path:
    """Draws what a folder lacks of a set of samples. For every process to call, which share the work.

    Args:
        pipeline: on this process's device.
        folder: new or empty, or of the same set.
        num_images: N.
        class_ids: image i has class i modulo their number, so that classes differ by one image at most; None: without
            labels.
        seed: image i starts from `noise_generator(seed, i)`.
        batch_size: images drawn at once.
        as_npz: the images end in one file, as `write_archive` writes it. Until then they lie there as .png files.
        options: of the pipeline's call, such as num_inference_steps; plain values.

    Returns:
        The folder, or the .npz file in it.

    Raises:
        ConfigError: the folder holds other files or samples drawn otherwise, or not what other processes wrote.
        ValueError: options that the pipeline refuses; nothing is written.
    """
    processes, found = start_processes(), folder / ARCHIVE if as_npz else folder
    record = _record(pipeline, num_images, class_ids, seed, as_npz, options)
    is_new = not (folder / RECORD).is_file()
    _refuse_other(folder, None if is_new else json.loads((folder / RECORD).read_text()), record)
    labels = None if class_ids is None else [int(class_ids[i % len(class_ids)]) for i in range(num_images)]
    paths = [folder / f"{i:06d}.png" for i in range(num_images)]
    if labels is not None:
        names = {label: file_label(pipeline.id2label[label]) for label in set(labels)}
        paths = [path.with_name(f"{path.stem}_{names[i]}.png") for path, i in zip(paths, labels, strict=True)]
    if not (as_npz and found.is_file()):
        mine = range(processes.process_index, num_images, processes.num_processes)
        missing = [i for i in mine if is_new or not _is_whole(paths[i])]
        drawn = _drawn(pipeline, labels, missing, seed, batch_size, options)
        _write(drawn, paths, len(missing), processes, record if is_new else None)
    if processes.is_main_process:
        if not (as_npz and found.is_file()):
            _check_complete(folder, paths)
            if as_npz:
                replace_file(found, lambda unfinished: _pack(unfinished, paths, labels))
        if as_npz:
            for path in paths:
                path.unlink(missing_ok=True)
    processes.wait_for_everyone()
    return found


def _record(
    pipeline: EGCPipeline,
    num_images: int,
    class_ids: Sequence[int] | None,
    seed: int,
    as_npz: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the images depend on, and how they are kept; plain values."""
    sampler = sampler_of(pipeline)
    steps = sampler.pop("default_num_inference_steps")
    record = {
        "network": fingerprint(pipeline.energy_model),
        "dtype": str(pipeline.energy_model.dtype),
        "autoencoder": fingerprint(pipeline.vae),
        **sampler,
        "num_images": num_images,
        "classes": None if class_ids is None else [pipeline.id2label[int(i)] for i in class_ids],
        "seed": seed,
        "files": ARCHIVE if as_npz else "png",
    }
    arguments = inspect.signature(EGCPipeline.__call__).parameters
    # What is given as it would be anyway changes nothing; and a set may be finished by a version with other arguments.
    idle = {name for name, value in options.items() if name in arguments and value == arguments[name].default}
    told = {name: value for name, value in options.items() if name not in idle}
    return json.loads(json.dumps(record | {"num_inference_steps": steps} | told))


def _refuse_other(folder: Path, found: dict[str, Any] | None, record: dict[str, Any]) -> None:
    """Raises ConfigError for a folder with anything but a part of the set that the record describes."""
    if found is None:
        remove(folder / f"{RECORD}.tmp")  # of a job that was killed as it began
        check_unoccupied(folder)
        return
    for key in [*record, *found]:
        before, now = found.get(key, "its default"), record.get(key, "its default")
        if before != now:
            raise ConfigError(
                f"{folder} holds samples drawn with {key}={before}, asked for {now}; choose another folder"
            )


def _is_whole(path: Path) -> bool:
    """Whether an image is there, with the checksums that it was written with."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # the second is Pillow's for a broken chunk
        return False
    return True


def _drawn(
    pipeline: EGCPipeline,
    labels: Sequence[int] | None,
    numbers: Sequence[int],
    seed: int,
    batch_size: int,
    options: Mapping[str, Any],
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Numbers of images, and the images (B, H, W, 3) uint8, batch by batch."""
    pipeline.set_progress_bar_config(disable=True)
    for first in range(0, len(numbers), batch_size):
        batch = numbers[first : first + batch_size]
        images = pipeline(
            None if labels is None else [labels[i] for i in batch],
            num_images_per_label=len(batch) if labels is None else 1,
            generator=[noise_generator(seed, i) for i in batch],
            output_type="np",
            batch_size=len(batch),
            **options,
        ).images
        yield batch, (images * 255).round().astype(np.uint8)


def _write(
    drawn: Iterator[tuple[Sequence[int], np.ndarray]],
    paths: Sequence[Path],
    count: int,
    processes: PartialState,
    record: dict[str, Any] | None,
) -> None:
    """Writes what is drawn; a new set's record before it, but not before the pipeline has drawn a batch."""
    started = list(filter(None, [next(drawn, None)]))
    processes.wait_for_everyone()  # every process has seen the folder as it was, and none was refused
    if record is not None and processes.is_main_process:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        replace_text(paths[0].parent / RECORD, json.dumps(record, indent=1) + "\n")
    processes.wait_for_everyone()
    with tqdm(total=count, desc="sample", unit="image", disable=not processes.is_main_process) as progress:
        for numbers, images in chain(started, drawn):
            for number, image in zip(numbers, images, strict=True):
                replace_file(paths[number], lambda file, image=image: Image.fromarray(image).save(file, format="png"))
            progress.update(len(numbers))
    processes.wait_for_everyone()


def _check_complete(folder: Path, paths: Sequence[Path]) -> None:
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} images that other processes wrote, the first is {missing[0]}: all must "
            "write into one folder that each of them sees"
        )


def _pack(file: Path, paths: Sequence[Path], labels: Sequence[int] | None) -> None:
    images = (read_image(path, path.name) for path in tqdm(paths, desc="pack", unit="image"))
    write_archive(file, map(np.asarray, images), len(paths), labels)
