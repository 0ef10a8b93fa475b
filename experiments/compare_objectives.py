"""Trains one network by several forms of the objective, at equal units or at equal steps, and prints a table.

    python experiments/compare_objectives.py configs/imagenette64.yaml runs/forms "model.block_out_channels=[48, 96]" \
        model.norm_num_groups=16 training.learning_rate=1e-3 --forms embedding --seeds 0 1
    python experiments/compare_objectives.py configs/digits.yaml runs/options --forms options --steps 300
    python experiments/compare_objectives.py configs/one_or_two.yaml runs/forms --forms ablations orders \
        --seeds 0 1 --plot runs/forms/forms.png

A unit is a forward pass of a batch through the trunk, see `latent_egc/objective.py`; a form of fewer units a step takes
more steps. A run that is there already is read, one that was stopped goes on; several calls with `--only` train side by
side, and one without prints them all. docs/decisions.md has what came of it.

`ablations` are one change each of the form that is named first. Its transformer has the multiply-adds of the U-Net of
configs/one_or_two.yaml, within 1 %, on 8x8 latents of 4 channels and ten classes. Stronger crops are not among them:
they need another latent cache, and so another call with data.random_resized_crop, data.latent_cache and `--only`.

`orders` are what is learned when: a form with a `before` goes on from the averaged weights of a run of that one, each
with half of the units and its own warm-up and cosine; "in two halves" is what that alone does.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from finished_runs import is_trained
from matplotlib.ticker import PercentFormatter
from noise_prediction import FieldObjective, NoiseObjective

from latent_egc.config import load_config
from latent_egc.objective import UNLABELLED, EGCLosses, EGCObjective
from latent_egc.training.checkpoints import read_metrics
from latent_egc.training.loop import train


class LowNoiseObjective(EGCObjective):
    """As `EGCObjective`, but of the noisy latents only those of the lowest quarter of the timesteps are classified."""

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        clean_latents: torch.Tensor,
        *,
        clean_labels: torch.Tensor,
        timesteps: torch.Tensor,
        **others: torch.Tensor,
    ) -> EGCLosses:
        """As `EGCObjective.forward`; a row without a label adds 0 to the classification loss."""
        is_noisy = timesteps >= self.energy_model.config.num_train_timesteps // 4
        class_labels = class_labels.masked_fill(is_noisy, UNLABELLED)
        return super().forward(
            latents, class_labels, clean_latents, clean_labels=clean_labels, timesteps=timesteps, **others
        )


class Form(NamedTuple):
    """A form of the objective: forward passes of a batch that a step is worth, and what it sets."""

    units: float
    overrides: list[str]
    objective: type[EGCObjective] = EGCObjective
    before: "Form | None" = None  # what learns in the first half of the units; this one goes on from its weights


def embedded(units: float, noisy_classification: str, label_drop: float, clean_fraction: float = 1.0) -> Form:
    """A form for a network with a class embedding."""
    keys = {"noisy_classification": noisy_classification, "label_drop": label_drop, "clean_fraction": clean_fraction}
    return Form(units, ["model.class_embedding=true", *(f"objective.{key}={value}" for key, value in keys.items())])


# What the ablations' first form says whatever the configuration does, so that each other form is one change of it.
UNCHANGED = ["model.head=map", "model.gaussian_part=true", "model.class_embedding=false", "data.mixup=0"]
UNCHANGED += ["data.cutmix=0", "data.mixup_prob=1", "data.reprob=0", "objective.classification_weight=0.2"]
UNCHANGED += ["objective.label_smoothing=0.1", "objective.timestep_log_normal=[-0.5, 1.2]"]
UNCHANGED += ["objective.clean_fraction=1"]
TRANSFORMER = (
    "model={backbone: transformer, sample_size: 8, in_channels: 4, num_classes: 10, width: 248, num_layers: 6, "
    "num_attention_heads: 4, long_skips: true}"
)
INNER = [*UNCHANGED, "model.head=inner"]
FORMS = {
    "embedding": {
        "all, drop 0.1": embedded(12, "all", 0.1),
        "dropped, drop 0.1": embedded(9, "dropped", 0.1),
        "dropped, drop 0.25": embedded(9, "dropped", 0.25),
        "dropped, drop 0.5": embedded(9, "dropped", 0.5),
        "dropped, drop 0.5, clean 0.5": embedded(7.5, "dropped", 0.5, 0.5),
        "no class embedding": Form(9, []),
        "no class embedding, clean 0.5": Form(7.5, ["objective.clean_fraction=0.5"]),
    },
    "options": {
        "plain": Form(9, []),
        "log-normal timesteps": Form(9, ["objective.timestep_log_normal=[-0.5, 1.2]"]),
        "Mixup 0.2": Form(9, ["data.mixup=0.2"]),
        "CutMix 1 in half the pairs": Form(9, ["data.cutmix=1", "data.mixup_prob=0.5"]),
        "erasing 0.25": Form(9, ["data.reprob=0.25"]),
    },
    "ablations": {
        "head map, Gaussian part, weight 0.2, smoothing 0.1": Form(9, UNCHANGED),
        "head inner": Form(9, INNER),
        "no Gaussian part": Form(9, [*UNCHANGED, "model.gaussian_part=false"]),
        "class embedding": Form(9, [*UNCHANGED, *embedded(9, "dropped", 0.5).overrides]),
        "no label smoothing": Form(9, [*UNCHANGED, "objective.label_smoothing=0"]),
        "classification weight 0.05": Form(9, [*UNCHANGED, "objective.classification_weight=0.05"]),
        "classification weight 0.5": Form(9, [*UNCHANGED, "objective.classification_weight=0.5"]),
        "Mixup 0.2 and CutMix 1 in half the pairs": Form(
            9, [*UNCHANGED, "data.mixup=0.2", "data.cutmix=1", "data.mixup_prob=0.5"]
        ),
        "transformer": Form(9, [*UNCHANGED, TRANSFORMER]),
        "timesteps uniform": Form(9, [*UNCHANGED, "objective.timestep_log_normal=null"]),
    },
    "orders": {
        "head inner": Form(9, INNER),
        "jointly, in two halves": Form(9, INNER, before=Form(9, INNER)),
        "a noise predictor first": Form(9, INNER, before=Form(3, INNER, NoiseObjective)),
        "a noise predictor with cross entropy first": Form(9, INNER, before=Form(6, INNER, FieldObjective)),
        "weight 0.05 first, then 0.35": Form(
            9,
            [*INNER, "objective.classification_weight=0.35"],
            before=Form(9, [*INNER, "objective.classification_weight=0.05"]),
        ),
        "cross entropy at low noise alone": Form(9, INNER, LowNoiseObjective),
    },
}


class Result(NamedTuple):
    """What one run came to."""

    steps: str  # of each half, where there are two
    accuracy: float
    denoising_loss: float
    clipped: float  # share of its steps


def trained(config: Path, folder: Path, overrides: Sequence[str], form: Form, units: float, seed: int) -> Result:
    """Trains a form for so many units into a folder, or reads what is there.

    Args:
        config: of the run that all forms start from.
        folder: the run's; one that learns before it lies beside it.
        overrides: of all runs.
        form, units, seed: what is trained, for how long, and its seed.
    """
    steps_before, keys = "", []
    if form.before is not None:
        units /= 2
        first = folder.with_name(f"{folder.name}-before")
        # Under another seed, or the second half would see the first one's images, timesteps and noise again.
        steps_before = trained(config, first, overrides, form.before, units, seed + 1000).steps + " + "
        keys.append(f"model.init_from={first}")
    steps = round(units / form.units)
    every = max(1, steps // 4)
    training = {"seed": seed, "max_steps": steps, "validate_every": every, "checkpoint_every": every}
    training |= {"sample_every": steps + 1, "log_every": 1, "resume": "auto"}
    keys += [f"training.{key}={value}" for key, value in training.items()] + [f"output_dir={folder}"]
    grid = ["sampling.num_inference_steps=1", "sampling.num_images_per_label=1"]
    run = load_config(config, [*grid, *overrides, *form.overrides, *keys])
    if not is_trained(run):
        train(run, form.objective)
    rows = read_metrics(folder / "metrics.jsonl")
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    limit = run.training.max_grad_norm
    clipped = 0.0 if limit is None else sum(norm > limit for norm in norms) / len(norms)
    last = [row for row in rows if "validation_denoising_loss" in row][-1]
    accuracy, loss = last["validation_accuracy"], last["validation_denoising_loss"]
    return Result(f"{steps_before}{steps}", accuracy, loss, clipped)


def mean_and_range(values: Sequence[float], shown: str) -> str:
    """The mean as a format shows it, and in brackets the smallest and the largest where they differ; "" for none."""
    if not values:
        return ""
    mean, low, high = (format(value, shown) for value in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its header."""
    header, *rest = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rest))


def plot(found: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Accuracy against denoising loss: a form's mean and its seeds' range. The upper left is what is wished for."""
    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    for number, (name, results) in enumerate(found.items()):
        points = np.array([(result.denoising_loss, result.accuracy) for result in results])  # (seeds, 2)
        mean = points.mean(axis=0)
        below, above = mean - points.min(axis=0), points.max(axis=0) - mean
        spread = np.stack([below, above])  # (2, axes)
        style = {"color": f"C{number % 10}", "marker": "os^D"[number // 10 % 4], "linestyle": "none"}
        axes.errorbar(*mean, xerr=spread[:, :1], yerr=spread[:, 1:], label=name, elinewidth=0.8, **style)
    axes.set(xlabel="denoising loss", ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the run that all forms start from")
    parser.add_argument("folder", type=Path, help="for the runs, one folder each")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="of all runs")
    parser.add_argument("--forms", choices=FORMS, nargs="+", required=True, help="which are compared")
    parser.add_argument("--only", nargs="+", default=[], metavar="FORM", help="of these, the ones so called")
    parser.add_argument("--steps", type=int, default=500, help="of a form of 9 units (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run each (default 0)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="accuracy against denoising loss of all forms")
    options = parser.parse_intermixed_args()
    forms = {name: form for group in options.forms for name, form in FORMS[group].items()}
    if unknown := [name for name in options.only if name not in forms]:
        parser.error(f"--only: there is no form {unknown[0]!r} among these, only {', '.join(map(repr, forms))}")

    found: dict[str, list[Result]] = {}
    for seed in options.seeds:
        for name in options.only or forms:
            folder = options.folder / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
            result = trained(options.config, folder, options.overrides, forms[name], 9 * options.steps, seed)
            found.setdefault(name, []).append(result)
    lines = [("form", "seeds", "units", "steps", "accuracy", "denoising loss", "steps clipped")]
    for name, results in found.items():
        units = f"{forms[name].units:g}" if forms[name].before is None else f"{forms[name].before.units:g}, then 9"
        numbers = (("accuracy", ".1%"), ("denoising_loss", ".4f"), ("clipped", ".1%"))
        cells = [mean_and_range([getattr(result, key) for result in results], shown) for key, shown in numbers]
        lines.append((name, ", ".join(map(str, options.seeds)), units, results[0].steps, *cells))
    print(markdown(lines))
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
