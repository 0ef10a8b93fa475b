"""What does ONE network for both jobs cost and buy, against two?

    latent-egc encode configs/one_or_two.yaml
    python experiments/one_or_two.py train configs/one_or_two.yaml runs/pairs joint --seed 0
    python experiments/one_or_two.py measure runs/pairs/joint/0 --set ood.data=configs/cifar10_small.yaml \
        ood.num_images=1000 'generation.features=[../shared/weights/squeezenet1_1_features.pt]'
    python experiments/one_or_two.py measure runs/pairs/joint/1 --suites classification calibration
    python experiments/one_or_two.py table runs/pairs

`train` is one form and one seed, into FOLDER/FORM/SEED, so that many run side by side; what is there is not trained
again, what was stopped goes on. `measure` writes measured.json into that folder, and the suites' report beside it,
whose finished suites are read. All forms see the same images, views and noise, by the seed, at the same batch, learning
rate and average. `joint` is the run of the configuration; the others have its trunk, the small ones at width / sqrt(2),
about half the parameters each; the nearer, the fewer groups the norms have, therefore model.norm_num_groups: 8. One at
"units" takes as many steps as make the small pair's units the joint one's.

    joint               the energy network: it classifies, and its gradient denoises
    classifier          the cross entropy of clean latents alone
    noised_classifier   the cross entropy of clean and of noised latents, weighted as the joint one's; nothing denoises
    noise_predictor     the field of head "inner" as epsilon, a class embedding, classifier-free guidance; no classes

A unit is a forward pass of one image through the joint network's trunk, a backward pass by the input another; through
another trunk it is as much of a unit as that trunk's multiply-adds, which are counted, are of the joint one's. The
samplers have the same scheduler, steps, starting noise, guidance scale and judge, those of the configuration: w is the
power in p(z) p(y | z)^w for both. The denoising loss is without a label, which a tenth of the noise predictor's rows
are; the energy of a network that was never trained to denoise is no density, whatever it tells apart.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from compare_objectives import markdown, mean_and_range
from finished_runs import is_trained
from noise_prediction import NoiseObjective, guided_noise
from torch.utils.flop_counter import FlopCounterMode
from train_plain_classifier import PlainObjective

from latent_egc.atomic import replace_text
from latent_egc.config import Config, load_config
from latent_egc.measuring.study import EvaluationSettings, evaluate
from latent_egc.models.heads import EnergyOutput
from latent_egc.models.numerics import twice_differentiable
from latent_egc.objective import EGCObjective
from latent_egc.pipelines import EGCPipeline
from latent_egc.training.build import build_data, build_network, resolve_model
from latent_egc.training.checkpoints import resolve_pipeline
from latent_egc.training.loop import train
from latent_egc.training.validation import validate, validation_latents


class NoisedObjective(EGCObjective):
    """The joint objective's classification loss, weights and all, and nothing else."""

    def _derivatives(
        self,
        embedded_labels: torch.Tensor | None,
        noisy_latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> tuple[torch.Tensor, EnergyOutput, float]:
        return noise, self.energy_model(noisy_latents, timesteps), 0.0  # a denoising loss of 0


class Form(NamedTuple):
    """What is trained: its loss, its keys, and how large and long."""

    objective: type[EGCObjective]
    overrides: Sequence[str] = ()
    small: bool = False  # at width / sqrt(2)
    equal_units: bool = False  # the small pair's with the joint form's; else equal images


CLASSIFIER = ("model.class_embedding=false", "objective.noisy_classification=all", "objective.classification_weight=1")
NOISE_PREDICTOR = ("model.head=inner", "model.class_embedding=true", "objective.label_drop=0.1")
NOISE_PREDICTOR += ("objective.noisy_classification=all",)
FORMS = {
    "joint": Form(EGCObjective),
    "classifier": Form(PlainObjective, CLASSIFIER),
    "noised_classifier": Form(NoisedObjective, CLASSIFIER),
    "noise_predictor": Form(NoiseObjective, NOISE_PREDICTOR),
    "small_classifier": Form(PlainObjective, CLASSIFIER, small=True),
    "small_noise_predictor": Form(NoiseObjective, NOISE_PREDICTOR, small=True),
    "small_classifier_units": Form(PlainObjective, CLASSIFIER, small=True, equal_units=True),
    "small_noise_predictor_units": Form(NoiseObjective, NOISE_PREDICTOR, small=True, equal_units=True),
}
# Rows of the table that are two networks: the classifier's numbers of the first, the sampler's of the second.
PAIRS = {
    "two networks": ("classifier", "noise_predictor"),
    "two small networks, equal images": ("small_classifier", "small_noise_predictor"),
    "two small networks, equal units": ("small_classifier_units", "small_noise_predictor_units"),
}
CLASSIFYING = ("classification", "calibration", "corruption", "robustness", "ood")
SETTINGS = (
    "corruption.num_images=200",
    "robustness={num_images: 200, linf_eps_255: [2, 4], l2_eps: [], num_autoattack_images: 0, denoise_timesteps: []}",
)
# Column -> the suite and the metric's name, "*" being what a setting says; and how it is shown.
COLUMNS = {
    "accuracy": ("classification", "top-1 accuracy", ".1%"),
    "ECE": ("calibration", "ECE (* bins), as trained", ".3f"),
    "corruption error": ("corruption", "mean error", ".1%"),
    "PGD 2/255": ("robustness", "EGC, PGD-* l_inf 2/255", ".1%"),
    "PGD 4/255": ("robustness", "EGC, PGD-* l_inf 4/255", ".1%"),
    "OOD AUROC, probability": ("ood", "AUROC, maximum probability", ".1%"),
    "OOD AUROC, energy": ("ood", "AUROC, energy, clean latents", ".1%"),
    "FD": ("generation", "FD-*", ",.0f"),  # of the first extractor, as the two below
    "precision": ("generation", "precision-*", ".1%"),
    "recall": ("generation", "recall-*", ".1%"),
    "class agreement": ("generation", "class agreement by *", ".1%"),
}
OTHER_COLUMNS = {
    "denoising loss": ".4f",
    "parameters": ",.0f",
    "training images": ",.0f",
    "units an image": ".2f",
    "units a sample": ".0f",
}


# --- what a form is and costs ---------------------------------------------------------------------------------------


def narrowed(model: Mapping[str, Any]) -> str:
    """The override that makes a resolved `model` section's widths 1 / sqrt(2) of what they are, as nearly as its group
    norms and heads allow.
    """
    if model["backbone"] == "transformer":
        key, widths, divisor = "width", [model["width"]], math.lcm(4, model["num_attention_heads"])
    else:
        key, widths, divisor = "block_out_channels", model["block_out_channels"], model["norm_num_groups"]
        if model["attention_head_dim"] is None:
            divisor = math.lcm(divisor, model["num_attention_heads"])
    narrow = [max(1, round(width / math.sqrt(2) / divisor)) * divisor for width in widths]
    return f"model.{key}={narrow if key == 'block_out_channels' else narrow[0]}"


def multiply_adds(model: Mapping[str, Any]) -> int:
    """Of a forward pass of one image through the network of a `model` section, by the operators that it runs."""
    with torch.device("meta"):
        network = build_network(resolve_model(model))
        config = network.config
        latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size)
        timesteps = torch.zeros(1, dtype=torch.long)
    # Attention as matrix products, which are counted on every device.
    with FlopCounterMode(display=False) as counter, twice_differentiable(True):
        network.network(latents, timesteps, timesteps if config.class_embedding else None)
    return counter.get_total_flops() // 2


def training_passes(objective: type[EGCObjective], config: Config) -> float:
    """Forward passes that training on one image is worth, see `latent_egc/objective.py`."""
    clean = config.objective.clean_fraction
    if objective is EGCObjective:
        embedded = bool(config.model.get("class_embedding")) and config.objective.noisy_classification == "all"
        return (12 if embedded else 9) - 3 * (1 - clean)
    return {NoiseObjective: 3, PlainObjective: 3 * clean, NoisedObjective: 3 + 3 * clean}[objective]


def sampling_passes(objective: type[EGCObjective], config: Config) -> float | None:
    """Forward passes of one guided sample: of an energy and its gradient, or of a field with and without the label."""
    if objective not in (EGCObjective, NoiseObjective):
        return None
    is_guided = config.sampling.guidance_scale != 1
    rows = 2 if is_guided and (objective is NoiseObjective or config.model.get("class_embedding")) else 1
    return (2 if objective is EGCObjective else 1) * rows * config.sampling.num_inference_steps


def config_of(name: str, path: Path, folder: Path, seed: int, overrides: Sequence[str]) -> tuple[Config, Config]:
    """The configurations of a form and of the joint one that it is compared with. Raises ConfigError."""
    form, training = FORMS[name], [f"training.seed={seed}", "training.resume=auto", "training.overwrite=false"]
    grid = ["sampling.num_images_per_label=1", "sampling.max_classes=1"]
    joint = load_config(path, [*grid, *overrides, *training, f"output_dir={folder / name / str(seed)}"])

    def with_keys(*keys: str) -> Config:
        return load_config(path, [*grid, *overrides, *training, f"output_dir={joint.output_dir}", *keys])

    small = (narrowed(resolve_model(joint.model)),) if form.small else ()
    steps = joint.training.max_steps
    if form.equal_units:
        pair = [FORMS["small_classifier"], FORMS["small_noise_predictor"]]
        configs = [with_keys(*other.overrides, *small) for other in pair]
        one = multiply_adds(joint.model)
        units = [units_an_image(other.objective, own, one) for other, own in zip(pair, configs, strict=True)]
        steps = round(steps * training_passes(EGCObjective, joint) / sum(units))
    keys = (f"training.max_steps={steps}", f"training.sample_every={steps + 1}")
    return with_keys(*form.overrides, *small, *keys), joint


def units_an_image(objective: type[EGCObjective], config: Config, one: int) -> float:
    """`training_passes` in units, of so many multiply-adds."""
    return training_passes(objective, config) * multiply_adds(config.model) / one


def train_form(name: str, path: Path, folder: Path, seed: int, overrides: Sequence[str]) -> Path:
    """Trains a form and writes form.json, what it costs, into its folder, which is returned."""
    config, joint = config_of(name, path, folder, seed, overrides)
    run, objective, training = Path(config.output_dir), FORMS[name].objective, config.training
    cost, to_sample = multiply_adds(config.model) / multiply_adds(joint.model), sampling_passes(objective, config)
    known = {
        "training images": training.max_steps * training.train_batch_size * (training.gradient_accumulation_steps or 1),
        "units an image": training_passes(objective, config) * cost,
        "units a sample": None if to_sample is None else to_sample * cost,
    }
    trained = is_trained(config)
    run.mkdir(parents=True, exist_ok=True)
    replace_text(run / "form.json", json.dumps({"form": name, "seed": seed, "known": known}, indent=1))
    if not trained:
        train(config, objective)
    return run


# --- measuring ------------------------------------------------------------------------------------------------------


def load_form(name: str, run: Path) -> EGCPipeline:
    """A trained form's pipeline; a noise predictor's epsilon is its field's, by classifier-free guidance."""
    pipeline = EGCPipeline.from_pretrained(str(resolve_pipeline(run)))
    network = pipeline.energy_model
    if FORMS[name].objective is NoiseObjective:
        network.epsilon = partial(guided_noise, network)
    return pipeline


def measure(run: Path, suites: Sequence[str] | None, settings: Sequence[str]) -> dict[str, float | None]:
    """Column -> value of a trained form, also written as measured.json into its folder; None where it has none.

    Args:
        run: its folder.
        suites: of the evaluation; None: all that make sense for the form.
        settings: overrides of the evaluation's settings.
    """
    written = json.loads((run / "form.json").read_text())
    name, config = written["form"], load_config(run / "config.yaml")
    objective = FORMS[name].objective
    denoises = objective in (EGCObjective, NoiseObjective)
    possible = (() if objective is NoiseObjective else CLASSIFYING) + (("generation",) if denoises else ())
    chosen = [suite for suite in possible if suites is None or suite in suites]
    pipeline, accelerator = load_form(name, run), Accelerator()
    steps = f"generation.num_inference_steps={config.sampling.num_inference_steps}"
    parsed = EvaluationSettings.parse([*SETTINGS, steps, *settings])
    report = evaluate(pipeline, config.data, chosen, run / "evaluation", parsed, name, accelerator)
    found = {suite: record["metrics"] for suite, record in report.content["suites"].items()}
    values: dict[str, float | None] = {}
    for column, (suite, pattern, _) in COLUMNS.items():
        matching = [metric["value"] for key, metric in found.get(suite, {}).items() if fnmatch(key, pattern)]
        values[column] = matching[0] if matching else None
    values["denoising loss"] = denoising_loss(pipeline, config, accelerator) if denoises else None
    values["parameters"] = pipeline.energy_model.num_parameters()
    values |= written["known"]
    replace_text(run / "measured.json", json.dumps(written | {"values": values}, indent=1))
    return values


def denoising_loss(pipeline: EGCPipeline, config: Config, accelerator: Accelerator) -> float:
    """The validation's, at the null label, by whatever the network's epsilon is."""
    network, training = pipeline.energy_model, config.training
    data = build_data(config.data, pipeline.vae, network.config.num_classes, training.seed)
    shape = network.config.in_channels, network.config.sample_size, network.config.sample_size
    latents = validation_latents(data.validation, pipeline.vae, training.num_validation_images, shape, accelerator)
    return validate(network, *latents, accelerator, training.train_batch_size)["validation_denoising_loss"]


# --- the table ------------------------------------------------------------------------------------------------------


def both(classifier: Mapping[str, float | None], sampler: Mapping[str, float | None]) -> dict[str, float | None]:
    """Two networks as one row: each column is of the one that has it, parameters and training units are both's."""
    values = {column: sampler[column] if own is None else own for column, own in classifier.items()}
    return values | {column: classifier[column] + sampler[column] for column in ("parameters", "units an image")}


def table(folder: Path) -> str:
    """Markdown, a column a form or pair that is measured: the mean over the seeds that have a number, and the range
    where several do. A form whose pair is there is not shown by itself.
    """
    measured: dict[str, dict[int, dict[str, float | None]]] = {}
    for name in FORMS:
        for file in sorted(folder.glob(f"{name}/*/measured.json")):
            written = json.loads(file.read_text())
            measured.setdefault(name, {})[written["seed"]] = written["values"]
    for name, (classifier, sampler) in PAIRS.items():
        own, other = measured.get(classifier, {}), measured.get(sampler, {})
        if seeds := sorted(own.keys() & other.keys()):
            measured[name] = {seed: both(own[seed], other[seed]) for seed in seeds}
    in_pairs = {name for pair, names in PAIRS.items() if pair in measured for name in names}
    shown = {name: of_seeds for name, of_seeds in measured.items() if name not in in_pairs}
    lines = [["", *shown], ["seeds", *(", ".join(map(str, of_seeds)) for of_seeds in shown.values())]]
    for column, form in ({column: form for column, (_, _, form) in COLUMNS.items()} | OTHER_COLUMNS).items():
        found = ([values[column] for values in of_seeds.values()] for of_seeds in shown.values())
        cells = [mean_and_range([value for value in values if value is not None], form) for values in found]
        lines.append([column, *cells])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train", help="one form with one seed")
    training.add_argument("config", type=Path, help="the joint network's run")
    training.add_argument("folder", type=Path, help="of all forms")
    training.add_argument("form", choices=FORMS)
    training.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="of every form alike")
    training.add_argument("--seed", type=int, default=0)
    measuring = verbs.add_parser("measure", help="a trained form")
    measuring.add_argument("run", type=Path, help="FOLDER/FORM/SEED")
    suites = (*CLASSIFYING, "generation")
    measuring.add_argument("--suites", nargs="+", choices=suites, help="those that the form has; default: all of these")
    measuring.add_argument("--set", nargs="+", default=[], metavar="KEY.SUB=VALUE", help="as of latent-egc evaluate")
    verbs.add_parser("table", help="of all that is measured").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.verb == "train":
        print(train_form(options.form, options.config, options.folder, options.seed, options.overrides))
    elif options.verb == "measure":
        measure(options.run, options.suites, options.set)
    else:
        print(table(options.folder))


if __name__ == "__main__":
    main()
