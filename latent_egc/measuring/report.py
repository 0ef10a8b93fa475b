"""The report: report.json grows suite by suite, report.html and the printed table are drawn from it.

FOLDER/report.json      what was measured, how, and every number; a suite appears in it when it is whole
FOLDER/figures/*.png    the pictures
FOLDER/report.html      all of it in one self-contained page
"""

import base64
import json
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from latent_egc.atomic import replace_text
from latent_egc.config import ConfigError
from latent_egc.measuring.results import Metric, SuiteResult


class Report:
    """A report's folder; an earlier study's finished suites are read back from it.

    Args:
        folder: where to write; made where it does not exist.
        subject: what is studied (pipeline, its fingerprint, ...): plain values. A folder holds one subject's report.
        with_data_images: whether report.html shows the pictures that hold images of the dataset.

    Raises:
        ConfigError: the folder holds another pipeline's report, or one that cannot be read.
    """

    def __init__(self, folder: Path, subject: dict[str, Any], with_data_images: bool = True) -> None:
        self.folder, self.with_data_images = folder, with_data_images
        self.content: dict[str, Any] = {"subject": plain(subject), "suites": {}}
        self._read()
        held = self.content["subject"]
        if held.get("fingerprint") != subject["fingerprint"]:
            raise ConfigError(
                f"{folder} holds a report of another pipeline ({held.get('pipeline')}, {held.get('fingerprint')}); "
                f"this one is {subject['fingerprint']}; choose another folder with --output"
            )

    def _read(self) -> None:
        if (self.folder / "report.json").exists():
            self.content = read_content(self.folder / "report.json")

    def settings_of(self, suite: str) -> dict[str, Any] | None:
        """With what a finished suite was measured; None for one that is not there."""
        return self.content["suites"].get(suite, {}).get("settings")

    def add(
        self, suite: str, result: SuiteResult, settings: dict[str, Any], versions: dict[str, str], seconds: float
    ) -> None:
        """Writes one finished suite: its pictures, then report.json, then report.html."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "figures").mkdir(exist_ok=True)
        figures = []
        for figure in result.figures:
            name = f"figures/{suite}_{figure.name}.png"
            (self.folder / name).write_bytes(figure.png)
            record = {"file": name, "caption": figure.caption, "shows_data": figure.shows_data}
            figures.append(record | ({"curves": plain(figure.curves)} if figure.curves else {}))
        self._read()  # another process may have added its suites meanwhile
        self.content["suites"][suite] = {
            "num_samples": result.num_samples,
            "seconds": round(seconds, 1),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "metrics": plain(result.metrics),
            "tables": plain(result.tables),
            "figures": figures,
            "notes": result.notes,
            "settings": plain(settings),
            "versions": versions,
        }
        replace_text(self.folder / "report.json", json.dumps(self.content, indent=1))
        draw_page(self.folder, self.with_data_images)

    def table(self) -> str:
        """Every metric of every suite as lines of text."""
        lines = [("suite", "metric", "value", "95 % interval")]
        for suite, record in self.content["suites"].items():
            for name, stored in record["metrics"].items():
                metric = read_metric(stored)
                lines.append((suite, name, str(metric), metric.interval_text))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        aligned = ("<", "<", ">", "<")
        return "\n".join(
            "  ".join(f"{text:{a}{w}}" for text, a, w in zip(line, aligned, widths, strict=True)).rstrip()
            for line in lines
        )


def read_content(path: Path) -> dict[str, Any]:
    """What a report.json holds, "subject" and "suites". Raises ConfigError: it is no report."""
    try:
        content = json.loads(path.read_text())
        return {"subject": dict(content["subject"]), "suites": dict(content["suites"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a report of this command: {error!r}; choose another folder") from error


def draw_page(path: Path, with_data_images: bool = True) -> Path:
    """Draws the self-contained page of a report, finished at whatever time.

    Args:
        path: the report's folder, or its JSON file, whatever that is called. The pictures are looked for in figures/
            beside it; those that are not there are left out.
        with_data_images: as for `Report`.

    Returns:
        The page: beside the JSON file, under its name with the ending .html.

    Raises:
        ConfigError: no report there.
    """
    path = path / "report.json" if path.is_dir() else path
    content = read_content(path)

    def picture(file: str) -> str | None:
        place = path.parent / file
        return base64.b64encode(place.read_bytes()).decode() if place.is_file() else None

    loader = jinja2.PackageLoader("latent_egc.measuring", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template("report.html.j2").render(
        content,
        is_shown=lambda figure: with_data_images or not figure.get("shows_data", True),
        picture=picture,
        cell=cell_text,
        metric=read_metric,
        is_number=lambda cell: isinstance(cell, (int, float, dict)),
    )
    page = path.with_suffix(".html")
    replace_text(page, html)
    return page


def read_metric(record: dict[str, Any]) -> Metric:
    """The metric that report.json stores."""
    interval = record["interval"]
    return Metric(record["value"], None if interval is None else tuple(interval), record["percent"])


def cell_text(cell: Any) -> str:
    """A table's cell as shown."""
    if cell is None:
        return ""
    if isinstance(cell, dict):
        return str(read_metric(cell))
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def plain(value: Any) -> Any:
    """What JSON gives back when it has stored `value`; a metric or a table becomes its record."""
    return json.loads(json.dumps(value, default=lambda v: asdict(v) if is_dataclass(v) else v.item()))
