"""What every study may be told; what a suite may be told besides stands in the suite's file, as its section.

Given on the command line as `--set num_images=500 classification.num_timesteps=10`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from latent_egc.config import apply_overrides, parse_dataclass, within


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


def with_sections(name: str, settings: type[StudySettings], suites: Mapping[str, ModuleType]) -> type[StudySettings]:
    """A class of settings that has, besides its own, a section for each suite that has any."""
    sections = [(key, suite.Settings, suite.Settings()) for key, suite in suites.items() if suite.Settings is not None]
    return dataclasses.make_dataclass(name, sections, bases=(settings,), frozen=True)
