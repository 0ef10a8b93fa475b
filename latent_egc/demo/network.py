"""What the demo computes with one pipeline: pictures, numbers and tables. Nothing here knows of the interface.

Images are PIL images of any size; what comes back is of the pipeline's own. A class is an id, None is any.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from latent_egc.data.sources import CorruptImageError, read_image
from latent_egc.data.stream import noise_generator
from latent_egc.demo.references import References
from latent_egc.models.noise_schedule import add_noise
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.images import central_crop, preprocess_images

# What one call may ask for.
MAX_IMAGES, MAX_STEPS, MAX_PIXELS = 24, 200, 2**26
NUM_PREVIEWS = 12  # of a call's steps; decoding each would take long for large images
NUM_INPAINTINGS = 3
COLOURS_OF_DIFFERENCE = "In the difference red is brighter, blue darker."
# The curves of `along_noise`: levels, draws of noise at each, classes shown, training images compared with.
LEVELS = tuple(number / 24 for number in range(25))
NUM_DRAWS, SHOWN_CLASSES, NUM_COMPARED = 8, 5, 32
THIS_IMAGE, LOW, HIGH = "this image", "10 % of training images below", "90 % below"


@dataclass(frozen=True)
class Classified:
    """What the network says of an image.

    Args:
        probabilities: of each class by name.
        energy: at timestep 0, low = likely.
        percentile: of the energy among those of training images, in [0, 100]; None where none are at hand.
    """

    probabilities: dict[str, float]
    energy: float
    percentile: float | None


@dataclass(frozen=True)
class Edited:
    """Pictures with what they are, and a sentence on them."""

    pictures: list[tuple[Image.Image, str]]
    summary: str


@dataclass(frozen=True)
class Curves:
    """Columns of tables: an image's energy and class probabilities at noise levels, shares of all timesteps in [0, 1].

    Args:
        energy: "noise level", "energy" and "of"; where training images are at hand their median is subtracted, and
            between LOW and HIGH are most of them.
        probabilities: "noise level", "probability" and "class"; empty for a model without classes.
    """

    energy: dict[str, list[Any]]
    probabilities: dict[str, list[Any]]


class Network:
    """A pipeline that is tried by hand.

    Args:
        pipeline: what samples, classifies and edits; its progress bar is turned off.
        references: training images at hand.
    """

    def __init__(self, pipeline: EGCPipeline, references: References | None = None) -> None:
        self.pipeline, self.references = pipeline, references
        pipeline.set_progress_bar_config(disable=True)

    @property
    def class_names(self) -> list[str]:
        """By id; empty for a model without classes."""
        return list(self.pipeline.id2label.values())

    # --- reading ----------------------------------------------------------------------------------------------------

    def classify(self, image: Image.Image) -> Classified:
        """One forward pass. Raises ValueError for a model without classes."""
        output = self.pipeline.classify(image)
        energy = output.energy.item()
        probabilities = dict(zip(self.class_names, output.probabilities[0].tolist(), strict=True))
        return Classified(probabilities, energy, self.references and self.references.percentile(energy))

    def nearest(self, image: Image.Image, count: int = 6) -> list[tuple[Image.Image, str]]:
        """The training images whose latents are nearest, cropped, with class and distance; none where none are at hand.

        Raises CorruptImageError where one can no longer be read.
        """
        if self.references is None:
            return []
        found = self.references.nearest(self._latents(image).cpu(), count)
        return [(self.cropped(image), f"{name} at {distance:.1f}".strip()) for image, name, distance in found]

    def along_noise(self, image: Image.Image, seed: int = 0) -> Curves:
        """Energy and probabilities of an image as noise is added: means over draws, the same at every level.

        An energy's zero differs by noise level, so that where training images are at hand theirs is subtracted.
        A level is a forward pass of NUM_DRAWS latents, and for the first image one of NUM_COMPARED.
        """
        outputs = self._outputs(self._latents(image).expand(NUM_DRAWS, -1, -1, -1), seed)
        energies = {THIS_IMAGE: torch.stack([output.energy.mean() for output in outputs]).cpu()}
        if self.references is not None:
            low, median, high = self._training_energies
            energies = {THIS_IMAGE: energies[THIS_IMAGE] - median, LOW: low - median, HIGH: high - median}
        energy = _table(("noise level", "energy", "of"), {name: found.tolist() for name, found in energies.items()})
        shares = {}
        if self.class_names:
            found = torch.stack([output.logits.softmax(dim=1).mean(dim=0) for output in outputs])  # (levels, K)
            likely = found.amax(dim=0).topk(min(SHOWN_CLASSES, len(self.class_names))).indices.tolist()
            shares = {self.class_names[i]: found[:, i].tolist() for i in likely}
        return Curves(energy, _table(("noise level", "probability", "class"), shares))

    @cached_property
    def _training_energies(self) -> torch.Tensor:
        """(3, levels): what a tenth, a half and nine tenths of the training images stay below."""
        rows = np.linspace(0, len(self.references.rows) - 1, NUM_COMPARED).astype(int)
        outputs = self._outputs(self.references.latents[rows].to(self.pipeline.device), 0)
        energies = torch.stack([output.energy for output in outputs]).float().cpu()
        return energies.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1)

    @torch.no_grad()
    def _outputs(self, latents: torch.Tensor, seed: int) -> list[Any]:
        """What the network says of latents (N, C, h, w) under the same noise at every level: an `EnergyOutput` each."""
        model = self.pipeline.energy_model
        noise = torch.randn(latents.shape, generator=noise_generator(seed, 0)).to(latents)
        timesteps = (torch.tensor(LEVELS) * (model.config.num_train_timesteps - 1)).round().long().to(latents.device)
        return [model(add_noise(latents, noise, model.noise_levels(t)), t) for t in timesteps]

    @torch.no_grad()
    def _latents(self, image: Image.Image) -> torch.Tensor:
        """(1, C, h, w) on the pipeline's device."""
        return self.pipeline.encode(preprocess_images(image, self.pipeline.image_size).to(self.pipeline.device))

    def cropped(self, image: Image.Image) -> Image.Image:
        """What of an image the network sees."""
        return central_crop(image, self.pipeline.image_size)

    # --- making -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        class_ids: Sequence[int],
        images_per_class: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        num_steps: int,
        seed: int,
    ) -> Iterator[tuple[float, list[Image.Image]]]:
        """Samples: the share of the steps that are done, and the images as they are then; with share 1 the samples.

        Closing the iterator ends the sampling after the step it is at. No classes: any, without guidance.

        Raises:
            ValueError: an argument that does not fit, or asks for too much.
        """
        labels, count = list(class_ids) or None, images_per_class * max(1, len(class_ids))
        _check_at_most("images", count, MAX_IMAGES)
        _check_at_most("steps", num_steps, MAX_STEPS)
        every, closed, found = max(1, num_steps // NUM_PREVIEWS), threading.Event(), SimpleQueue()

        def look(call: EGCPipeline, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
            call._interrupt = closed.is_set()
            if step % every == 0:
                found.put(((step + 1) / num_steps, tensors["latents"]))

        def sample() -> None:
            try:
                output = self.pipeline(
                    labels,
                    num_images_per_label=images_per_class,
                    num_inference_steps=num_steps,
                    guidance_scale=guidance_scale if labels else None,
                    guidance_interval=guidance_interval,
                    generator=[noise_generator(seed, number) for number in range(count)],
                    callback_on_step_end=look,
                    batch_size=count,
                )
                found.put((1.0, output.images))
            except Exception as error:  # raised where the iterator is read
                found.put((1.0, error))

        sampling = threading.Thread(target=sample, daemon=True)
        sampling.start()
        try:
            while True:
                share, what = found.get()
                if isinstance(what, Exception):
                    raise what
                if isinstance(what, list):
                    yield share, what
                    return
                yield min(share, 0.99), self._decoded(what)
        finally:
            closed.set()
            sampling.join()

    @torch.no_grad()
    def _decoded(self, latents: torch.Tensor) -> list[Image.Image]:
        return self.pipeline.image_processor.postprocess(self.pipeline.decode(latents).float(), output_type="pil")

    def inpaint(
        self,
        image: Image.Image,
        mask: Image.Image,
        class_id: int | None,
        guidance_scale: float,
        num_steps: int,
        seed: int,
    ) -> Edited:
        """An image with what `mask` (L, as large, white is painted anew) marks painted anew, in several forms.

        Raises ValueError: nothing is marked, or another argument that does not fit.
        """
        _check_at_most("steps", num_steps, MAX_STEPS)
        if mask.getbbox() is None:
            raise ValueError("nothing is marked: draw over what shall be painted anew")
        found = self.pipeline.inpaint(
            [image] * NUM_INPAINTINGS,
            mask,
            class_id,
            guidance_scale=None if class_id is None else guidance_scale,
            num_inference_steps=num_steps,
            generator=[noise_generator(seed, number) for number in range(NUM_INPAINTINGS)],
        ).images
        pictures = [(self.cropped(image), "before"), *((one, self._caption("after", one)) for one in found)]
        return Edited(pictures, "What is not marked is the image's own, to the bit.")

    def edit_class(
        self, image: Image.Image, class_id: int | None, strength: float, guidance_scale: float, num_steps: int
    ) -> Edited:
        """An image as one of another class. Raises ValueError where an argument does not fit."""
        _check_at_most("steps", num_steps, MAX_STEPS)
        if class_id is None:
            raise ValueError("choose the class that the image shall become")
        options = {"strength": strength, "guidance_scale": guidance_scale, "num_inference_steps": num_steps}
        (after,) = self.pipeline.edit_class(image, class_id, **options).images
        summary = f"Through its own noise, and back as {self.class_names[class_id]}. {COLOURS_OF_DIFFERENCE}"
        return Edited(self._compared(image, after), summary)

    def counterfactual(
        self, image: Image.Image, class_id: int | None, distance_scale: float, strength: float, num_steps: int
    ) -> Edited:
        """The smallest change that is found after which the classifier says another class, by default its second.

        Raises ValueError where an argument does not fit.
        """
        _check_at_most("steps", num_steps, MAX_STEPS)
        options = {"distance_scale": distance_scale, "strength": strength, "num_inference_steps": num_steps}
        output = self.pipeline.counterfactual(image, class_id, **options)
        asked, said = output.labels_asked[0], output.labels_after[0]
        verdict = f"says {said} now" if output.flipped else f"still says {said}, not the {asked} that was asked for"
        distances = output.pixel_distance.item(), output.autoencoder_distance.item()
        summary = (
            f"It was {output.labels_before[0]}, and the classifier {verdict}, at guidance scale "
            f"{output.guidance_scales.item():g}. l2 distance {distances[0]:.2f} of pixels in [0, 1], "
            f"of which the autoencoder alone makes {distances[1]:.2f}. {COLOURS_OF_DIFFERENCE}"
        )
        return Edited(self._compared(image, output.images[0]), summary)

    def _compared(self, image: Image.Image, after: Image.Image) -> list[tuple[Image.Image, str]]:
        before = self.cropped(image)
        pictures = [(before, self._caption("before", before)), (after, self._caption("after", after))]
        return [*pictures, (difference(before, after), "difference")]

    def _caption(self, text: str, image: Image.Image) -> str:
        return f"{text}: {self.pipeline.classify(image).labels[0][0]}" if self.class_names else text


def read_upload(path: str | Path) -> Image.Image:
    """An uploaded file as RGB. Raises CorruptImageError, or ValueError for one that has too many pixels."""
    try:
        with Image.open(path) as image:  # reads no pixels
            _check_at_most("pixels", image.width * image.height, MAX_PIXELS)
    except (OSError, Image.DecompressionBombError) as error:
        raise CorruptImageError(
            f"corrupt image: the upload is none that can be read: {type(error).__name__}"
        ) from error
    return read_image(path, "the upload")


def enlarged(image: Image.Image, at_least: int = 256) -> Image.Image:
    """A small image by a whole factor, pixel by pixel, so that nothing is invented between pixels."""
    factor = -(-at_least // min(image.size))
    return image if factor == 1 else image.resize([factor * side for side in image.size], Image.Resampling.NEAREST)


def difference(before: Image.Image, after: Image.Image) -> Image.Image:
    """Of the brightness of two images of one size: white is none, red brighter, blue darker."""
    change = (np.asarray(after, dtype=np.float32) - np.asarray(before, dtype=np.float32)).mean(axis=2) / 255
    colours = matplotlib.colormaps["RdBu_r"](0.5 + change / 2)[..., :3]
    return Image.fromarray((255 * colours).round().astype(np.uint8))


def _table(columns: tuple[str, str, str], curves: dict[str, list[float]]) -> dict[str, list[Any]]:
    """Columns of noise levels, values and names from a curve a name."""
    rows = [(level, value, name) for name, curve in curves.items() for level, value in zip(LEVELS, curve, strict=True)]
    return {column: [row[i] for row in rows] for i, column in enumerate(columns)}


def _check_at_most(name: str, found: int, most: int) -> None:
    if found > most:
        raise ValueError(f"at most {most:,} {name} are allowed here, got {found:,}")
