"""The training stream: an endless sequence of numbered samples.

Nothing random here depends on how often or where it is asked: a sample's image, views, timestep and noise are functions
of (seed, number). A resumed run and any number of processes therefore see the same samples.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from latent_egc.config import Config, DataConfig
from latent_egc.data.mixing import erasing_mask, mixes, mixing_mask
from latent_egc.models.noise_schedule import noise_schedule

# What random streams are for; each is independent of the others, so that one may draw more without moving the rest.
ORDER, AUGMENTATION, NOISE, CACHED_VIEW, VALIDATION_NOISE, KEPT_LABELS, TIMESTEPS, ERASING, MIXING = range(9)


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
    clean: bool = True,
) -> dict[str, torch.Tensor]:
    """The random quantities of one training sample, besides its views.

    Timesteps are uniform in [0, num_timesteps); with probability `label_drop` the class embedding sees the null label.

    Returns:
        timesteps () int64; label_dropped () bool; noise (C, h, w) float32; where latents are samples of a `posterior`,
        posterior_noise like it, and for a sample of the `clean` branch clean_posterior_noise; these are drawn last, so
        that the others do not depend on them.
    """
    rng = random_stream(seed, NOISE, sample)
    draws = {
        "timesteps": torch.tensor(rng.integers(num_timesteps)),
        "label_dropped": torch.tensor(rng.random() < label_drop),
    }
    for name in ("noise", "posterior_noise", "clean_posterior_noise")[: 1 + posterior * (1 + clean)]:
        draws[name] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return draws


def timestep_probabilities(alphas_cumprod: np.ndarray, log_normal: tuple[float, float]) -> np.ndarray:
    """(T,) float64, positive or underflown, summing to 1: how often each timestep is drawn.

    Args:
        alphas_cumprod: (T,) abar_t.
        log_normal: mean and std > 0 of the normal distribution of log(sigma_t / alpha_t), each timestep having the mass
            of its surroundings. Source: EDM, Karras et al. (NeurIPS 2022), whose data have std 0.5 where latents have
            1: add log 2 to its means.
    """
    mean, std = log_normal
    levels = 0.5 * np.log((1 - alphas_cumprod) / alphas_cumprod)
    exponents = -0.5 * ((levels - mean) / std) ** 2
    masses = np.exp(exponents - exponents.max()) * np.gradient(levels)
    return masses / masses.sum()


class TimestepSampling:
    """Timesteps that are not uniform.

    Args:
        probabilities: (T,), see `timestep_probabilities`.
        seed: the run's.
    """

    def __init__(self, probabilities: np.ndarray, seed: int) -> None:
        self.cumulative, self.seed = np.cumsum(probabilities), seed

    def draw(self, sample: int, uniform: int) -> torch.Tensor:
        """() int64.

        Args:
            sample: its number.
            uniform: its uniform timestep, which is the sampled one's quantile, rounded.
        """
        rest = random_stream(self.seed, TIMESTEPS, sample).random()
        quantile = (uniform + rest) / len(self.cumulative)
        return torch.tensor(min(np.searchsorted(self.cumulative, quantile, side="right"), len(self.cumulative) - 1))


def timestep_sampling(config: Config) -> TimestepSampling | None:
    """What draws the timesteps of a run with a resolved model; None: `sample_draws`, as they are uniform."""
    if config.objective.timestep_log_normal is None:
        return None
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    alphas_cumprod = noise_schedule(**{key: config.model[key] for key in keys}, dtype=torch.float64).numpy()
    probabilities = timestep_probabilities(alphas_cumprod, config.objective.timestep_log_normal)
    return TimestepSampling(probabilities, config.training.seed)


def clean_share(clean_fraction: float) -> Fraction:
    """`objective.clean_fraction` as the fraction that is meant: 0.1 is a tenth."""
    return Fraction(clean_fraction).limit_denominator(1000)


def collate(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows stacked, key by key, of the items that have the key: those of the clean branch may be fewer."""
    keys = dict.fromkeys(key for item in items for key in item)
    return {key: torch.stack([item[key] for item in items if key in item]) for key in keys}


class TrainingSamples(Dataset):
    """The training stream: `Views` of the train split, joined with `sample_draws`; for `collate`.

    The clean branch sees the share `clean_fraction` of the samples, spread evenly by their numbers: as many in each of
    the consecutive blocks that are a process's micro-batches. Of these the first and the second are a pair, and so on,
    which has one mask. Only these samples have the keys that begin with "clean_", clean_labels () among them.

    Args:
        views: of the train split.
        seed: the run's.
        shape: (C, h, w) of the latents.
        num_timesteps: T.
        label_drop, clean_fraction: the objective's; without classes no sample is in the clean branch, 0.
        posterior: whether latents are samples of the autoencoder's posterior.
        timesteps: what draws other timesteps, None leaves those of `sample_draws`.
        augmentation: what is done to clean latents; adds clean_erasing (h, w) and clean_mixing (h, w), where it is.
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
        timesteps: TimestepSampling | None = None,
        augmentation: DataConfig | None = None,
    ) -> None:
        self.views = views
        self.timesteps, self.augmentation = timesteps, augmentation
        self.draws = (seed, shape, num_timesteps, label_drop, posterior)
        self.clean_share = clean_share(clean_fraction)

    def __getitems__(self, samples: list[int]) -> list[dict[str, torch.Tensor]]:
        """For each sample everything that one row of the objective needs; see `Views` and `sample_draws`."""
        seed, *rest = self.draws
        items = []
        for view, sample in zip(self.views.__getitems__(samples), samples, strict=True):
            clean_row = math.floor(sample * self.clean_share)  # its number among those that the clean branch sees
            seen = math.floor((sample + 1) * self.clean_share) > clean_row
            item = {**view, **sample_draws(seed, sample, *rest, clean=seen)}
            if self.timesteps is not None:
                item["timesteps"] = self.timesteps.draw(sample, int(item["timesteps"]))
            clean_view = item.pop("clean_view")
            if seen:
                item |= {"clean_view": clean_view, "clean_labels": item["class_labels"]}
                item |= self._masks(sample, clean_row // 2)
            items.append(item)
        return items

    def _masks(self, sample: int, pair: int) -> dict[str, torch.Tensor]:
        """Those of the augmentation, of a sample and of its pair."""
        config, (seed, (_, *size), *_) = self.augmentation, self.draws
        masks = {}
        if config is not None and config.reprob > 0:
            masks["clean_erasing"] = erasing_mask(config, size, random_stream(seed, ERASING, sample))
        if config is not None and mixes(config):
            masks["clean_mixing"] = mixing_mask(config, size, random_stream(seed, MIXING, pair))
        return masks
