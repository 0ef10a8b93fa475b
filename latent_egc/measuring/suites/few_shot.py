"""Suite `few_shot`: accuracy of frozen features with few labelled images of each class."""

from dataclasses import dataclass

import numpy as np

from latent_egc.config import ConfigError, within
from latent_egc.measuring.probe_context import ProbeContext
from latent_egc.measuring.probe_heads import fit_logistic
from latent_egc.measuring.results import Metric, SuiteResult, Table


@dataclass(frozen=True)
class Settings:
    """Accuracy with few labels; the images of the other rows are used for the features' mean and deviation alone."""

    shots: tuple[int, ...] = within((1, 5, 20, 100), 1)  # labelled images of each class
    draws: int = within(5, 1)  # of the labelled images
    c: float = within(1e-2, 1e-12)  # fixed: one image a class leaves none to choose it on


def draw_shots(labels: np.ndarray, count: int, num_classes: int, seed: int) -> np.ndarray:
    """Positions of `count` rows of each class, drawn by the seed; a smaller count draws a part of a larger one's.

    Raises:
        ConfigError: a class that has fewer.
    """
    positions = []
    for label in range(num_classes):
        own = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        if len(own) < count:
            raise ConfigError(f"few_shot.shots: {count} images a class, class {label} has {len(own)} training images")
        positions.append(own[:count])
    return np.concatenate(positions)


def run(context: ProbeContext, settings: Settings) -> SuiteResult:
    """Mean and deviation over draws of the linear probe's accuracy. Raises ConfigError: a class with too few images."""
    place, num_classes, labels = context.place, len(context.class_names), context.train_labels
    seeds = range(context.settings.seed, context.settings.seed + settings.draws)
    draws = {count: [draw_shots(labels, count, num_classes, seed) for seed in seeds] for count in settings.shots}
    train, test = (array.reshape(len(array), -1) for array in context.standardised(place))
    max_iter = context.settings.linear.max_iter
    metrics, rows = {}, []
    for count, choices in draws.items():
        models = [fit_logistic(train[chosen], labels[chosen], settings.c, max_iter) for chosen in choices]
        accuracies = [model.score(test, context.labels) for model in models]
        mean, deviation = (Metric(float(f(accuracies)), percent=True) for f in (np.mean, np.std))
        metrics[f"frozen features, {count} a class"] = mean
        rows.append([count, mean, deviation])
    columns = ["images a class", "linear probe, mean", "deviation over draws"]
    note = (
        f"Features at {place}; the penalty is fixed, the features' mean and deviation are those of all "
        f"{len(labels)} training rows, without their labels. {settings.draws} draws of the labelled images."
    )
    return SuiteResult(len(context.labels), metrics, [Table("Accuracy by images a class", columns, rows)], notes=[note])
