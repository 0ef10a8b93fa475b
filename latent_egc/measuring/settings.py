"""What every study and every probe may be told; what a suite may be told besides stands in its file, as its section.

Given on the command line as `--set num_images=500 classification.num_timesteps=10`.

A probe's feature cache takes, for each timestep, rows x (the sum of the blocks' channels) x max(poolings)^2 x 2 bytes
(4 in float32): 1.3 GB for 5,000 rows of the imagenette64 network at 6 timesteps and 4 x 4. A suite reads one block at
one timestep into memory at a time, as float32; `fusion` reads those that it joins.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from latent_egc.config import ConfigError, apply_overrides, parse_dataclass, within
from latent_egc.measuring.probe_heads import LinearSettings


@dataclass(frozen=True)
class StudySettings:
    """One study: the settings of all suites; `with_sections` adds those of each."""

    seed: int = within(0, 0, 2**32 - 1)  # of the resampling and of every choice of images; evaluation: of the noise too
    num_images: int | None = within(None, 1)  # judged validation images, drawn by the seed; null: all of them
    batch_size: int = within(64, 1)  # images in one forward pass
    num_resamples: int = within(1000, 10)  # of the bootstrap behind each confidence interval

    @classmethod
    def parse(cls, overrides: Sequence[str] = ()) -> "StudySettings":
        """Settings from overrides of the defaults, "KEY.SUB=VALUE".

        Raises:
            ConfigError: an unknown key (with a suggestion), a wrong type, a value out of range, or settings that
                contradict each other.
        """
        values: dict[str, Any] = {}
        apply_overrides(values, overrides)
        settings = parse_dataclass(cls, values, "")
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ConfigError for settings that contradict each other."""

    def of_suite(self, suite: str, *others: str) -> dict[str, Any]:
        """The plain values that a suite's result depends on: those of all suites, its section and the named others."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if not isinstance(v, dict) or k in (suite, *others)}


@dataclass(frozen=True)
class PlaceSettings(StudySettings):
    """Which features are taken, and from which of them a suite's block, timestep and pooling are chosen.

    The sections `heatmap`, `heads`, ... that are read here are added to it by `with_sections`.
    """

    noise_seed: int = within(0, 0, 2**32 - 1)  # an image's noise is a function of it and of the row
    num_train_images: int | None = within(None, 2)  # labelled training rows, drawn by the seed; null: all
    timesteps: tuple[int, ...] = within((0, 30, 90, 150, 300, 500), 0)
    blocks: tuple[str, ...] | None = None  # null: all of the network
    poolings: tuple[int, ...] = within((1, 2, 4), 1)  # maps averaged to p x p; all must divide the largest
    dtype: Literal["float16", "float32"] = "float16"  # of the features on disk
    block: str | None = None  # where heads, few_shot, ... look; null: the best of the heat map
    timestep: int | None = within(None, 0)  # likewise
    pooling: int | None = within(None, 1)  # null: the best at that block and timestep
    linear: LinearSettings = field(default_factory=LinearSettings)

    def of_suite(self, suite: str, *others: str) -> dict[str, Any]:
        """As `StudySettings.of_suite`; the heat map of linear probes chooses every suite's place."""
        # DifFormer and DifFeed are trained as the heads are.
        return super().of_suite(suite, "linear", "heatmap", *(["heads"] if suite == "fusion" else []), *others)

    def check(self) -> None:
        """Raises ConfigError for an empty list, and for a choice that is not among what is measured."""
        lists = ("timesteps", "poolings", "linear.c", "few_shot.shots", "fusion.blocks", "fusion.timesteps", "blocks")
        for key in lists:
            if operator.attrgetter(key)(self) == ():
                raise ConfigError(f"{key} must not be empty")
        largest = max(self.poolings)
        for p in self.poolings:
            if largest % p:
                raise ConfigError(f"poolings must all divide the largest, got {p} beside {largest}")
        for key in ("heatmap.pooling", "cka.pooling", "pooling"):
            p = operator.attrgetter(key)(self)
            if p is not None and p not in self.poolings:
                raise ConfigError(f"{key} must be one of poolings={list(self.poolings)}, got {p}")
        for key, steps in (("timestep", (self.timestep,)), ("fusion.timesteps", self.fusion.timesteps or ())):
            for t in steps:
                if t is not None and t not in self.timesteps:
                    raise ConfigError(f"{key} must be of timesteps={list(self.timesteps)}, got {t}")
        if self.heads.width % 4:
            raise ConfigError(f"heads.width must be divisible by 4, the attention's heads, got {self.heads.width}")


def with_sections(name: str, settings: type[StudySettings], suites: Mapping[str, ModuleType]) -> type[StudySettings]:
    """A class of settings that has, besides its own, a section for each suite that has any."""
    sections = [(key, suite.Settings, suite.Settings()) for key, suite in suites.items() if suite.Settings is not None]
    return dataclasses.make_dataclass(name, sections, bases=(settings,), frozen=True)
