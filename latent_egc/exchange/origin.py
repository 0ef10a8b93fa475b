"""Where a pipeline comes from: its run and step, its folder or its Hub id; and what is written there of it.

What was measured is read where it was written down: a run's metrics.jsonl and the report of `latent-egc evaluate` in
its folder, or the model card of an exported folder or a repository of the Hub.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from latent_egc.training.checkpoints import read_metrics, read_record, resolve_pipeline


@dataclass(frozen=True)
class Origin:
    """What is known of a pipeline besides itself.

    Args:
        place: of the pipeline, as a reader calls it.
        measured: lines, each with where it was found; empty where nothing was written down.
        license: as its model card's metadata name it; None where they do not, or there is no card.
    """

    place: str
    measured: list[str] = field(default_factory=list)
    license: str | None = None


def find_origin(name: str) -> Origin:
    """The origin of what `resolve_pipeline` makes of a name, whose errors it raises."""
    source = resolve_pipeline(name)
    if isinstance(source, str):
        try:
            card = ModelCard.load(source)
        except EntryNotFoundError:  # a repository without a card; or one that cannot be asked for it
            return Origin(f"Hub id {source}")
        return Origin(f"Hub id {source}", list(_said_by(card)), card.data.license)
    if (source.parent / "checkpoint.json").is_file():
        step = read_record(source.parent).global_step
        return _of_run(source.parents[2], step, f"checkpoint of step {step}")
    if source.name == "pipeline" and (source.parent / "metrics.jsonl").is_file():
        return _of_run(source.parent, None, "its last pipeline")
    if not (source / "README.md").is_file():
        return Origin(f"folder {source}")
    card = ModelCard((source / "README.md").read_text(errors="replace"), ignore_metadata_errors=True)
    return Origin(f"folder {source}", list(_said_by(card)), card.data.license)


def _of_run(run: Path, last_step: int | None, what: str) -> Origin:
    """Of a pipeline in a run's folder; of `last_step`, or None: of the last one there is."""
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    metrics = [row for row in metrics if last_step is None or row["step"] <= last_step]
    if last_step is None and metrics:
        what = f"{what}, step {metrics[-1]['step']}"
    measured = []
    evaluations = [row for row in metrics if "validation_denoising_loss" in row]
    if evaluations:
        measured = [f"{_listed(evaluations[-1])} (metrics.jsonl, step {evaluations[-1]['step']})"]
    if last_step is None and (run / "evaluation" / "report.json").is_file():
        measured += _said_by_report(run / "evaluation" / "report.json")
    return Origin(f"run {run}, {what}", measured)


def _said_by_report(path: Path) -> Iterator[str]:
    """The first number of each suite, the main one."""
    try:
        for suite, record in json.loads(path.read_text())["suites"].items():
            name, metric = next(iter(record["metrics"].items()))
            value = f"{100 * metric['value']:.2f} %" if metric["percent"] else f"{metric['value']:.4g}"
            yield f"{name} {value} ({suite}, evaluation/report.json)"
    except (ValueError, KeyError, TypeError, StopIteration):
        yield f"{path} is no report"


def _said_by(card: ModelCard) -> Iterator[str]:
    """The numbers of a card that `latent_egc.exchange.model_card` wrote: of a report, the first of each suite."""
    section = card.text.partition("\n## Measured\n")[2].partition("\n## ")[0]
    for suite, table in re.findall(r"^### (\w+),.*\n\n((?:\|.*\n?)+)", section, re.M):
        if first := re.search(r"^\| *([^|]*[^| ]) *\| *([^|]*[^| ]) *\|", "\n".join(table.splitlines()[2:])):
            yield f"{first[1]} {first[2]} ({suite}, model card)"
    numbers = {name: float(value) for name, value in re.findall(r"^\| (\w+) \| (-?\d[\d.e+-]*) \|$", section, re.M)}
    if numbers:
        yield f"{_listed(numbers)} (model card)"


def _listed(numbers: dict[str, float]) -> str:
    """Without the step, and the parts of the loss by quarter of t."""
    shown = {name: value for name, value in numbers.items() if not re.fullmatch(r"step|\w+_q\d", name)}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
