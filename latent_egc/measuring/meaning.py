"""What measured numbers depend on, by its meaning: two ways to write the same study down are one study."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_egc.config import ConfigError, DataConfig, load_data_config
from latent_egc.training.checkpoints import resolve_pipeline

# Keys of the data section that do not change which images and labels are judged: training's views, and how it reads.
WITHOUT_EFFECT = {"horizontal_flip", "random_resized_crop", "random_resized_crop_ratio", "num_views", "label_fraction"}
WITHOUT_EFFECT |= {"reprob", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob"}
WITHOUT_EFFECT |= {"latent_cache", "streaming", "num_workers"}


def data_meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """Which images and labels a data section means; plain values. A key that is not there means its default."""
    whole = dataclasses.asdict(DataConfig()) | values
    return json.loads(json.dumps({key: value for key, value in whole.items() if key not in WITHOUT_EFFECT}))


def same_study(held: Mapping[str, Any], wanted: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether the settings that a suite was measured with mean what is wanted now.

    Args:
        held, wanted: plain values, the second with every key of today.
        defaults: of the settings; a key that was not there yet had the effect of its default.
    """
    whole = {key: held.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(whole[key], Mapping):
            whole[key] = {**default, **whole[key]}
    whole = {**held, **whole}
    if "data" in held:
        whole["data"] = data_meaning(held["data"])
    return whole == wanted


def digest_of_files(name: str) -> dict[str, str]:
    """Path -> a digest of what a study reads there; {} for a Hub id, and where nothing is.

    Of a YAML file's data section its meaning counts, not its comments nor the sections beside it.

    Args:
        name: a file, the folder of a run, a pipeline or a model.
    """
    path = Path(name)
    if path.is_file():
        return {name: _meaning_of_yaml(path) or file_digest(path)}
    try:
        files = sorted(resolve_pipeline(path).rglob("*.safetensors"))
    except FileNotFoundError:
        files = sorted(path.glob("*.safetensors"))  # a model of transformers
    return {str(file): file_digest(file) for file in files}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _meaning_of_yaml(path: Path) -> str | None:
    """A digest of a data section's meaning; None: the file has none that can be used."""
    if path.suffix not in (".yaml", ".yml"):
        return None
    try:
        values = data_meaning(dataclasses.asdict(load_data_config(path)))
    except ConfigError:
        return None
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
