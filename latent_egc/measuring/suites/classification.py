"""Suite `classification`: accuracy at timestep 0, by class, and at every noise level."""

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from latent_egc.config import within
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Curves, Figure, Metric, SuiteResult, Table


@dataclass(frozen=True)
class Settings:
    """Accuracy at timestep 0, and against the noise level."""

    num_timesteps: int = within(20, 2)  # points of the noise curve, evenly over [0, T)


def in_top_k(logits: torch.Tensor, labels: np.ndarray, k: int) -> np.ndarray:
    """(N,) 1.0 where the label is among the `k` largest logits (N, K)."""
    return (logits.topk(k, dim=1).indices == torch.from_numpy(labels)[:, None]).any(dim=1).double().numpy()


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Top-1 and top-5 accuracy, per class, confusion matrix, accuracy against noise level.

    Raises:
        ConfigError: a model without classes.
    """
    context.require_classes("classification")
    logits, labels, names = context.logits, context.labels, context.class_names
    correct = in_top_k(logits, labels, 1)
    metrics = {"top-1 accuracy": context.accuracy(correct)}
    if len(names) > 5:
        metrics["top-5 accuracy"] = context.accuracy(in_top_k(logits, labels, 5))
    confusion = multiclass_confusion_matrix(logits, torch.from_numpy(labels), len(names)).numpy()
    matrix = Figure("confusion", "Confusion matrix at timestep 0.", plots.confusion_matrix(confusion, names))
    return SuiteResult(
        num_samples=len(labels),
        metrics=metrics,
        tables=[_class_table(context, confusion, correct)],
        figures=[matrix, _noise_curve(context, settings, metrics["top-1 accuracy"])],
        notes=["Logits are those of clean latents (the posterior's mean) at timestep 0, the published convention."],
    )


def _class_table(context: EvaluationContext, confusion: np.ndarray, correct: np.ndarray) -> Table:
    """Recall with its interval, precision and the most frequent confusion of every class."""
    rows = []
    for i, name in enumerate(context.class_names):
        own = correct[context.labels == i]
        if len(own) == 0:
            rows.append([name, 0, None, None, None, None])
            continue
        recall = context.accuracy(own)
        predicted = confusion[:, i].sum()
        precision = Metric(confusion[i, i] / predicted, percent=True) if predicted else None
        others = np.where(np.arange(len(confusion)) == i, 0, confusion[i])
        confused = context.class_names[others.argmax()] if others.any() else None
        rows.append([name, len(own), recall, recall.interval_text, precision, confused])
    columns = ["class", "images", "accuracy (recall)", "95 % interval", "precision", "most often taken for"]
    return Table("By class", columns, rows)


def _noise_curve(context: EvaluationContext, settings: Settings, clean: Metric) -> Figure:
    """Top-1 accuracy of noised latents at each timestep of a grid; the noise of an image is the same at all of them."""
    last = context.model.config.num_train_timesteps - 1
    timesteps = np.unique(np.linspace(0, last, settings.num_timesteps).round().astype(int)).tolist()
    accuracies = []
    for timestep in timesteps:
        _, logits = context.energies_and_logits(context.latents, timestep, context.rows)
        accuracies.append(context.with_interval(np.mean, in_top_k(logits, context.labels, 1)))
    series, level = {"noised latents": accuracies}, (clean.value, "clean latents at timestep 0")
    return Figure(
        "noise_level",
        "Accuracy of the same classifier on latents noised to each timestep, with 95 % intervals.",
        plots.lines(timesteps, series, "timestep", "top-1 accuracy", (0, 1.02), level),
        curves=(Curves("timestep", "top-1 accuracy", {"": (timesteps, accuracies)}),),
    )
