"""What every suite is given: the pipeline, the images, and a way to run over them on all processes."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.sources import ImageTable, Splits, load_splits
from latent_egc.data.stream import VALIDATION_NOISE, random_stream
from latent_egc.data.views import central_view
from latent_egc.measuring.results import Metric, bootstrapped
from latent_egc.measuring.settings import EvaluationSettings
from latent_egc.pipelines import EGCPipeline

ROWS_PER_PART = 1000


def load_matching_splits(pipeline: EGCPipeline, data: DataConfig) -> Splits:
    """The dataset of `data`, its class names checked against the pipeline's.

    Raises:
        ConfigError: as `load_splits`, or classes that are not the pipeline's.
    """
    splits = load_splits(data, pipeline.energy_model.config.num_classes)
    expected = [name for _, name in sorted(pipeline.id2label.items())]
    if splits.class_names != expected:
        pairs = zip(splits.class_names, expected, strict=False)
        first = next((i for i, (name, wanted) in enumerate(pairs) if name != wanted), 0)
        raise ConfigError(
            f"the dataset's classes are not the pipeline's (id2label): class {first} is "
            f"{splits.class_names[first]!r} in the data and {expected[first]!r} in the pipeline"
        )
    return splits


class EvaluationContext:
    """A pipeline, the images it is judged on, and the settings.

    Args:
        pipeline: on the accelerator's device.
        data: the dataset; its `image_size` gives way to the pipeline's. The validation split is evaluated.
        settings: of the evaluation.
        accelerator: the processes that share the work.

    Attributes:
        parts: where the running suite keeps the parts of its long steps until it is finished; None: nowhere.

    Raises:
        ConfigError: the dataset cannot be used with this pipeline.
    """

    def __init__(
        self, pipeline: EGCPipeline, data: DataConfig, settings: EvaluationSettings, accelerator: Accelerator
    ) -> None:
        self.pipeline, self.settings, self.accelerator = pipeline, settings, accelerator
        self.parts: Path | None = None
        self.model = pipeline.energy_model
        self.data = replace(data, image_size=pipeline.image_size)
        self.splits = load_matching_splits(pipeline, self.data)
        labels = self.splits.validation.labels
        usable = np.arange(len(labels)) if self.num_classes is None else np.flatnonzero(labels >= 0)
        if len(usable) == 0:
            raise ConfigError("the validation split has no labelled image")
        self.rows = self.choose(usable, settings.num_images)
        self.labels = labels[self.rows]

    @property
    def num_classes(self) -> int | None:
        """K, None for an unlabelled model."""
        return self.model.config.num_classes

    @property
    def class_names(self) -> list[str]:
        """The K names, in the order of their ids."""
        return self.splits.class_names

    def require_classes(self, suite: str) -> None:
        """Raises ConfigError for a model that cannot classify."""
        if self.num_classes is None:
            raise ConfigError(f"--suite {suite} needs classes, this pipeline was trained without")

    def choose(self, rows: np.ndarray, count: int | None) -> np.ndarray:
        """`count` of the rows, drawn by the seed and in ascending order; all of them for None or a larger count."""
        if count is None or count >= len(rows):
            return rows
        return np.sort(np.random.default_rng(self.settings.seed).choice(rows, count, replace=False))

    def pixel_values(self, table: ImageTable, rows: Sequence[int]) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] on the device: the centre crops of some rows of a split."""
        views = [central_view(table.image(int(row)), self.pipeline.image_size) for row in rows]
        return torch.stack(views).to(self.accelerator.device)

    def over(self, count: int, function: Callable[[range], torch.Tensor], description: str) -> torch.Tensor:
        """Runs over `count` positions in batches, shared among the processes.

        Args:
            count: how many positions there are.
            function: takes the positions of a batch, returns a tensor (B, ...) with a row for each.
            description: for the progress bar.

        Returns:
            (count, ...) on the CPU, the same in every process: each position once, in order.
        """
        index, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        if count < num_processes:
            raise ConfigError(f"{count} images are too few for {num_processes} processes")
        mine, size = range(index, count, num_processes), self.settings.batch_size
        batches = [mine[first : first + size] for first in range(0, len(mine), size)]
        progress = tqdm(batches, desc=description, leave=False, disable=index > 0 or len(batches) < 2)
        share = torch.cat([function(batch).detach().cpu() for batch in progress])
        shares = gather_object([share])
        rows = torch.empty(count, *share.shape[1:], dtype=share.dtype)
        for process, part in enumerate(shares):
            rows[process::num_processes] = part
        return rows

    def over_in_parts(self, count: int, function: Callable[[range], torch.Tensor], description: str) -> torch.Tensor:
        """`over` for steps that take long: every part is kept on disk, and a stopped suite goes on behind the last.

        Args:
            count, function: as for `over`.
            description: as for `over`, and the name of the step's files; unique within the suite.
        """
        results, name = [], re.sub(r"\W+", "-", description)
        for number, positions in enumerate(np.array_split(np.arange(count), -(-count // ROWS_PER_PART))):
            path = None if self.parts is None else self.parts / f"{name}-{number:05d}.safetensors"
            kept = path is not None and path.exists()
            self.accelerator.wait_for_everyone()  # no process looks after the main one has written
            if kept:
                results.append(load_file(path)["rows"])
                continue
            first = int(positions[0])

            def of_part(batch: range, first: int = first) -> torch.Tensor:
                return function(range(first + batch.start, first + batch.stop, batch.step))

            shown = description if count <= ROWS_PER_PART else f"{description}, from {first} of {count}"
            results.append(self.over(len(positions), of_part, shown))
            if path is not None and self.accelerator.is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({"rows": results[-1].contiguous()}, path.with_suffix(".tmp"))
                os.replace(path.with_suffix(".tmp"), path)
        return torch.cat(results)

    @torch.no_grad()
    def encode(self, table: ImageTable, rows: Sequence[int], description: str = "encode") -> torch.Tensor:
        """Scaled latents (len(rows), C, h, w) of some rows of a split, on the CPU."""

        def encoded(positions: range) -> torch.Tensor:
            return self.pipeline.encode(self.pixel_values(table, [rows[position] for position in positions]))

        return self.over(len(rows), encoded, description)

    @cached_property
    def latents(self) -> torch.Tensor:
        """(M, C, h, w): the evaluated images, encoded once for all suites."""
        return self.encode(self.splits.validation, self.rows)

    @cached_property
    def logits(self) -> torch.Tensor:
        """(M, K) of the evaluated images at timestep 0."""
        return self.energies_and_logits(self.latents, 0)[1]

    @torch.no_grad()
    def energies_and_logits(
        self, latents: torch.Tensor, timestep: int, noised: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Energies (M,) and logits (M, K) of latents (M, C, h, w) at one timestep; K = 0 without classes.

        Args:
            latents: clean, of any images.
            timestep: at which the network looks.
            noised: whether the latents are first brought to that noise level, with noise that is a function of
                (seed, row) alone, the same at every timestep.
        """
        device = self.accelerator.device
        alpha, sigma = self.model.noise_levels(torch.tensor(timestep, device=device))

        def rows(positions: range) -> torch.Tensor:
            batch = latents[list(positions)].to(device)
            if noised:
                batch = alpha * batch + sigma * self.noise(positions).to(batch)
            output = self.model(batch, timestep)
            return (
                output.energy[:, None]
                if output.logits is None
                else torch.cat([output.energy[:, None], output.logits], 1)
            )

        both = self.over(len(latents), rows, f"timestep {timestep}")
        return both[:, 0], both[:, 1:]

    def noise(self, positions: Sequence[int]) -> torch.Tensor:
        """(B, C, h, w) standard normal, a function of (seed, position)."""
        config, seed = self.model.config, self.settings.seed
        shape = (config.in_channels, config.sample_size, config.sample_size)
        draws = [random_stream(seed, VALIDATION_NOISE, int(p)).standard_normal(shape) for p in positions]
        return torch.from_numpy(np.stack(draws)).float()

    def with_interval(
        self,
        statistic: Callable[..., float],
        *samples: np.ndarray | torch.Tensor,
        percent: bool = False,
        strata: np.ndarray | None = None,
    ) -> Metric:
        """`bootstrapped` with this evaluation's settings."""
        arrays = [sample.numpy() if torch.is_tensor(sample) else sample for sample in samples]
        settings = self.settings
        return bootstrapped(
            statistic,
            *arrays,
            num_resamples=settings.num_resamples,
            seed=settings.seed,
            percent=percent,
            strata=strata,
        )
