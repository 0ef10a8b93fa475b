"""Loaded weights: all there, none besides, finite, and where CPU kernels want them.

diffusers logs a line where a file lacks a tensor and goes on with whatever is in memory.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.models.model_loading_utils import load_state_dict
from torch import nn


def check_loaded(module: nn.Module, report: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError, naming the tensors, where a file did not hold just what `module` needs; see `check_weights`.

    Args:
        module: what was loaded.
        report: of `from_pretrained(..., output_loading_info=True)`.
    """
    mis_shaped = [f"{name} ({found} for {needed})" for name, found, needed in report["mismatched_keys"]]
    faults = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"], "mis-shaped": mis_shaped}
    _refuse(module, faults)
    check_weights(module)


def check_weights(module: nn.Module) -> None:
    """Raises ValueError, naming the tensors, where weights were never read from a file, or are NaN or infinite."""
    tensors = module.state_dict()
    offloaded = any(hasattr(part, "_hf_hook") for part in module.modules())  # then they lie elsewhere
    missing = [] if offloaded else [name for name, tensor in tensors.items() if tensor.is_meta]
    not_finite = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
    ]
    _refuse(module, {"missing": missing, "NaN or infinite": not_finite})


def check_files(module: ModelMixin) -> None:
    """Raises ValueError, naming them, where the files that a component was loaded from hold tensors that it lacks.

    For components of other classes than this package's, which `DiffusionPipeline.from_pretrained` loads by itself.
    """
    folder = Path(module.config.get("_name_or_path") or "")
    ignored = module._keys_to_ignore_on_load_unexpected or []
    for file in sorted(
        [*folder.glob("diffusion_pytorch_model*.safetensors"), *folder.glob("diffusion_pytorch_model*.bin")]
    ):
        tensors = load_state_dict(file)
        module._fix_state_dict_keys_on_load(tensors)  # names of former versions of diffusers
        unexpected = tensors.keys() - module.state_dict().keys()
        _refuse(module, {"unexpected": [name for name in unexpected if not any(re.search(i, name) for i in ignored)]})


def align_weights(module: nn.Module) -> None:
    """Copies weights that a file was mapped to at odd addresses, where CPU kernels are slower and round differently.

    A loaded pipeline then gives, bit for bit, what the saved one gave.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _refuse(module: nn.Module, faults: Mapping[str, Sequence[str]]) -> None:
    parts = []
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            parts.append(f"{fault}: {', '.join(sorted(names)[:20])}{more}")
    if parts:
        raise ValueError(f"the weights do not fit this {type(module).__name__}; " + "; ".join(parts))
