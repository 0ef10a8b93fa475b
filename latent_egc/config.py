"""A run's configuration: frozen dataclasses, read from one YAML file and dotted overrides; every error names the key.

It knows no network: `model` stays a mapping here, and `training/build.py` checks it against the backbone it names.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from latent_egc.renamed_keys import with_new_names
from latent_egc.strict_yaml import parse_yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was received and what is allowed."""


def within(default: Any, minimum: float, maximum: float = math.inf) -> Any:
    """A field whose value, or whose every element, must lie in [minimum, maximum]."""
    return field(default=default, metadata={"range": (minimum, maximum)})


def file_path(default: Any = None) -> Any:
    """A field that may name files or folders: ~ and ${VARIABLE} in it are replaced."""
    return field(default=default, metadata={"path": True})


@dataclass(frozen=True)
class AutoencoderConfig:
    """The pretrained autoencoder; it is never trained."""

    path: str | None = file_path("digits_vae")  # "digits_vae" (packaged), a Hub id, a folder; null: pixel space
    subfolder: str | None = None  # such as "vae" inside a Stable Diffusion repository
    sample_posterior: bool = True  # train on posterior samples; false: on posterior means
    slicing: bool = False  # encode and decode one image at a time, for large images


@dataclass(frozen=True)
class DataConfig:
    """Images, labels and their views."""

    dataset: str = file_path("digits")  # or what datasets.load_dataset takes: a Hub id, "imagefolder", "parquet", ...
    subset: str | None = None  # the Hub dataset's configuration
    data_dir: str | None = file_path()
    data_files: str | dict[str, str] | None = file_path()  # noqa: RUF009, a field
    train_split: str = "train"
    validation_split: str | None = None  # null: validation_fraction of the train split is held out
    validation_fraction: float = within(0.2, 0.0, 0.9)
    image_column: str | None = None  # null: found by type or name
    label_column: str | None = None
    label_fraction: float = within(1.0, 1e-6, 1.0)  # share of the training labels kept, of every class at least one
    image_size: int = within(32, 1, 2**14)  # pixels, height and width
    horizontal_flip: bool = False
    random_resized_crop: tuple[float, float] | None = within((0.5, 1.0), 0.01, 1.0)  # area share, clean branch only
    random_resized_crop_ratio: tuple[float, float] = within((3 / 4, 4 / 3), 0.01, 100.0)  # width / height
    # Of the clean latents, with timm's names and meanings.
    reprob: float = within(0.0, 0.0, 1.0)  # share of the rows in which a box is erased
    mixup: float = within(0.0, 0.0)  # alpha of the Beta distribution; 0: no Mixup
    cutmix: float = within(0.0, 0.0)  # likewise
    mixup_prob: float = within(1.0, 0.0, 1.0)  # share of the pairs that are mixed at all
    mixup_switch_prob: float = within(0.5, 0.0, 1.0)  # of these, share of CutMix where both are on
    num_views: int = within(4, 1, 2**10)  # encoded views of each image for the clean branch, in a latent cache
    latent_cache: str | None = file_path()  # folder written by `latent-egc encode`; null: training reads pixels
    streaming: bool = False  # `latent-egc encode` reads the images in order, once, and keeps no copy of them
    # Processes that decode images for each training or encoding one; auto: `data/stream.py: num_loader_workers`.
    num_workers: int | Literal["auto"] = within("auto", 0, 2**10)
    skip_corrupt: bool = False  # skip unreadable images (and count them) instead of stopping


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss."""

    classification_weight: float = within(0.2, 0.0)  # the paper's gamma, 0.005 for ImageNet
    label_smoothing: float = within(0.1, 0.0, 0.99)
    label_drop: float = within(0.1, 0.0, 1.0)  # share of labels hidden from the class embedding, if there is one
    # With a class embedding: the noisy cross entropy of all rows, or of those whose label is dropped, which is cheaper.
    noisy_classification: Literal["all", "dropped"] = "all"
    clean_fraction: float = within(1.0, 1e-3, 1.0)  # share of the rows that the clean branch sees, weighted by 1 / it
    time_score_weight: float = within(0.0, 0.0)  # matches the energy's derivative by the noise level too; 0: not
    # Timesteps by a normal distribution (mean, std) of log(sigma_t / alpha_t); null: uniform, as published.
    timestep_log_normal: tuple[float, float] | None = within((-0.5, 1.2), -20.0, 20.0)


@dataclass(frozen=True)
class TrainingConfig:
    """The loop. Steps are optimiser steps (`global_step`)."""

    max_steps: int = within(1000, 1)
    train_batch_size: int = within(64, 1)  # per device and micro-batch
    gradient_accumulation_steps: int | None = within(None, 1)  # null: what the launcher says, else 1
    learning_rate: float = within(6e-4, 0.0)
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = within(50, 0)
    adam_betas: tuple[float, float] = within((0.9, 0.999), 0.0, 1.0)
    weight_decay: float = within(0.0, 0.0)
    max_grad_norm: float | None = within(1.0, 0.0)  # null: no clipping
    mixed_precision: Literal["no", "bf16"] | None = None  # null: what the launcher says, else "no"
    compile: bool = False  # the training step by torch.compile; where that fails: one warning, and the plain step
    activation_checkpointing: bool = False  # recompute the blocks' activations: less memory, more time
    # Each process keeps a part of the optimiser's state (ZeroRedundancyOptimizer), or of the parameters too (FSDP2).
    shard: Literal["none", "optimizer", "parameters"] = "none"
    check_gradients: bool | None = None  # once, before the first step; null: with bf16 or compile, or sharded
    ema_decay: float = within(0.9999, 0.0, 1.0)  # the bound, reached by diffusers' warm-up (1 + step) / (10 + step)
    seed: int = within(0, 0, 2**32 - 1)
    log_every: int = within(10, 1)
    validate_every: int = within(500, 1)
    sample_every: int = within(500, 1)
    checkpoint_every: int = within(500, 1)
    keep_checkpoints: int = within(2, 1)  # the newest; the best is kept besides
    num_validation_images: int | None = within(None, 1)  # null: the whole validation split
    trackers: tuple[str, ...] = ("tensorboard",)  # Accelerate's trackers
    resume: Literal["never", "auto"] = "never"  # auto: go on from the newest checkpoint in output_dir, if there is one
    overwrite: bool = False  # delete the run that output_dir already holds; an error where other files lie there

    @property
    def checks_gradients(self) -> bool:
        """`check_gradients`, or its default where it is null."""
        risky = self.mixed_precision == "bf16" or self.compile or self.shard != "none"
        return risky if self.check_gradients is None else self.check_gradients


@dataclass(frozen=True)
class SamplingConfig:
    """The sample grids, and what the saved pipeline does by default."""

    num_inference_steps: int = within(15, 1)  # stored with the pipeline, like the next
    guidance_scale: float = within(1.0, 1.0)
    num_images_per_label: int = within(8, 1, 2**20)
    max_classes: int = within(10, 1, 2**20)  # rows of the grid
    batch_size: int = within(40, 1, 2**20)


@dataclass(frozen=True)
class Config:
    """One run."""

    model: Mapping[str, Any]  # backbone, init_from, and the arguments of the backbone's constructor
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    output_dir: str = file_path("runs/default")

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form that `parse_config` reads; every default included, those of a resolved model too."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: str | Path) -> None:
        """Writes the configuration as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies overrides such as "training.max_steps=500".

    Raises ConfigError: a missing or unreadable file, or a key, type, value or override that cannot be used.
    """
    return parse_config(read_sections(path, overrides))


def load_data_config(path: str | Path) -> DataConfig:
    """The `data` section of a YAML file, a training config for example; its other sections are not looked at.

    Raises ConfigError as `load_config` does, or for a file without a `data` section.
    """
    values = read_sections(path)
    if "data" not in values:
        raise ConfigError(f"{path} has no data section, only {', '.join(map(str, values)) or 'nothing'}")
    config = parse_dataclass(DataConfig, values["data"], "data")
    _check_data(config)
    return config


def read_sections(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file's sections as plain values, with overrides applied. Raises ConfigError as `load_config` does."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file not found: {path}")
    try:
        values = parse_yaml(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    apply_overrides(values, overrides)
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Writes overrides such as "training.max_steps=500" into nested sections.

    Raises ConfigError: an override that is not KEY=VALUE, or goes below a value.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"an override is KEY.SUB=VALUE, got {override!r}")
        *sections, last = key.split(".")
        target = values
        for section in sections:
            if target.get(section) is None:  # absent, or named without a key below it
                target[section] = {}
            if not isinstance(target[section], dict):
                raise ConfigError(f"{key}: {section} is a value, not a section")
            target = target[section]
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
        target.pop(last, None)  # an override stands last, and so wins over the key's older name as well
        target[last] = value


def parse_config(values: Mapping[str, Any]) -> Config:
    """Plain values -> a checked `Config`. Raises ConfigError as `load_config` does."""
    if "model" not in values:
        raise ConfigError("model is missing: the section that describes the energy network")
    config = parse_dataclass(Config, with_new_names(values), "")
    check_folder(config.autoencoder.path, "autoencoder.path")
    _check_data(config.data)
    _check_output(config)
    if config.training.compile and config.training.activation_checkpointing:
        # A compiled step takes the input gradient by torch.func.grad, and recomputation belongs to autograd's.
        raise ConfigError("training.compile and training.activation_checkpointing exclude each other")
    return config


def check_folder(path: str | None, key: str) -> None:
    """Raises ConfigError, naming `key`, where `path` is written as a folder's and nothing is there."""
    if path is not None and path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
        raise ConfigError(f"{key}: no such folder: {path}")


def _check_output(config: Config) -> None:
    """Refuses to write the run around a folder that it reads."""
    output = Path(config.output_dir).expanduser().resolve()
    read = {"data.latent_cache": config.data.latent_cache, "data.data_dir": config.data.data_dir}
    read |= {"autoencoder.path": config.autoencoder.path, "model.init_from": config.model.get("init_from")}
    for key, name in read.items():
        if isinstance(name, str) and Path(name).expanduser().resolve().is_relative_to(output):
            raise ConfigError(f"output_dir={config.output_dir} must not contain what the run reads, {key}={name}")


def _check_data(config: DataConfig) -> None:
    for key in ("data_dir", "data_files"):
        if "/" in config.dataset:  # then they are relative to that folder or Hub repository
            break
        value = getattr(config, key)
        for name in value.values() if isinstance(value, dict) else [value]:
            if name is not None and "://" not in name and "*" not in name and not Path(name).exists():
                raise ConfigError(f"data.{key}: no such file or folder: {name}")
    for key, what in (("random_resized_crop", "area"), ("random_resized_crop_ratio", "width / height")):
        if (bounds := getattr(config, key)) is not None and bounds[0] > bounds[1]:
            raise ConfigError(f"data.{key} must be (smallest, largest) {what}, got {list(bounds)}")


def parse_dataclass(cls: type, values: Any, prefix: str) -> Any:
    """Plain values -> a checked frozen dataclass; errors name `prefix` and the key. Raises ConfigError."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: (hints[f.name], f.metadata.get("range")) for f in dataclasses.fields(cls)}
    parsed = parse_fields(fields, values, prefix)
    for f in dataclasses.fields(cls):
        if f.name in parsed and "path" in f.metadata:
            parsed[f.name] = expanded(parsed[f.name], f"{prefix}.{f.name}" if prefix else f.name)
    return cls(**parsed)


def expanded(value: Any, key: str) -> Any:
    """A path, or each of several, with ~ and ${VARIABLE} replaced. Raises ConfigError: no such variable."""
    if isinstance(value, dict):
        return {name: expanded(element, key) for name, element in value.items()}
    if isinstance(value, tuple):
        return tuple(expanded(element, key) for element in value)
    if value is None:
        return None

    def variable(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"{key}={value!r}: the environment has no variable {match[1]!r}")
        return os.environ[match[1]]

    return os.path.expanduser(re.sub(r"\$\{([^}]*)\}", variable, value))


def parse_fields(fields: Mapping[str, tuple[Any, Any]], values: Any, prefix: str) -> dict[str, Any]:
    """The given `values`, checked; `fields` has annotation and range (or None) of each key. Raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix} must be a section, got {values!r}")
    parsed = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(fields)}"
            raise ConfigError(f"unknown key {name}; {hint}")
        annotation, bounds = fields[key]
        parsed[key] = _convert(value, annotation, name)
        if bounds is not None and parsed[key] is not None:
            for element in parsed[key] if isinstance(parsed[key], tuple) else (parsed[key],):
                if not isinstance(element, str) and not bounds[0] <= element <= bounds[1]:
                    raise ConfigError(f"{name} must be in [{bounds[0]:g}, {bounds[1]:g}], got {value}")
    return parsed


def _convert(value: Any, annotation: Any, name: str) -> Any:
    """`value` as `annotation`, or a ConfigError; YAML's spellings of floats and of "no" are understood."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a section, got {value!r}")
        return dict(value)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return parse_dataclass(annotation, {} if value is None else value, name)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _convert(value, options[0], name)
        for option in options:
            try:
                return _convert(value, option, name)
            except ConfigError:
                continue
    if origin is Literal:
        value = "no" if value is False and "no" in arguments else value  # YAML 1.1 reads a bare no as false
        if value in arguments:
            return value
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(element, arguments[0], name) for element in value)
        if len(value) == len(arguments):
            return tuple(_convert(element, kind, name) for element, kind in zip(value, arguments, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {_convert(k, arguments[0], name): _convert(v, arguments[1], name) for k, v in value.items()}
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**32:
            raise ConfigError(f"{name} must be between -2^32 and 2^32, got {value}")
        return value
    if annotation is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    if annotation is str and isinstance(value, str):
        return value
    wanted = annotation.__name__ if isinstance(annotation, type) and origin is None else str(annotation)
    hint = ""
    if annotation is bool and str(value).lower() in ("true", "false", "yes", "no", "on", "off"):
        hint = "; write it without quotes"
    elif annotation is str and value is not None and not isinstance(value, (Mapping, list)):
        hint = "; write it in quotes"
    raise ConfigError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__}){hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    return value
