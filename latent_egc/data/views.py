"""Views of an image: the central one, and the clean branch's crop; what training and validation see of a split.

Crops and flips are made of pixels, since a mirrored latent is not the latent of the mirrored image. So a split's views
are pixels, encoded when they are needed, or moments, encoded beforehand (`data/latent_cache.py`); `Views` is both.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image
from torch.utils.data import Dataset

from latent_egc.config import DataConfig
from latent_egc.data.autoencoders import encode_moments
from latent_egc.data.sources import CorruptImageError, ImageTable
from latent_egc.data.stream import AUGMENTATION, KEPT_LABELS, SampleStream, random_stream
from latent_egc.pipelines.images import preprocess_images


def central_view(image: Image.Image, size: int, flipped: bool = False) -> torch.Tensor:
    """(3, size, size) in [-1, 1]: shorter side resized, centre cropped, mirrored if asked."""
    pixel_values = preprocess_images(image, size)[0]
    return pixel_values.flip(-1) if flipped else pixel_values


def clean_view(image: Image.Image, config: DataConfig, rng: np.random.Generator) -> torch.Tensor:
    """(3, size, size) in [-1, 1]: the clean branch's stronger augmentation, a random crop resized and perhaps mirrored.

    The crop's area share is uniform in `random_resized_crop`, its aspect ratio log-uniform in
    `random_resized_crop_ratio`: the Inception crop of Szegedy et al. (CVPR 2015), torchvision's RandomResizedCrop,
    timm's scale and ratio.
    """
    flipped = config.horizontal_flip and rng.random() < 0.5
    if config.random_resized_crop is not None:
        width, height = image.size
        for _ in range(10):
            area = width * height * rng.uniform(*config.random_resized_crop)
            ratio = math.exp(rng.uniform(*map(math.log, config.random_resized_crop_ratio)))
            crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if crop_width <= width and crop_height <= height:
                left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
                box = (left, top, left + crop_width, top + crop_height)
                size = (config.image_size, config.image_size)
                image = image.resize(size, Image.Resampling.LANCZOS, box=box)
                break
    return central_view(image, config.image_size, flipped)


def keep_labels(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Labels (M,) int64 of which each class keeps `fraction` in (0, 1], rounded, at least one; the others become -1.

    With the same seed a smaller share is a part of a larger one.
    """
    kept = np.full_like(labels, -1)
    for label in np.unique(labels[labels >= 0]):
        (rows,) = np.nonzero(labels == label)
        rows = random_stream(seed, KEPT_LABELS, int(label)).permutation(rows)
        kept[rows[: max(1, round(fraction * len(rows)))]] = label
    return kept


class Views(Protocol):
    """The images of one split. It never holds the autoencoder, so that it can be sent to a worker process."""

    def __len__(self) -> int:
        """How many images there are."""

    def __getitems__(self, samples: list[int]) -> list[dict[str, torch.Tensor]]:
        """For each sample: view and clean_view (C', h', w') float32, of the noisy and of the clean branch; class_labels
        (), -1 where unlabelled or hidden; num_skipped (), the corrupt images that were passed over.
        """

    def central(self, images: Sequence[int]) -> list[tuple[int, torch.Tensor, int]]:
        """Number, central view and label, never hidden, of each image; corrupt ones are left out if they may be."""

    def moments(self, vae: ModelMixin | None, views: torch.Tensor) -> torch.Tensor:
        """A batch of views -> the moments that `latents_from_moments` takes."""


class PixelViews(Dataset):
    """`Views` of pixels, (3, H, W) in [-1, 1], to be encoded by the training step.

    Args:
        table: the split.
        config: sizes, augmentation and the share of labels to keep.
        seed: the run's.
    """

    def __init__(self, table: ImageTable, config: DataConfig, seed: int) -> None:
        self.table, self.config, self.seed = table, config, seed
        self.labels = keep_labels(table.labels, config.label_fraction, seed)
        self.stream = SampleStream(len(table), seed)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        """One item of `__getitems__`."""
        index, num_skipped = self.stream.image_index(sample), 0
        while True:
            try:
                image = self.table.image(index)
                break
            except CorruptImageError:
                num_skipped += 1
                if not self.config.skip_corrupt or num_skipped == len(self.table):
                    raise
                index = (index + 1) % len(self.table)
        rng = random_stream(self.seed, AUGMENTATION, sample)
        flipped = self.config.horizontal_flip and bool(rng.random() < 0.5)
        return {
            "view": central_view(image, self.config.image_size, flipped),
            "clean_view": clean_view(image, self.config, rng),
            "class_labels": torch.tensor(self.labels[index]),
            "num_skipped": torch.tensor(num_skipped),
        }

    def __getitems__(self, samples: list[int]) -> list[dict[str, torch.Tensor]]:
        """See `Views`."""
        return [self[sample] for sample in samples]

    def central(self, images: Sequence[int]) -> list[tuple[int, torch.Tensor, int]]:
        """See `Views`."""
        found = []
        for index in images:
            try:
                view = central_view(self.table.image(index), self.config.image_size)
            except CorruptImageError:
                if not self.config.skip_corrupt:
                    raise
                continue
            found.append((index, view, int(self.table.labels[index])))
        return found

    def moments(self, vae: ModelMixin | None, views: torch.Tensor) -> torch.Tensor:
        """Encodes; without an autoencoder, pixels are the latents."""
        return encode_moments(vae, views)
