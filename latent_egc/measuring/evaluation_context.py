"""What the suites of an evaluation are given: the pipeline, and its energies and logits of the judged images."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.autoencoders import fingerprint
from latent_egc.data.sources import ImageTable
from latent_egc.data.stream import VALIDATION_NOISE
from latent_egc.measuring.context import StudyContext, noise_of_rows
from latent_egc.measuring.settings import StudySettings
from latent_egc.models.noise_schedule import add_noise
from latent_egc.pipelines import EGCPipeline


class EvaluationContext(StudyContext):
    """A pipeline, the images it is judged on, and the settings.

    Args:
        pipeline: on the accelerator's device.
        data: the dataset; its `image_size` gives way to the pipeline's. The validation split is evaluated.
        settings: of the evaluation.
        accelerator: the processes that share the work.

    Raises:
        ConfigError: the dataset cannot be used with this pipeline.
    """

    def __init__(
        self, pipeline: EGCPipeline, data: DataConfig, settings: StudySettings, accelerator: Accelerator
    ) -> None:
        self.pipeline, self.model = pipeline, pipeline.energy_model
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
    def num_classes(self) -> int | None:
        """K, None for an unlabelled model."""
        return self.model.config.num_classes

    @property
    def fingerprint(self) -> str:
        """See `StudyContext.fingerprint`."""
        return f"{fingerprint(self.model)} with {fingerprint(self.pipeline.vae)}"

    def identity(self) -> dict[str, Any]:
        """See `StudyContext.identity`; before this entry stood in reports, noise was drawn by an image's position."""
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
