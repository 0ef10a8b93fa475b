"""What the suites of every study are given: the images, and a way to run over them on all processes."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from latent_egc.atomic import replace_file
from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.autoencoders import fingerprint
from latent_egc.data.sources import ImageTable, load_splits
from latent_egc.data.stream import VALIDATION_NOISE, random_stream
from latent_egc.data.views import central_view
from latent_egc.measuring.meaning import data_meaning
from latent_egc.measuring.results import Metric, bootstrapped
from latent_egc.measuring.settings import StudySettings
from latent_egc.models.noise_schedule import add_noise
from latent_egc.pipelines import EGCPipeline

ROWS_PER_PART = 1000


def pixel_values(table: ImageTable, rows: Sequence[int], image_size: int) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] on the CPU: the centre crops of some rows of a split."""
    return torch.stack([central_view(table.image(int(row)), image_size) for row in rows])


def noise_of_rows(
    seed: int, purpose: int, rows: Sequence[int], shape: tuple[int, int, int], dtype: type = np.float32
) -> torch.Tensor:
    """(B, C, h, w) float32, standard normal: each image's is a function of (seed, purpose, row of its split) alone.

    Args:
        seed, purpose: of the stream, see `random_stream`.
        rows: (B,) in the split.
        shape: (C, h, w).
        dtype: in which numpy draws; another one gives other numbers.
    """
    draws = [random_stream(seed, purpose, int(row)).standard_normal(shape, dtype=dtype) for row in rows]
    return torch.from_numpy(np.stack(draws)).float()


def chosen_rows(rows: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """`count` of the rows, drawn by the seed and in ascending order; all of them for None or a larger count."""
    if count is None or count >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


class StudyContext:
    """The images of a study, its settings, and the processes that share the work.

    Args:
        network: what is studied.
        image_size: its images' height and width; that of `data` gives way to it.
        data: the dataset. The validation split is judged.
        num_classes: as `load_splits` takes it.
        settings, accelerator: of the study, and the processes.

    Attributes:
        class_names: the dataset's, in the order of their ids; empty where labels play no part.
        rows, labels: (M,), the judged rows of the validation split, and their labels.
        parts: where the running suite keeps the parts of its long steps until it is finished; None: nowhere.

    Raises:
        ConfigError: the dataset cannot be used.
    """

    runs_on_all_processes = True  # whether they share each suite's steps; else suites are the main process's
    fewest_images = 1

    def __init__(
        self,
        network: ModelMixin,
        image_size: int,
        data: DataConfig,
        num_classes: int | Literal["any"] | None,
        settings: StudySettings,
        accelerator: Accelerator,
    ) -> None:
        self.network, self.image_size = network, image_size
        self.settings, self.accelerator = settings, accelerator
        self.parts: Path | None = None
        self.data = dataclasses.replace(data, image_size=image_size)
        self.splits = load_splits(self.data, num_classes)
        self.class_names = self.splits.class_names
        self.rows = self.rows_of(self.splits.validation, settings.num_images)
        self.labels = self.splits.validation.labels[self.rows]

    def rows_of(self, table: ImageTable, count: int | None) -> np.ndarray:
        """`count` of a split's rows, of the labelled ones where there are classes, less corrupt ones if they may be.

        Raises ConfigError: too few.
        """
        rows = np.flatnonzero(table.labels >= 0) if self.class_names else np.arange(len(table))
        rows = self.readable(table, self.choose(rows, count), self.data.skip_corrupt)
        if len(rows) < self.fewest_images:
            raise ConfigError(
                f"{len(rows)} labelled images of the {table.name} split, at least {self.fewest_images} are needed"
            )
        return rows

    @property
    def fingerprint(self) -> str:
        """Another value means that something else is studied."""
        raise NotImplementedError

    def subject(self, name: str) -> dict[str, Any]:
        """What a report says it is of."""
        return {
            "pipeline": name,
            "fingerprint": self.fingerprint,
            "parameters": f"{sum(p.numel() for p in self.network.parameters()):,}",
            "images": f"{self.image_size} x {self.image_size} px",
            "dataset": f"{self.data.dataset}, validation split",
            "device": f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}",
        }

    def identity(self) -> dict[str, Any]:
        """What every suite's numbers depend on besides its settings: plain values."""
        return {"data": data_meaning(dataclasses.asdict(self.data))}

    def prepare(self, suites: Sequence[str]) -> None:
        """What all processes do together before these suites run."""

    def choose(self, rows: np.ndarray, count: int | None) -> np.ndarray:
        """`chosen_rows` by the study's seed."""
        return chosen_rows(rows, count, self.settings.seed)

    def readable(self, table: ImageTable, rows: np.ndarray, skip_corrupt: bool) -> np.ndarray:
        """The rows of a split, less those of corrupt images where `skip_corrupt`, with a warning that counts them.

        They are all decoded for it, as every suite must see the same rows; for every process to call.
        """
        if not skip_corrupt or len(rows) == 0:
            return rows

        def whole(positions: range) -> torch.Tensor:
            return torch.tensor([table.is_readable(int(rows[position])) for position in positions])

        kept = rows[self.over(len(rows), whole, "look for corrupt images").numpy()]
        if len(kept) < len(rows):
            skipped = sorted({*rows.tolist()}.difference(kept.tolist()))
            warnings.warn(
                f"skipped {len(skipped)} corrupt images of the {table.name} split, the first is row {skipped[0]}",
                stacklevel=2,
            )
        return kept

    def pixel_values(self, table: ImageTable, rows: Sequence[int]) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] on the device: the centre crops of some rows of a split."""
        return pixel_values(table, rows, self.image_size).to(self.accelerator.device)

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
                part = {"rows": results[-1].contiguous()}
                replace_file(path, lambda unfinished, part=part: save_file(part, unfinished))
        return torch.cat(results)

    def with_interval(
        self, statistic: Callable[..., float], *samples: np.ndarray | torch.Tensor, **options: Any
    ) -> Metric:
        """`bootstrapped` with this study's settings; options are its `percent` and `strata`."""
        arrays = [sample.numpy() if torch.is_tensor(sample) else sample for sample in samples]
        num_resamples, seed = self.settings.num_resamples, self.settings.seed
        return bootstrapped(statistic, *arrays, num_resamples=num_resamples, seed=seed, **options)

    def accuracy(self, correct: np.ndarray) -> Metric:
        """The mean of (M,) shares, zeros and ones for example, with its interval, as a percentage."""
        return self.with_interval(np.mean, correct.astype(float), percent=True)


class EvaluationContext(StudyContext):
    """A pipeline, the images it is judged on, and the settings.

    Args:
        pipeline: on the accelerator's device.
        data: the dataset; its `image_size` gives way to the pipeline's. The validation split is evaluated.
        settings, accelerator: as for `StudyContext`.

    Attributes:
        num_classes: K, None for an unlabelled model.

    Raises:
        ConfigError: the dataset cannot be used with this pipeline.
    """

    def __init__(
        self, pipeline: EGCPipeline, data: DataConfig, settings: StudySettings, accelerator: Accelerator
    ) -> None:
        self.pipeline, self.model = pipeline, pipeline.energy_model
        self.num_classes: int | None = self.model.config.num_classes
        super().__init__(self.model, pipeline.image_size, data, self.num_classes, settings, accelerator)
        expected = [name for _, name in sorted(pipeline.id2label.items())]
        if self.class_names != expected:
            pairs = zip(self.class_names, expected, strict=False)
            first = next((i for i, (name, wanted) in enumerate(pairs) if name != wanted), 0)
            raise ConfigError(
                f"the dataset's classes are not the pipeline's (id2label): class {first} is "
                f"{self.class_names[first]!r} in the data and {expected[first]!r} in the pipeline"
            )

    @property
    def fingerprint(self) -> str:
        return f"{fingerprint(self.model)} with {fingerprint(self.pipeline.vae)}"

    def identity(self) -> dict[str, Any]:
        # Before this entry stood in reports, noise was drawn by an image's position.
        return super().identity() | {"noise": "by seed and row"}

    def require_classes(self, suite: str) -> None:
        """Raises ConfigError for a model that cannot classify."""
        if self.num_classes is None:
            raise ConfigError(f"--suite {suite} needs classes, this pipeline was trained without")

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
        self, latents: torch.Tensor, timestep: int, noise_rows: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Energies (M,) and logits (M, K) of latents (M, C, h, w) at one timestep; K = 0 without classes.

        Args:
            latents: clean, of any images.
            timestep: at which the network looks.
            noise_rows: (M,), the latents' rows in their split, whose noise first brings them to that noise level; it is
                the same at every timestep. None: they stay clean.
        """
        device = self.accelerator.device

        def both_of(positions: range) -> torch.Tensor:
            batch = latents[list(positions)].to(device)
            if noise_rows is not None:
                batch = self.noised(batch, noise_rows[list(positions)], timestep)
            output = self.model(batch, timestep)
            energy = output.energy[:, None]
            return energy if output.logits is None else torch.cat([energy, output.logits], dim=1)

        both = self.over(len(latents), both_of, f"timestep {timestep}")
        return both[:, 0], both[:, 1:]

    def noised(self, latents: torch.Tensor, rows: Sequence[int], timestep: int) -> torch.Tensor:
        """Latents (B, C, h, w) on the device, brought to a timestep's noise level by the noise of their rows."""
        levels = self.model.noise_levels(torch.tensor(timestep, device=latents.device))
        return add_noise(latents, self.noise(rows).to(latents), levels)

    def noise(self, rows: Sequence[int]) -> torch.Tensor:
        """(B, C, h, w) standard normal, a function of (seed, row of the split)."""
        config = self.model.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        return noise_of_rows(self.settings.seed, VALIDATION_NOISE, rows, shape, np.float64)
