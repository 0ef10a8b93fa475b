"""Images of the data that a network was trained on, as the demo compares others with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from latent_egc.config import DataConfig
from latent_egc.data.sources import CorruptImageError, ImageTable, load_splits
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.images import preprocess_images

IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class References:
    """N training images as the network sees them, and the held-out ones as examples.

    Args:
        train, held_out: the splits.
        rows: N of `train`'s, spread evenly.
        latents: (N, C, h, w), on the CPU.
        energies: (N,) at timestep 0.
        class_names: empty for a model without classes.
    """

    train: ImageTable
    held_out: ImageTable
    rows: list[int]
    latents: torch.Tensor
    energies: torch.Tensor
    class_names: list[str]

    def percentile(self, energy: float) -> float:
        """Percentage of the training images whose energy is lower, in [0, 100]."""
        return 100 * (self.energies < energy).float().mean().item()

    def nearest(self, latents: torch.Tensor, count: int) -> list[tuple[Image.Image, str, float]]:
        """The training images nearest to latents (1, C, h, w) on the CPU: image, class or "", l2 distance of latents.

        At most `count`, nearest first.
        """
        distances = (self.latents - latents).flatten(1).norm(dim=1)
        nearest = distances.argsort()[:count].tolist()
        return [(*labelled(self.train, self.rows[i], self.class_names), distances[i].item()) for i in nearest]

    def example(self, number: int) -> tuple[Image.Image, str]:
        """A held-out image and its class, "" without one; any number names one. Raises CorruptImageError."""
        return labelled(self.held_out, number % len(self.held_out), self.class_names)


def labelled(table: ImageTable, row: int, class_names: Sequence[str]) -> tuple[Image.Image, str]:
    """A row's image and the name of its class, "" without one. Raises CorruptImageError."""
    label = int(table.labels[row])
    return table.image(row), "" if label < 0 else class_names[label]


@torch.no_grad()
def read_references(pipeline: EGCPipeline, data: DataConfig, count: int) -> References:
    """Encodes training images and asks the network for their energies, one forward pass each; corrupt ones are left.

    Args:
        pipeline: of the network.
        data: where its images are.
        count: how many, spread evenly over the training split; all where there are fewer.

    Raises:
        ConfigError: the images cannot be found, or are not those of this network's classes.
        ValueError: none of them can be read.
    """
    splits = load_splits(data, pipeline.energy_model.config.num_classes)
    wanted = np.linspace(0, len(splits.train) - 1, min(count, len(splits.train))).astype(int).tolist()
    rows, latents, energies = [], [], []
    with tqdm(total=len(wanted), desc="training images") as progress:
        for first in range(0, len(wanted), IMAGES_AT_ONCE):
            batch = wanted[first : first + IMAGES_AT_ONCE]
            read = list(_readable(splits.train, batch))
            progress.update(len(batch))
            if not read:
                continue
            pixel_values = torch.cat([preprocess_images(image, pipeline.image_size) for _, image in read])
            encoded = pipeline.encode(pixel_values.to(pipeline.device))
            rows += [row for row, _ in read]
            latents.append(encoded.cpu())
            energies.append(pipeline.energy_model(encoded, 0).energy.cpu())
    if not rows:
        raise ValueError(f"data.dataset={data.dataset!r}: none of {len(wanted)} training images can be read")
    return References(
        splits.train, splits.validation, rows, torch.cat(latents), torch.cat(energies), splits.class_names
    )


def _readable(table: ImageTable, rows: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    for row in rows:
        try:
            yield row, table.image(row)
        except CorruptImageError:
            continue
