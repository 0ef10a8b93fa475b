"""Suite `calibration`: do the probabilities mean what they say, before and after temperature scaling?

The temperature (Guo et al., ICML 2017) is fitted on one part of the images; every number is of the other part.
"""

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from latent_egc.config import ConfigError, within
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Curves, Figure, Metric, SuiteResult


@dataclass(frozen=True)
class Settings:
    """Calibration before and after temperature scaling."""

    num_bins: int = within(15, 1)  # of equal width, for the expected calibration error and the diagram
    fit_fraction: float = within(0.5, 0.01, 0.99)  # share of the images that the temperature is fitted on


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats."""
    return float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over images of the squared distance between probabilities and the one-hot label, in [0, 2]."""
    probabilities = torch.from_numpy(logits).softmax(dim=1)
    one_hot = F.one_hot(torch.from_numpy(labels), logits.shape[1])
    return float((probabilities - one_hot).square().sum(dim=1).mean())


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, num_bins: int) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by their images."""
    probabilities = torch.from_numpy(logits).softmax(dim=1)
    return float(multiclass_calibration_error(probabilities, torch.from_numpy(labels), logits.shape[1], num_bins))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T for which softmax(logits / T) has the lowest negative log likelihood, within [0.01, 100]."""
    found = scipy.optimize.minimize_scalar(
        lambda log_temperature: negative_log_likelihood(logits / np.exp(log_temperature), labels),
        bounds=(np.log(0.01), np.log(100)),
        method="bounded",
    )
    return float(np.exp(found.x))


def reliability_bins(logits: np.ndarray, labels: np.ndarray, num_bins: int) -> tuple[np.ndarray, ...]:
    """Mean confidence, accuracy and number of images (num_bins,) of each confidence bin; NaN in an empty one."""
    confidence, predicted = torch.from_numpy(logits).softmax(dim=1).max(dim=1)
    confidence, correct = confidence.numpy(), (predicted.numpy() == labels)
    numbers = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    count = np.bincount(numbers, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(numbers, weights=w, minlength=num_bins) / count for w in (confidence, correct)]
    return means[0], means[1], count


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """NLL, Brier score, ECE and reliability diagram, before and after temperature scaling.

    Raises:
        ConfigError: a model without classes, or too few images to hold some out.
    """
    context.require_classes("calibration")
    labels = context.labels
    order = np.random.default_rng(context.settings.seed).permutation(len(labels))
    num_fitted = round(settings.fit_fraction * len(labels))
    if not 0 < num_fitted < len(labels):
        raise ConfigError(
            f"calibration.fit_fraction={settings.fit_fraction} of {len(labels)} images leaves {num_fitted} to fit the "
            f"temperature and {len(labels) - num_fitted} to judge it"
        )
    fitted, judged = order[:num_fitted], order[num_fitted:]
    logits = context.logits.double().numpy()
    temperature = fit_temperature(logits[fitted], labels[fitted])

    scores = {
        "NLL (nats)": negative_log_likelihood,
        "Brier score": brier_score,
        f"ECE ({settings.num_bins} bins)": lambda x, y: expected_calibration_error(x, y, settings.num_bins),
    }
    variants = {"as trained": logits[judged], "temperature scaled": logits[judged] / temperature}
    metrics = {
        f"{name}, {variant}": context.with_interval(score, values, labels[judged])
        for name, score in scores.items()
        for variant, values in variants.items()
    }
    bins = {title: reliability_bins(values, labels[judged], settings.num_bins) for title, values in variants.items()}
    diagram = plots.reliability_diagram(np.linspace(0, 1, settings.num_bins + 1), bins)
    series = {}
    for title, (confidence, accuracy, count) in bins.items():
        series[title] = (confidence[count > 0].tolist(), accuracy[count > 0].tolist())
    curves = (Curves("confidence", "accuracy", series, aims_at_diagonal=True),)
    caption = "Reliability: accuracy of the images in each bin of confidence."
    notes = [
        f"The temperature was fitted on {num_fitted} images of the validation split, the numbers are of the other "
        f"{len(judged)}; the intervals hold it fixed.",
        "A resample of few images has a larger ECE than the images themselves: its interval lies too high.",
    ]
    if (logits[fitted].argmax(axis=1) == labels[fitted]).all():
        notes.append(
            f"All {num_fitted} images that the temperature was fitted on are classified correctly. Their likelihood "
            "only rises as the temperature falls, so it has no optimum: do not use it."
        )
    return SuiteResult(
        num_samples=len(judged),
        metrics=metrics | {"temperature": Metric(temperature)},
        figures=[Figure("reliability", caption, diagram, curves=curves)],
        notes=notes,
    )
