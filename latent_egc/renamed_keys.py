"""A configuration's keys that had other names before: files with the old ones are still read, with a warning."""

import warnings
from collections.abc import Mapping
from typing import Any

# Names that keys had before -> theirs now, and values where they are others now.
RENAMED = {
    "training.evaluate_every": "validate_every",
    "training.num_evaluation_samples": "num_validation_images",
    "training.shard_optimizer": "shard",
    "sampling.images_per_class": "num_images_per_label",
}
NEW_VALUES = {("training.shard_optimizer", "True"): "optimizer", ("training.shard_optimizer", "False"): "none"}
# Keys that are gone -> the value at which they did nothing. Files that say just that are still read.
REMOVED = {
    "objective.snr_gamma": None,
    "objective.classification_log_normal": None,
    "objective.low_discrepancy_timesteps": False,
}


def with_new_names(values: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
    """Keys under their names of today; of two names of one key the later stands. One warning for all old names."""
    renamed, old = dict(values), []
    for section in {key.split(".")[0] for key in REMOVED}:
        if isinstance(values.get(section), Mapping):
            named = [(key, f"{section}.{key}", value) for key, value in values[section].items()]
            renamed[section] = {key: value for key, n, value in named if n not in REMOVED or value != REMOVED[n]}
    for section in {key.split(".")[0] for key in RENAMED}:
        if isinstance(values.get(section), Mapping):
            old += [name for key in values[section] if (name := f"{section}.{key}") in RENAMED]
            named = [(key, f"{section}.{key}", value) for key, value in values[section].items()]
            renamed[section] = {RENAMED.get(n, key): NEW_VALUES.get((n, str(v)), v) for key, n, v in named}
    if old and warn:
        names = ", ".join(f"{name} is now {name.split('.')[0]}.{RENAMED[name]}" for name in sorted(old))
        warnings.warn(f"renamed keys in the configuration: {names}", stacklevel=4)
    return renamed
