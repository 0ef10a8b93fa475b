"""Suite `classification`: accuracy at timestep 0, by class, and at every noise level."""

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table


def in_top_k(logits: torch.Tensor, labels: np.ndarray, k: int) -> np.ndarray:
    """(N,) 1.0 where the label is among the `k` largest logits (N, K)."""
    return (logits.topk(k, dim=1).indices == torch.from_numpy(labels)[:, None]).any(dim=1).double().numpy()


def evaluate_classification(context: EvaluationContext) -> SuiteResult:
    """Top-1 and top-5 accuracy, per class, confusion matrix, accuracy against noise level.

    Raises:
        ConfigError: a model without classes.
    """
    context.require_classes("classification")
    logits, labels, names = context.logits, context.labels, context.class_names
    correct = in_top_k(logits, labels, 1)
    metrics = {"top-1 accuracy": context.with_interval(np.mean, correct, percent=True)}
    if len(names) > 5:
        metrics["top-5 accuracy"] = context.with_interval(np.mean, in_top_k(logits, labels, 5), percent=True)
    confusion = multiclass_confusion_matrix(logits, torch.from_numpy(labels), len(names)).numpy()
    figures = [
        Figure("confusion", "Confusion matrix at timestep 0.", plots.confusion_matrix(confusion, names)),
        _noise_curve(context, metrics["top-1 accuracy"]),
    ]
    return SuiteResult(
        num_samples=len(labels),
        metrics=metrics,
        tables=[_class_table(context, confusion, correct)],
        figures=figures,
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
        recall = context.with_interval(np.mean, own, percent=True)
        predicted = confusion[:, i].sum()
        precision = Metric(confusion[i, i] / predicted, percent=True) if predicted else None
        others = np.where(np.arange(len(confusion)) == i, 0, confusion[i])
        confused = context.class_names[others.argmax()] if others.any() else None
        rows.append([name, len(own), recall, recall.interval_text, precision, confused])
    columns = ["class", "images", "accuracy (recall)", "95 % interval", "precision", "most often taken for"]
    return Table("By class", columns, rows)


def _noise_curve(context: EvaluationContext, clean: Metric) -> Figure:
    """Top-1 accuracy of noised latents at each timestep of a grid; the noise of an image is the same at all of them."""
    count, num_timesteps = context.settings.classification.num_timesteps, context.model.config.num_train_timesteps
    timesteps = np.unique(np.linspace(0, num_timesteps - 1, count).round().astype(int)).tolist()
    accuracies = []
    for timestep in timesteps:
        _, logits = context.energies_and_logits(context.latents, timestep, noised=True)
        accuracies.append(context.with_interval(np.mean, in_top_k(logits, context.labels, 1)))
    name = "noised latents"
    return Figure(
        "noise_level",
        "Accuracy of the same classifier on latents noised to each timestep, with 95 % intervals.",
        plots.lines(
            timesteps,
            {name: [metric.value for metric in accuracies]},
            "timestep",
            "top-1 accuracy",
            (0, 1.02),
            {name: tuple(zip(*(metric.interval or (metric.value,) * 2 for metric in accuracies), strict=True))},
            (clean.value, "clean latents at timestep 0"),
        ),
    )
