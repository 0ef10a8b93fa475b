"""What the suites of a probe are given: features, labels, and the block, timestep and pooling to look at."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from tqdm.auto import tqdm

from latent_egc.atomic import replace_text
from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.latent_cache import content_digest
from latent_egc.measuring.context import StudyContext
from latent_egc.measuring.denoisers import Denoiser
from latent_egc.measuring.feature_cache import FeatureCache, Rows
from latent_egc.measuring.meaning import data_meaning
from latent_egc.measuring.probe_heads import ProbeScore, linear_probe, standardised
from latent_egc.measuring.results import Metric
from latent_egc.measuring.settings import PlaceSettings

CHOICE_NOTE = (
    "Every choice (penalty, block, timestep, pooling) is made on held-out rows of the training split; accuracies are "
    "those of the validation split. A network that was itself trained on these training rows with their labels knows "
    "the held-out ones too: then the choice, not the accuracy, is optimistic."
)


@dataclass(frozen=True)
class Place:
    """Where features are taken."""

    block: str
    timestep: int
    pooling: int

    def __str__(self) -> str:
        return f"{self.block}, timestep {self.timestep}, {self.pooling} x {self.pooling}"


class ProbeContext(StudyContext):
    """A denoiser, the images it is probed with, and the settings.

    Args:
        denoiser: whose features; on the accelerator's device.
        data: the dataset; its `image_size` gives way to the denoiser's. Heads train on its training split and are
            judged on its validation split.
        settings: of the probe.
        accelerator: the processes that compute the features together.
        folder: for the feature cache.

    Attributes:
        train_labels: (N,) of the training rows.
        cache: the features.

    Raises:
        ConfigError: a dataset without labels, or settings that do not fit the denoiser.
    """

    runs_on_all_processes = False
    fewest_images = 2  # a probe fits and holds out

    def __init__(
        self, denoiser: Denoiser, data: DataConfig, settings: PlaceSettings, accelerator: Accelerator, folder: Path
    ) -> None:
        super().__init__(denoiser.network, denoiser.image_size, data, "any", settings, accelerator)
        self.denoiser = denoiser
        train = Rows(self.splits.train, self.rows_of(self.splits.train, settings.num_train_images))
        self.train_labels = self.splits.train.labels[train.rows]
        meaning = data_meaning(dataclasses.asdict(self.data))
        meaning.pop("skip_corrupt")  # the rows themselves are in the cache's record
        identity = {"data": meaning, "content": content_digest(self.splits)}
        splits = {"train": train, "validation": Rows(self.splits.validation, self.rows)}
        self.cache = FeatureCache(folder, denoiser, splits, settings, identity)
        for key, name in (("block", settings.block), *(("fusion.blocks", b) for b in settings.fusion.blocks or ())):
            if name is not None and name not in self.cache.blocks:
                raise ConfigError(f"{key}: {name!r} is not among the blocks {', '.join(self.cache.blocks)}")

    @property
    def fingerprint(self) -> str:
        return self.denoiser.fingerprint

    def prepare(self, suites: Sequence[str]) -> None:
        """Computes the features that these suites read."""
        if suites:
            self.cache.extract(self.timesteps_of(suites), self.accelerator)

    def features(self, split: str, place: Place) -> np.ndarray:
        """(N, D, p, p) float32."""
        return self.cache.features(split, place.timestep, place.block, place.pooling)

    def standardised(self, place: Place) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation features (N, D, p, p) with the training features' mean 0 and deviation 1."""
        return tuple(standardised(self.features("train", place), self.features("validation", place)))

    def probe(self, place: Place) -> tuple[ProbeScore, np.ndarray]:
        """The linear probe there: its score and its predictions of the validation rows."""
        train, validation = self.features("train", place), self.features("validation", place)
        config, seed = self.settings.linear, self.settings.seed
        return linear_probe(train, self.train_labels, validation, self.labels, config, seed)

    def score(self, place: Place) -> ProbeScore:
        """The linear probe's score, remembered on disk: a killed heat map goes on behind its last cell."""
        values = json.dumps([dataclasses.asdict(self.settings.linear), self.settings.seed])
        path = self.cache.folder / f"scores_{hashlib.sha256(values.encode()).hexdigest()[:8]}.json"
        try:
            scores = dict(json.loads(path.read_text())) if path.exists() else {}
        except (ValueError, TypeError) as error:
            warnings.warn(f"{path} is damaged, its scores are computed anew: {error}", stacklevel=2)
            scores = {}
        if str(place) not in scores:
            scores[str(place)] = dataclasses.asdict(self.probe(place)[0])
            replace_text(path, json.dumps(scores, indent=1))
        return ProbeScore(**scores[str(place)])

    @cached_property
    def scores(self) -> dict[Place, ProbeScore]:
        """The heat map: every block at every timestep, at `heatmap.pooling`."""
        p = self.settings.heatmap.pooling
        places = [Place(b, t, p) for t in self.settings.timesteps for b in self.cache.blocks]
        return {place: self.score(place) for place in tqdm(places, desc="linear probes", leave=False)}

    @cached_property
    def poolings(self) -> dict[Place, ProbeScore]:
        """The pooling curve, at the chosen block and timestep; poolings above the map's size are left out."""
        where = self._block_and_timestep
        largest = self.cache.stored_pooling(where.timestep, where.block)
        places = [dataclasses.replace(where, pooling=p) for p in sorted(self.settings.poolings) if p <= largest]
        return {place: self.score(place) for place in places}

    @cached_property
    def _block_and_timestep(self) -> Place:
        """As set, or the best of the heat map on held-out training rows."""
        settings = self.settings
        if settings.block is not None and settings.timestep is not None:
            return Place(settings.block, settings.timestep, settings.heatmap.pooling)
        allowed = [
            p for p in self.scores if settings.block in (None, p.block) and settings.timestep in (None, p.timestep)
        ]
        return best({place: self.scores[place] for place in allowed})

    @cached_property
    def place(self) -> Place:
        """The block, timestep and pooling that the other suites look at."""
        if self.settings.pooling is not None:
            return dataclasses.replace(self._block_and_timestep, pooling=self.settings.pooling)
        return best(self.poolings)

    def timesteps_of(self, suites: Sequence[str]) -> list[int]:
        """The timesteps whose features these suites read."""
        settings, everywhere = self.settings, {"heatmap", "fusion", "cka"}
        if settings.block is None or settings.timestep is None or everywhere.intersection(suites):
            return list(settings.timesteps)
        return [settings.timestep]

    def accuracy_of(self, score: ProbeScore) -> Metric:
        """A score's accuracy with its interval, which depends on the number of correct images alone."""
        return self.accuracy(np.arange(len(self.labels)) < round(score.accuracy * len(self.labels)))


def best(scores: dict[Place, ProbeScore]) -> Place:
    """The place with the highest accuracy on held-out training rows, the first of equals."""
    return max(scores, key=lambda place: scores[place].held_out)
