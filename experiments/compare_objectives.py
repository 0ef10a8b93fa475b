"""Trains one network by several forms of the objective, at equal units or at equal steps, and prints a table.

    python experiments/compare_objectives.py configs/imagenette64.yaml runs/forms --forms embedding --seeds 0 1 \
        "model.block_out_channels=[48, 96]" model.norm_num_groups=16 training.learning_rate=1e-3
    python experiments/compare_objectives.py configs/digits.yaml runs/options --forms options --steps 300

A unit is a forward pass of a batch through the trunk, see `latent_egc/objective.py`; a form of fewer units a step takes
more steps. A run that is there already is read, one that was stopped goes on. docs/decisions.md has what came of it.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from latent_egc.config import load_config
from latent_egc.training.checkpoints import read_metrics
from latent_egc.training.loop import train


class Form(NamedTuple):
    """A form of the objective: forward passes of a batch that a step is worth, and what it sets."""

    units: float
    overrides: list[str]


def embedded(units: float, noisy_classification: str, label_drop: float, clean_fraction: float = 1.0) -> Form:
    """A form for a network with a class embedding."""
    keys = {"noisy_classification": noisy_classification, "label_drop": label_drop, "clean_fraction": clean_fraction}
    return Form(units, ["model.class_embedding=true", *(f"objective.{key}={value}" for key, value in keys.items())])


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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the run that all forms start from")
    parser.add_argument("folder", type=Path, help="for the runs, one folder each")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="of all runs")
    parser.add_argument("--forms", choices=FORMS, required=True, help="which are compared")
    parser.add_argument("--steps", type=int, default=500, help="of a form of 9 units (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run each (default 0)")
    options = parser.parse_intermixed_args()

    lines = [("form", "seed", "units", "steps", "accuracy", "denoising loss", "steps clipped")]
    for seed in options.seeds:
        for name, form in FORMS[options.forms].items():
            steps = round(9 * options.steps / form.units)
            folder = options.folder / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
            every = max(1, steps // 4)
            training = {"seed": seed, "max_steps": steps, "validate_every": every, "checkpoint_every": every}
            training |= {"sample_every": steps + 1, "log_every": 1, "resume": "auto"}
            overrides = [f"training.{key}={value}" for key, value in training.items()] + [f"output_dir={folder}"]
            grid = ["sampling.num_inference_steps=1", "sampling.num_images_per_label=1"]
            config = load_config(options.config, [*grid, *options.overrides, *form.overrides, *overrides])
            if not (folder / "pipeline").exists():
                train(config)
            rows = read_metrics(folder / "metrics.jsonl")
            norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
            limit = config.training.max_grad_norm
            clipped = 0.0 if limit is None else sum(norm > limit for norm in norms) / len(norms)
            last = [row for row in rows if "validation_denoising_loss" in row][-1]
            accuracy, loss = last["validation_accuracy"], last["validation_denoising_loss"]
            shown = (f"{form.units:g}", str(steps), f"{accuracy:.1%}", f"{loss:.4f}", f"{clipped:.1%}")
            lines.append((name, str(seed), *shown))
    header, *rest = lines
    print("\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rest)))


if __name__ == "__main__":
    main()
