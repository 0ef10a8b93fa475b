"""From a configuration to the parts of a run: the energy network, its data, the pipeline that it saves.

The constructor of a backbone is the one list of the keys that `model` may have.
"""

import dataclasses
import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import yaml
from diffusers import ModelMixin

from latent_egc.config import (
    Config,
    ConfigError,
    DataConfig,
    SamplingConfig,
    TrainingConfig,
    check_folder,
    expanded,
    parse_fields,
)
from latent_egc.data.autoencoders import latent_shape, load_autoencoder
from latent_egc.data.latent_cache import CachedViews, open_cache
from latent_egc.data.mixing import mixes
from latent_egc.data.sources import load_splits
from latent_egc.data.stream import clean_share
from latent_egc.data.views import PixelViews, Views
from latent_egc.models import EGCTransformer, EGCUNet, EnergyModel
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.schedulers import DEFAULT_SOLVER, default_scheduler, solver

# Keys of the section `training` that a launcher may set, through these variables of Accelerate's.
LAUNCHER_VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
BACKBONES: dict[str, type[EnergyModel]] = {"unet": EGCUNet, "transformer": EGCTransformer}


def resolve_model(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section with every default: backbone, init_from (weights to start from), the constructor's arguments.

    Raises:
        ConfigError: an unknown backbone or key (with a suggestion), a wrong type, a missing argument, or an `init_from`
            that is not there.
    """
    backbone = section.get("backbone", "unet")
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        raise ConfigError(f"model.backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    parameters = [p for p in inspect.signature(BACKBONES[backbone].__init__).parameters.values() if p.name != "self"]
    fields = {p.name: (p.annotation, None) for p in parameters} | {"init_from": (str | None, None)}
    given = parse_fields(fields, {key: value for key, value in section.items() if key != "backbone"}, "model")
    resolved = {"backbone": backbone, "init_from": None} | {p.name: p.default for p in parameters} | given
    resolved["init_from"] = expanded(resolved["init_from"], "model.init_from")
    check_folder(resolved["init_from"], "model.init_from")
    return resolved


def resolve_training(section: TrainingConfig) -> TrainingConfig:
    """The section with the launcher's precision and accumulation where it has null, which is where Accelerate's
    launchers leave them: in the environment.

    Raises:
        ConfigError: the launcher contradicts the section, or wants what training cannot do.
    """
    resolved = {}
    for key, kind, bounds, default in (
        ("mixed_precision", Literal["no", "bf16"], None, "no"),
        ("gradient_accumulation_steps", int, (1, math.inf), "1"),
    ):
        variable = LAUNCHER_VARIABLES[key]
        given = {variable: yaml.safe_load(os.environ.get(variable, default))}
        launchers, ours = parse_fields({variable: (kind, bounds)}, given, "")[variable], getattr(section, key)
        # "no" is also what `accelerate launch` says where nobody chose.
        if ours is not None and variable in os.environ and launchers not in (ours, "no"):
            raise ConfigError(
                f"training.{key}={ours} contradicts the launcher's {variable}={launchers}; set it in one place, "
                f"training.{key}=null takes the launcher's"
            )
        resolved[key] = launchers if ours is None else ours
    return dataclasses.replace(section, **resolved)


def resolve(config: Config) -> Config:
    """What config.yaml holds: the configuration with `resolve_model` and `resolve_training`. Raises ConfigError."""
    log_normal = config.objective.timestep_log_normal
    if log_normal is not None and log_normal[1] <= 0:
        raise ConfigError(f"objective.timestep_log_normal must be (mean, std) with std > 0, got {list(log_normal)}")
    objective, embedded = config.objective, bool(config.model.get("class_embedding"))
    if objective.noisy_classification == "dropped" and not (embedded and objective.label_drop > 0):
        raise ConfigError(
            "objective.noisy_classification=dropped reads the rows whose label is dropped: it needs "
            f"model.class_embedding=true and objective.label_drop above 0, got {embedded} and {objective.label_drop}"
        )
    rows = config.training.train_batch_size * clean_share(config.objective.clean_fraction)
    if rows.denominator != 1:
        raise ConfigError(
            "objective.clean_fraction must be a whole number of rows of training.train_batch_size="
            f"{config.training.train_batch_size}, got {config.objective.clean_fraction}"
        )
    if mixes(config.data) and rows % 2:
        raise ConfigError(
            "data.mixup and data.cutmix mix pairs of rows: training.train_batch_size times objective.clean_fraction "
            f"must be even, got {rows}"
        )
    return dataclasses.replace(config, model=resolve_model(config.model), training=resolve_training(config.training))


def build_network(model: Mapping[str, Any]) -> EnergyModel:
    """A fresh network from a resolved `model` section. Raises ConfigError where its arguments contradict each other."""
    arguments = {key: value for key, value in model.items() if key not in ("backbone", "init_from")}
    try:
        return BACKBONES[model["backbone"]](**arguments)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def build_model(model: Mapping[str, Any], shape: tuple[int, int, int]) -> EnergyModel:
    """`build_network`, checked against the latents' shape (C, h, w). Raises ConfigError where they do not fit."""
    network = build_network(model)
    for key, wanted, reason in (
        ("in_channels", shape[0], "the channels of the latents"),
        ("sample_size", shape[1], "data.image_size through the autoencoder"),
    ):
        if network.config[key] != wanted:
            raise ConfigError(f"model.{key} must be {wanted}, {reason}, got {network.config[key]}")
    return network


@dataclass(frozen=True)
class Data:
    """What a run sees: its two splits, their class names (none for an unlabelled model), where they come from."""

    train: Views
    validation: Views
    class_names: list[str]
    source: str


def build_data(data: DataConfig, vae: ModelMixin | None, num_classes: int | None, seed: int) -> Data:
    """The latent cache where there is one, else the images.

    Args:
        data, vae: the run's section and autoencoder; None is pixel space.
        num_classes: K of the model; None ignores labels.
        seed: of the stream's order and augmentation, and of which labels are kept.
    """
    if data.latent_cache is not None:
        cache = open_cache(data, vae, num_classes is not None)
        train = CachedViews(cache.train, seed, data.label_fraction)
        validation, names = CachedViews(cache.validation, seed), cache.class_names
        return Data(
            train, validation, names, f"the latent cache {data.latent_cache} ({len(train)} + {len(validation)} images)"
        )
    splits = load_splits(data, num_classes)
    train, validation = (PixelViews(table, data, seed) for table in (splits.train, splits.validation))
    encoder = "as they are" if vae is None else f"encoded by {type(vae).__name__} at every step"
    source = f"pixels of {data.dataset} ({len(train)} + {len(validation)} images), {encoder}"
    return Data(train, validation, splits.class_names, source)


def build_pipeline(
    model: EnergyModel, vae: ModelMixin | None, class_names: list[str], sampling: SamplingConfig
) -> EGCPipeline:
    """The pipeline that a run saves and draws its grids with: by default it samples as they are drawn."""
    return EGCPipeline(
        energy_model=model,
        vae=vae,
        scheduler=solver(DEFAULT_SOLVER, default_scheduler(model)),
        id2label=dict(enumerate(class_names)),
        default_guidance_scale=sampling.guidance_scale,
        default_num_inference_steps=sampling.num_inference_steps,
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """A rough estimate of what a training step needs on each device, in bytes.

    Args:
        num_parameters: of the network, a number and no bytes.
        state: weights, gradients, optimiser and average.
        activations: four times the outputs of all layers: the forward pass, its input gradient and what the second
            backward keeps of both, and the clean batch.
    """

    num_parameters: int
    state: int
    activations: int


def estimate_memory(model: Mapping[str, Any], shape: tuple[int, int, int], training: TrainingConfig) -> MemoryEstimate:
    """The estimate for a resolved `model` section on latents of a shape (C, h, w), without making the network.

    Raises ConfigError as `build_model`.
    """
    with torch.device("meta"):
        network = build_model(model, shape)
    num_parameters = sum(p.numel() for p in network.parameters())
    sizes: list[int] = []
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    batch_size = training.train_batch_size
    network(torch.empty(batch_size, *shape, device="meta"), torch.zeros(batch_size, dtype=torch.long, device="meta"))
    bytes_per_activation = 2 if training.mixed_precision == "bf16" else 4
    # float32 weights, gradients, two Adam moments and the average
    return MemoryEstimate(num_parameters, 20 * num_parameters, 4 * bytes_per_activation * sum(sizes))


def describe(config: Config) -> str:
    """The resolved configuration with the network's size and the `MemoryEstimate` of a step."""
    config = resolve(config)
    shape = latent_shape(load_autoencoder(config.autoencoder), config.data.image_size)
    needed = estimate_memory(config.model, shape, config.training)
    return (
        yaml.safe_dump(config.to_dict(), sort_keys=False)
        + f"# {BACKBONES[config.model['backbone']].__name__}: {needed.num_parameters:,} parameters\n"
        + f"# memory per device, estimated: {needed.state / 2**30:.2f} GiB weights, gradients, optimiser and average; "
        + f"{needed.activations / 2**30:.2f} GiB activations at train_batch_size {config.training.train_batch_size}\n"
    )
