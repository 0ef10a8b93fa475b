"""Do unlabelled images help to classify? Digits with 10, 30 and 100 labels in all, the rest unlabelled.

    python experiments/few_labels.py            (about 35 minutes on one CPU core; goes on where it was stopped)

Four classifiers see the same labels, drawn anew for each of three seeds, and are judged on 360 held-out digits:

- an energy network trained on all 1,437 images, of which only some are labelled; these fill half of each batch on
  average, for otherwise most batches would hold none;
- the same network, steps and batches with the labelled images alone;
- scikit-learn's SVC on the 8x8 pixels of the labelled images;
- scikit-learn's LabelSpreading on the 8x8 pixels of all images.

Writes docs/few_labels.png and prints the table of docs/few_labels.md.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.semi_supervised import LabelSpreading
from sklearn.svm import SVC

from latent_egc.config import load_config
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
NUM_LABELS = (10, 30, 100)
SEEDS = (0, 1, 2)
METHODS = {
    "network": "energy network, all images",
    "network alone": "energy network, labelled images alone",
    "SVC": "SVC on pixels, labelled images alone",
    "LabelSpreading": "LabelSpreading on pixels, all images",
}
CLASSIFICATION_WEIGHT = 0.1  # for a batch of labelled images, as in configs/digits.yaml
# The quickstart's data, with more augmentations of each image; only its last validation counts.
CONFIG = load_config(
    ROOT / "configs" / "digits.yaml",
    [
        f"data.latent_cache={FOLDER / 'latents'}",
        "data.num_views=16",
        "model={backbone: transformer, sample_size: 8, in_channels: 4, num_classes: 10, width: 64, num_layers: 4, "
        "num_attention_heads: 4}",
        *("training.max_steps=1000", "training.train_batch_size=32", "training.learning_rate=2e-3"),
        *("training.lr_schedule=cosine", "training.warmup_steps=50", "training.ema_decay=0.99"),
        *("training.validate_every=1000", "training.checkpoint_every=1000", "training.sample_every=1000"),
        *("training.trackers=[]", "training.overwrite=true"),
    ],
)


def train_network(data: Data, images: np.ndarray, labels: np.ndarray, classification_weight: float, seed: int) -> float:
    """Trains a network and returns the accuracy of its averaged weights on the held-out digits.

    Args:
        data: the latent cache's two splits.
        images: (M,) numbers of training images, one M-th of the stream each; an image may come more than once.
        labels: (M,) theirs, -1 = unlabelled.
        classification_weight: as in `EGCObjective`; its mean is over all rows, and unlabelled ones add 0.
        seed: of the initialisation, the order, the views, the timesteps and the noise.
    """
    views = CachedViews(data.train.rows.select(images), seed)
    views.labels = labels
    config = replace(
        CONFIG,
        objective=replace(CONFIG.objective, classification_weight=classification_weight),
        training=replace(CONFIG.training, seed=seed),
        output_dir=str(FOLDER / "run"),
    )
    run = train(config, data=replace(data, train=views))
    return read_metrics(run / "metrics.jsonl")[-1]["validation_accuracy"]


def accuracies(data: Data, num_labels: int, seed: int) -> dict[str, float]:
    """Accuracy of every method with the same labels."""
    labels = keep_labels(data.train.labels, num_labels / len(data.train), seed)
    (kept,) = np.nonzero(labels >= 0)
    if len(kept) != num_labels:
        raise RuntimeError(f"{len(kept)} labels are kept instead of {num_labels}")
    # All images once, and the labelled ones as often as gives them half of the stream; the weight is doubled because
    # the other half adds nothing to the classification loss.
    half = np.concatenate([np.arange(len(labels)), np.resize(kept, len(labels) - 2 * len(kept))])
    splits = load_splits(CONFIG.data, num_classes=10)
    train_pixels, validation_pixels = pixels(splits.train), pixels(splits.validation)
    svc = SVC().fit(train_pixels[kept], labels[kept])
    spreading = LabelSpreading("knn").fit(train_pixels, labels)
    return {
        "network": train_network(data, half, labels[half], 2 * CLASSIFICATION_WEIGHT, seed),
        "network alone": train_network(data, kept, labels[kept], CLASSIFICATION_WEIGHT, seed),
        "SVC": svc.score(validation_pixels, splits.validation.labels),
        "LabelSpreading": spreading.score(validation_pixels, splits.validation.labels),
    }


def pixels(images: ImageTable) -> np.ndarray:
    """(M, 64) in [0, 1]."""
    return np.stack([np.asarray(images.image(i).convert("L")).ravel() / 255 for i in range(len(images))])


def measure() -> dict[str, dict[str, float]]:
    """Labels and seed, as "10 labels, seed 0" -> method -> accuracy; in a file, so that nothing is measured twice."""
    encode(CONFIG.data, CONFIG.autoencoder, num_classes=10)
    data = build_data(CONFIG.data, load_autoencoder(CONFIG.autoencoder), num_classes=10, seed=0)
    file = FOLDER / "accuracies.json"
    measured = json.loads(file.read_text()) if file.is_file() else {}
    for seed in SEEDS:
        for num_labels in NUM_LABELS:
            name = f"{num_labels} labels, seed {seed}"
            if name not in measured:
                measured[name] = accuracies(data, num_labels, seed)
                file.write_text(json.dumps(measured, indent=1))
            print(name, "  ".join(f"{method} {value:.1%}" for method, value in measured[name].items()), flush=True)
    return measured


def of_seeds(measured: dict[str, dict[str, float]], method: str, num_labels: int) -> list[float]:
    """A method's accuracies, one a seed."""
    return [measured[f"{num_labels} labels, seed {seed}"][method] for seed in SEEDS]


def table(measured: dict[str, dict[str, float]]) -> str:
    """Markdown: the mean over the seeds, and in brackets the smallest and the largest."""
    lines = ["| | " + " | ".join(f"{n} labels" for n in NUM_LABELS) + " |", "|---" * (1 + len(NUM_LABELS)) + "|"]
    for method, description in METHODS.items():
        values = [of_seeds(measured, method, n) for n in NUM_LABELS]
        cells = [f"{np.mean(v):.1%} ({min(v):.1%} to {max(v):.1%})" for v in values]
        lines.append(f"| {description} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(measured: dict[str, dict[str, float]], path: Path) -> None:
    """Lines through the means, a point for each seed."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    styles = ("C0-", "C0--", "C1--", "C1-")  # the networks in one colour; dashed without the unlabelled images
    for number, (style, (method, description)) in enumerate(zip(styles, METHODS.items(), strict=True)):
        values = [of_seeds(measured, method, n) for n in NUM_LABELS]
        positions = np.array(NUM_LABELS) * 1.025 ** (number - 1.5)  # side by side, so that equal values stay visible
        axes.plot(positions, np.mean(values, axis=1), style, label=description)
        axes.plot(positions, values, style[:2] + "o", alpha=0.5, markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(NUM_LABELS, [str(n) for n in NUM_LABELS])
    axes.minorticks_off()
    axes.set_xlabel("labels in all, for 1,437 training images")
    axes.set_ylabel("accuracy on 360 held-out digits")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = measure()
    print(table(results))
    plot(results, ROOT / "docs" / "few_labels.png")
