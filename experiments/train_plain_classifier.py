"""Trains a plain classifier of the same trunk as a run's network, for comparison under attack.

    python experiments/train_plain_classifier.py runs/imagenette64 runs/imagenette64_plain
    latent-egc evaluate runs/imagenette64 --suite robustness --set robustness.plain=runs/imagenette64_plain

Network, starting weights, data, augmentation, batch, steps, learning rate and average are the run's own; the loss is
the cross entropy of clean latents at timestep 0 and nothing else, so that nothing denoises and no noise is seen. The
result is a run like any other, whose samples mean nothing. One process.
"""

import argparse
from pathlib import Path

import torch

from latent_egc.config import load_config
from latent_egc.objective import EGCLosses, EGCObjective, cross_entropy
from latent_egc.training.checkpoints import read_metrics
from latent_egc.training.loop import train


class PlainObjective(EGCObjective):
    """The cross entropy of clean latents; nothing is denoised."""

    def forward(
        self, latents: torch.Tensor, *, clean_latents: torch.Tensor, clean_labels: torch.Tensor, **unused: torch.Tensor
    ) -> EGCLosses:
        """As `EGCObjective.forward`. As there, the mean is over all rows, and one without a label adds 0."""
        logits = self.energy_model(clean_latents, 0).logits
        loss = cross_entropy(logits, clean_labels, self.label_smoothing).mean()
        return EGCLosses(loss, torch.zeros_like(loss), loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run whose trunk and settings are taken, by its config.yaml")
    parser.add_argument("folder", type=Path, help="for the new run; it must not hold anything yet")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="such as training.max_steps=200")
    options = parser.parse_args()

    overrides = [f"output_dir={options.folder}", "training.resume=never", "training.overwrite=false"]
    few_samples = ["sampling.num_inference_steps=1", "sampling.num_images_per_label=1", "sampling.max_classes=1"]
    config = load_config(options.run / "config.yaml", [*few_samples, *overrides, *options.overrides])
    folder = train(config, PlainObjective)
    accuracy = read_metrics(folder / "metrics.jsonl")[-1]["validation_accuracy"]
    print(f"pipeline written: {folder / 'pipeline'}; validation accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
