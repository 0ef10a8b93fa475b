"""The results of `make gpu-check` as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]

ALLOWED_ERRORS = {"float32": 1e-3, "bf16": 0.1}  # of gradients, as at the start of training


def render(result: dict[str, Any]) -> str:
    """The machine in a line, a table for each part that was measured, and what was not.

    Args:
        result: the content of the file that the command writes.
    """
    machine, parts = result["machine"], result["parts"]
    about = [machine["device"], f"driver {machine['driver']}" if machine["driver"] else "", f"torch {machine['torch']}"]
    seconds = sum(part["seconds"] for part in parts.values())
    blocks = [f"{', '.join(filter(None, about))}; {seconds:.0f} s in all."]
    gradients = [row for name in ("parity", "compiled_parity") for row in _rows(parts, name)]
    sections: Sequence[tuple[str, Callable[[list[Row]], list[Sequence[str]]], list[Row]]] = [
        ("Parameter gradients, error against eager float64 on the same device", _parity, gradients),
        ("Transformer of size B, 256 tokens, batches of 32", _speed, _rows(parts, "transformer_speed")),
        ("The same, compiled", _speed, _rows(parts, "compiled_speed")),
        ("U-Net as published at a third of its width, 32x32 latents, batches of 8", _speed, _rows(parts, "unet_speed")),
        ("A bf16 training step of size B on one row, beyond weights and batch", _memory, _rows(parts, "memory")),
        ("FSDP2 in one process, gradients against the plain ones", _sharding, _rows(parts, "sharding")),
        ("Training on digits in bf16, by the training loop", _training, _rows(parts, "training")),
    ]
    for title, table_of, rows in sections:
        measured = [row for row in rows if "failure" not in row]
        if measured:
            blocks += [f"{title}:", _table(table_of(measured))]
    if wrong := wrong_gradients(result):
        blocks += ["WRONG, gradients outside their limits:", "\n".join(f"- {row}" for row in wrong)]
    failures = [_failure(name, row) for name in parts for row in _rows(parts, name) if "failure" in row]
    failures += [_side_failure(name, side) for name in parts for side in _failed_sides(_rows(parts, name))]
    failures += [f"{name}: {part['failure']}" for name, part in parts.items() if "failure" in part]
    if failures:
        blocks += ["Not measured:", "\n".join(f"- {failure}" for failure in dict.fromkeys(failures))]
    return "\n\n".join(blocks)


def wrong_gradients(result: dict[str, Any]) -> list[str]:
    """A line for each gradient whose error is above `ALLOWED_ERRORS`, or not a number."""
    rows = [(name, row) for name in ("parity", "compiled_parity", "sharding") for row in _rows(result["parts"], name)]
    return [
        f"{name}, {', '.join(f'{key} {value}' for key, value in row.items() if key != 'seconds')}"
        for name, row in rows
        if "error" in row and not row["error"] <= ALLOWED_ERRORS[row["precision"]]
    ]


def _rows(parts: dict[str, Any], name: str) -> list[Row]:
    return parts.get(name, {"rows": []})["rows"]


def _table(lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells, the first of them the header, as a Markdown table."""
    header, *rest = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rest))


def _failure(name: str, row: Row) -> str:
    what = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("failure", "seconds"))
    return f"{name}, {what}: {row['failure']}"


def _failed_sides(rows: list[Row]) -> Iterable[Row]:
    for row in rows:
        for pair in row.get("pairs", []):
            yield from (pair[key] for key in ("side", "reference") if pair[key] and pair[key]["failure"])


def _side_failure(name: str, side: Row) -> str:
    return f"{name}, {side['name']}: {side['failure']}"


def _parity(rows: list[Row]) -> list[Sequence[str]]:
    """A line for each network, a column for each form of the step."""
    forms = [(precision, compiled) for compiled in (False, True) for precision in ("float32", "bf16")]
    errors: dict[tuple[str, ...], dict[tuple[str, bool], float]] = {}
    for row in rows:
        case = row["backbone"], row["head"], row["noisy_classification"]
        errors.setdefault(case, {})[row["precision"], row["compiled"]] = row["error"]
    header = ["backbone", "head", "class embedding"]
    header += [precision + (", compiled" if compiled else "") for precision, compiled in forms]
    lines = [
        [*case, *(f"{found[form]:.1e}" if form in found else "" for form in forms)] for case, found in errors.items()
    ]
    return [header, *lines]


def _speed(rows: list[Row]) -> list[Sequence[str]]:
    lines = [("precision", "measured", "ms", "MiB", "against", "ms", "MiB", "ratio of time", "limit")]
    for row in rows:
        for pair in row["pairs"]:
            numbers = ["" if pair[key] is None else f"{pair[key]:.2f}" for key in ("ratio", "limit")]
            lines.append((row["precision"], *_side(pair["side"]), *_side(pair["reference"]), *numbers))
    return lines


def _side(side: Row) -> tuple[str, str, str]:
    if side["median_seconds"] is None:
        return side["name"], "failed", ""
    return side["name"], f"{1e3 * side['median_seconds']:.1f}", _mib(side["peak_bytes"])


def _memory(rows: list[Row]) -> list[Sequence[str]]:
    lines = [("tokens", "attention", "recomputing", "MiB", "s")]
    for row in rows:
        recomputing = "yes" if row["checkpointing"] else "no"
        seconds = f"{row['step_seconds']:.3g}"
        lines.append((f"{row['tokens']:,}", row["attention"], recomputing, _mib(row["peak_bytes"]), seconds))
    return lines


def _sharding(rows: list[Row]) -> list[Sequence[str]]:
    lines = [(row["backbone"], row["precision"], f"{row['error']:.1e}") for row in rows]
    return [("backbone", "precision", "error"), *lines]


def _training(rows: list[Row]) -> list[Sequence[str]]:
    lines = [("steps", "compiled", "first logged loss", "last loss", "gradient error", "accuracy")]
    for row in rows:
        compiled = "yes" if row["compiled"] else "no"
        losses = (f"{row['losses'][position]:.3f}" for position in (0, -1))
        accuracy = f"{row['validation_accuracy']:.1%}"
        lines.append((str(row["steps"]), compiled, *losses, f"{row['gradient_error']:.1e}", accuracy))
    return lines


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f}"
