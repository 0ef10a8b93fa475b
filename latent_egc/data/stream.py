"""The training stream: an endless sequence of numbered samples.

Nothing random here depends on how often or where it is asked: a sample's image, views, timestep and noise are functions
of (seed, number). A resumed run and any number of processes therefore see the same samples.
"""

import math
import os
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from latent_egc.config import DataConfig

# What random streams are for; each is independent of the others, so that one may draw more without moving the rest.
ORDER, AUGMENTATION, NOISE, CACHED_VIEW, VALIDATION_NOISE, KEPT_LABELS = range(6)


def random_stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    """The random numbers of one purpose for one sample (or epoch): counter-based, so any is reached at once."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, number]))


def noise_generator(seed: int, number: int) -> torch.Generator:
    """What draws the starting noise of sample `number`; the same on any device, in any batch."""
    return torch.Generator().manual_seed(seed * 2**20 + number)


class SampleStream:
    """The endless sequence of training samples: epoch after epoch of `num_images`, each in its own order."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def image_index(self, sample: int) -> int:
        """Which image sample number `sample` shows."""
        epoch, position = divmod(sample, self.num_images)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, random_stream(self.seed, ORDER, epoch).permutation(self.num_images)
        return int(self._order[position])


class BatchSchedule(Sampler[list[int]]):
    """Which samples this process takes in which micro-batch; together the processes cover the stream without a gap.

    Args:
        first_step, max_steps: the optimiser steps to schedule, [first_step, max_steps).
        batch_size: rows a micro-batch and process.
        accumulation: micro-batches a step.
        process_index, num_processes: this process among all.
    """

    def __init__(
        self,
        first_step: int,
        max_steps: int,
        batch_size: int,
        accumulation: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.micro_batches = range(first_step * accumulation, max_steps * accumulation)
        self.batch_size = batch_size
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[list[int]]:
        for micro_batch in self.micro_batches:
            first = (micro_batch * self.num_processes + self.process_index) * self.batch_size
            yield list(range(first, first + self.batch_size))


def num_loader_workers(data: DataConfig, reads_images: bool) -> int:
    """`data.num_workers`, or what auto means: up to four, one processor being left to the process that they serve.

    Args:
        data: the section.
        reads_images: whether images are decoded; else, and for the digits, which are a few bytes each, auto is 0.
    """
    if data.num_workers != "auto":
        return data.num_workers
    if not reads_images or data.dataset == "digits":
        return 0
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(4, processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def sample_draws(
    seed: int,
    sample: int,
    shape: tuple[int, int, int],
    num_timesteps: int,
    label_drop: float,
    posterior: bool = True,
) -> dict[str, torch.Tensor]:
    """The random quantities of one training sample, besides its views.

    Timesteps are uniform in [0, num_timesteps); with probability `label_drop` the class embedding sees the null label.

    Returns:
        timesteps () int64; label_dropped () bool; noise (C, h, w) float32; where latents are samples of a `posterior`,
        posterior_noise and clean_posterior_noise like it, which are drawn last, so that the others do not depend on it.
    """
    rng = random_stream(seed, NOISE, sample)
    draws = {
        "timesteps": torch.tensor(rng.integers(num_timesteps)),
        "label_dropped": torch.tensor(rng.random() < label_drop),
    }
    for name in ("noise", "posterior_noise", "clean_posterior_noise") if posterior else ("noise",):
        draws[name] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return draws


def clean_share(clean_fraction: float) -> Fraction:
    """`objective.clean_fraction` as the fraction that is meant: 0.1 is a tenth."""
    return Fraction(clean_fraction).limit_denominator(1000)


class TrainingSamples(Dataset):
    """The training stream: `Views` of the train split, joined with `sample_draws`, and `in_clean_branch` ().

    The clean branch sees the share `clean_fraction` of the samples, spread evenly by their numbers: as many in each of
    the consecutive blocks that are a process's micro-batches.
    """

    def __init__(
        self,
        views: Dataset,
        seed: int,
        shape: tuple[int, int, int],
        num_timesteps: int,
        label_drop: float,
        clean_fraction: float = 1.0,
        posterior: bool = True,
    ) -> None:
        self.views = views
        self.draws = (seed, shape, num_timesteps, label_drop, posterior)
        self.clean_share = clean_share(clean_fraction)

    def __getitems__(self, samples: list[int]) -> list[dict[str, torch.Tensor]]:
        """For each sample everything that one row of the objective needs; see `Views` and `sample_draws`."""
        seed, *rest = self.draws
        items = []
        for view, sample in zip(self.views.__getitems__(samples), samples, strict=True):
            seen = math.floor((sample + 1) * self.clean_share) > math.floor(sample * self.clean_share)
            items.append({**view, **sample_draws(seed, sample, *rest), "in_clean_branch": torch.tensor(seen)})
        return items
