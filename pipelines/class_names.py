"""Classes by id or by name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

ClassLabels = int | str | Sequence[int | str] | torch.Tensor


def label_ids(class_labels: ClassLabels, id2label: Mapping[int, str], name: str = "class_labels") -> torch.Tensor:
    """Ids or names, one or many -> (L,) int64.

    Args:
        class_labels: ids in [0, K), names, or a tensor or numpy array of ids.
        id2label: the K names; empty for a model without classes.
        name: of the argument, for errors.

    Raises:
        ValueError: an unknown id or name (with a suggestion), no label, or a model without classes.
    """
    if not id2label:
        raise ValueError(f"this model was trained without classes, got {name}={class_labels!r}")
    ids = [_label_id(label, id2label, name) for label in _plain(class_labels)]
    if not ids:
        raise ValueError(f"{name} is empty; None samples without labels")
    return torch.tensor(ids)


def _plain(class_labels: Any) -> list[Any]:
    """A flat list of what may be a tensor, an array, one label, or a list with such entries of one label each."""
    if hasattr(class_labels, "flatten"):  # a tensor, a numpy array or scalar
        return class_labels.flatten().tolist()
    if not isinstance(class_labels, (list, tuple)):
        return [class_labels]
    entries = [_plain(entry) for entry in class_labels]
    return [entry[0] if len(entry) == 1 else entry for entry in entries]


def _label_id(label: Any, id2label: Mapping[int, str], name: str) -> int:
    if isinstance(label, str):
        label2id = {label_name: i for i, label_name in id2label.items()}
        if label in label2id:
            return label2id[label]
        close = difflib.get_close_matches(label, label2id, n=3)
        names = ", ".join(list(label2id)[:20]) + (", ..." if len(label2id) > 20 else "")
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the names are {names}"
        raise ValueError(f"unknown class name {label!r} in {name}; {hint}")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(id2label):
        raise ValueError(f"{name} must be names or ids in [0, {len(id2label)}), got {label!r}")
    return label
