"""Do unlabelled images help to classify? Some training images keep their label, the rest is unlabelled.

    python experiments/few_labels.py digits          (about 35 minutes on one CPU core)
    python experiments/few_labels.py imagenette      (about 3 hours on one CPU core; 5 minutes a run on an H200)

Where it was stopped it goes on; calls with other `--seeds` train side by side, and one without prints them all. The
classifiers see the same labels, drawn anew for each seed:

- an energy network trained on all images, of which only some are labelled; these fill half of each batch on average,
  for otherwise most batches would hold none;
- the same network, steps and batches with the labelled images alone;
- on digits, scikit-learn's SVC on the 8x8 pixels of the labelled images;
- on digits, scikit-learn's LabelSpreading on the 8x8 pixels of all images.

Writes a plot and prints the table of docs/few_labels.md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from compare_objectives import markdown, mean_and_range
from finished_runs import is_trained
from matplotlib.ticker import PercentFormatter
from sklearn.semi_supervised import LabelSpreading
from sklearn.svm import SVC

from latent_egc.config import Config, load_config
from latent_egc.data.autoencoders import load_autoencoder
from latent_egc.data.encoding import encode
from latent_egc.data.latent_cache import CachedViews
from latent_egc.data.sources import ImageTable, load_splits
from latent_egc.data.views import keep_labels
from latent_egc.training.build import Data, build_data
from latent_egc.training.checkpoints import read_metrics
from latent_egc.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "few_labels"


class Task(NamedTuple):
    """A dataset with some of its labels."""

    config: str  # its recipe
    overrides: Sequence[str]
    shares: Sequence[float]  # of the labels that are kept, of each class
    seeds: Sequence[int]
    plot: str  # under docs/
    on_pixels: bool = False  # also classifiers on pixels, for images of one small size


TASKS = {
    # The quickstart's data, with more augmentations of each image.
    "digits": Task(
        "digits",
        [
            "data.num_views=16",
            "model={backbone: transformer, sample_size: 8, in_channels: 4, num_classes: 10, width: 64, num_layers: 4, "
            "num_attention_heads: 4}",
            *("objective.classification_weight=0.1", "training.max_steps=1000", "training.train_batch_size=32"),
            *("training.learning_rate=2e-3", "training.lr_schedule=cosine", "training.warmup_steps=50"),
            "training.ema_decay=0.99",
        ],
        shares=(10 / 1437, 30 / 1437, 100 / 1437),
        seeds=(0, 1, 2),
        plot="few_labels.png",
        on_pixels=True,
    ),
    "imagenette": Task(
        "one_or_two",
        [],
        shares=(0.05, 0.2),
        seeds=(0, 1),
        plot="few_labels_imagenette.png",
    ),
}
METHODS = {
    "all": "energy network, all images",
    "labelled": "energy network, labelled images alone",
    "SVC": "SVC on pixels, labelled images alone",
    "LabelSpreading": "LabelSpreading on pixels, all images",
}


def trained(config: Config, data: Data, images: np.ndarray, labels: np.ndarray, weight: float) -> float:
    """Trains a network, or reads the one that is there: the accuracy of its averaged weights on the validation split.

    Args:
        config: the run's. Its seed is that of the initialisation, the order, the views, the timesteps and the noise.
        data: the latent cache's two splits.
        images: (M,) numbers of training images, one M-th of the stream each; an image may come more than once.
        labels: (M,) theirs, -1 = unlabelled.
        weight: of the classification loss, as in `EGCObjective`; its mean is over all rows, and unlabelled ones add 0.
    """
    views = CachedViews(data.train.rows.select(images), config.training.seed)
    views.labels = labels
    config = replace(config, objective=replace(config.objective, classification_weight=weight))
    if not is_trained(config):
        train(config, data=replace(data, train=views))
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [row["validation_accuracy"] for row in rows if "validation_accuracy" in row][-1]


def accuracies(task: Task, overrides: Sequence[str], folder: Path, share: float, seed: int) -> tuple[int, dict]:
    """How many labels are kept, and each method's accuracy with them."""

    def run_config(method: str) -> Config:
        training = ["training.resume=auto", "training.trackers=[]", f"training.seed={seed}"]
        grid = ["sampling.num_inference_steps=1", "sampling.num_images_per_label=1"]
        cache, run = f"data.latent_cache={folder / 'latents'}", f"output_dir={folder / f'{method}-{share:.3g}-{seed}'}"
        path = ROOT / "configs" / f"{task.config}.yaml"
        return load_config(path, [cache, *grid, *task.overrides, *overrides, *training, run])

    config = run_config("all")
    num_classes, weight = config.model["num_classes"], config.objective.classification_weight
    encode(config.data, config.autoencoder, num_classes)
    data = build_data(config.data, load_autoencoder(config.autoencoder), num_classes, seed=0)
    labels = keep_labels(data.train.labels, share, seed)
    (kept,) = np.nonzero(labels >= 0)
    # All images once, and the labelled ones as often as gives them half of the stream; the weight is doubled because
    # the other half adds nothing to the classification loss.
    half = np.concatenate([np.arange(len(labels)), np.resize(kept, len(labels) - 2 * len(kept))])
    found = {
        "all": trained(config, data, half, labels[half], 2 * weight),
        "labelled": trained(run_config("labelled"), data, kept, labels[kept], weight),
    }
    if task.on_pixels:
        splits = load_splits(config.data, num_classes)
        pixels, of_validation = (_pixels(split) for split in (splits.train, splits.validation))
        svc, spreading = SVC().fit(pixels[kept], labels[kept]), LabelSpreading("knn").fit(pixels, labels)
        found["SVC"] = svc.score(of_validation, splits.validation.labels)
        found["LabelSpreading"] = spreading.score(of_validation, splits.validation.labels)
    return len(kept), found


def _pixels(images: ImageTable) -> np.ndarray:
    """(M, h w) in [0, 1]."""
    return np.stack([np.asarray(images.image(i).convert("L")).ravel() / 255 for i in range(len(images))])


def table(found: dict[int, dict[str, list[float]]]) -> str:
    """Markdown: the mean over the seeds, and in brackets the smallest and the largest."""
    lines = [["", *(f"{number:,} labels" for number in found)]]
    for method in next(iter(found.values())):
        lines.append([METHODS[method], *(mean_and_range(values[method], ".1%") for values in found.values())])
    return markdown(lines)


def plot(found: dict[int, dict[str, list[float]]], path: Path) -> None:
    """Lines through the means, a point for each seed."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    styles = ("C0-", "C0--", "C1--", "C1-")  # the networks in one colour; dashed without the unlabelled images
    numbers = np.array(list(found))
    for number, (style, method) in enumerate(zip(styles, next(iter(found.values())), strict=False)):
        values = [values[method] for values in found.values()]
        positions = numbers * 1.025 ** (number - 1.5)  # side by side, so that equal values stay visible
        axes.plot(positions, np.mean(values, axis=1), style, label=METHODS[method])
        axes.plot(positions, values, style[:2] + "o", alpha=0.5, markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("labels in all")
    axes.set_ylabel("accuracy on held-out images")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="of all runs")
    parser.add_argument("--folder", type=Path, help="for the runs (default runs/few_labels/TASK)")
    parser.add_argument("--seeds", type=int, nargs="+", help="some of them; nothing is drawn then")
    options = parser.parse_intermixed_args()
    task, folder = TASKS[options.task], options.folder or FOLDER / options.task
    found: dict[int, dict[str, list[float]]] = {}
    for share in task.shares:
        for seed in options.seeds or task.seeds:
            number, values = accuracies(task, options.overrides, folder, share, seed)
            shown = "  ".join(f"{METHODS[method]} {value:.1%}" for method, value in values.items())
            print(f"{number} labels, seed {seed}: {shown}", flush=True)
            for method, value in values.items():
                found.setdefault(number, {}).setdefault(method, []).append(value)
    print(table(found))
    if options.seeds is None:
        plot(found, ROOT / "docs" / task.plot)


if __name__ == "__main__":
    main()
