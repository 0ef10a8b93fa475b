"""Classes by id or by name."""

import difflib
from collections.abc import Mapping, Sequence

import torch

ClassLabels = int | str | Sequence[int | str] | torch.Tensor


def label_ids(class_labels: ClassLabels, id2label: Mapping[int, str]) -> torch.Tensor:
    """Ids or names, one or many -> (L,) int64.

    Args:
        class_labels: ids in [0, K), names, or a tensor of ids.
        id2label: the K names; empty for a model without classes.

    Raises:
        ValueError: an unknown id or name (with a suggestion), no label, or a model without classes.
    """
    if not id2label:
        raise ValueError(f"this model was trained without classes, got class_labels={class_labels!r}")
    if torch.is_tensor(class_labels):
        class_labels = class_labels.flatten().tolist()
    elif isinstance(class_labels, (int, str)):
        class_labels = [class_labels]
    ids = [_label_id(label, id2label) for label in class_labels]
    if not ids:
        raise ValueError("class_labels is empty; None samples without labels")
    return torch.tensor(ids)


def _label_id(label: int | str, id2label: Mapping[int, str]) -> int:
    if isinstance(label, str):
        label2id = {name: i for i, name in id2label.items()}
        if label in label2id:
            return label2id[label]
        close = difflib.get_close_matches(label, label2id, n=3)
        names = ", ".join(list(label2id)[:20]) + (", ..." if len(label2id) > 20 else "")
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the names are {names}"
        raise ValueError(f"unknown class name {label!r} in class_labels; {hint}")
    if not isinstance(label, int) or not 0 <= label < len(id2label):
        raise ValueError(f"class_labels must be names or ids in [0, {len(id2label)}), got {label!r}")
    return label
