"""Several reports beside each other: one table for a paper, and their curves over one axis.

A number is called the best, and is in bold, only among reports that judged the same images and as many of them.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latent_egc.atomic import replace_file
from latent_egc.config import ConfigError
from latent_egc.measuring import plots
from latent_egc.measuring.meaning import data_meaning
from latent_egc.measuring.report import read_content, read_metric
from latent_egc.measuring.results import Curves, Metric

# By a metric's name: of no direction, the smaller the better, the larger the better. The first that fits counts.
NEUTRAL = r"deviation|N\(0, I\)|^the judge|^chosen|^temperature$|through the autoencoder"
SMALLER = r"NLL|Brier|ECE|FD-|KID-|error|FPR95|bits per dimension"
LARGER = r"accuracy|precision|recall|agreement|AUROC|AUPR|Inception score|no attack|FGSM|PGD|AutoAttack"


@dataclass(frozen=True)
class Row:
    """One line of the table: a suite's heading, or a metric."""

    name: str
    cells: list[Metric | str | None]  # one for each report; None: it has not this
    best: tuple[int, ...] = ()  # numbers of the best
    is_heading: bool = False


@dataclass(frozen=True)
class Comparison:
    """What `compare` makes of some reports."""

    names: list[str]  # of the reports
    rows: list[Row]
    notes: list[str]  # why some numbers do not compare
    curves: dict[str, dict[str, Curves]]  # name of a file -> name of a report -> its curves


def read_reports(sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What reports hold, by the names that they get in the table.

    Args:
        sources: a report's folder or JSON file each, or NAME=REPORT; without NAME it is that of the pipeline's folder,
            or as much of its path as tells it from the others.

    Raises:
        ConfigError: no report there, or two of one name.
    """
    found: dict[str, dict[str, Any]] = {}
    contents, names = [], []
    for source in sources:
        name, separator, place = source.partition("=")
        if not separator or Path(source).exists():
            name, place = "", source
        path = Path(place)
        contents.append(read_content(path / "report.json" if path.is_dir() else path))
        names.append(name)
    paths = [Path(str(content["subject"].get("pipeline"))).parts for content in contents]
    for number, (name, content) in enumerate(zip(names, contents, strict=True)):
        others = [path for i, path in enumerate(paths) if i != number and not names[i]]
        depth = next((n for n in range(1, 9) if all(p[-n:] != paths[number][-n:] for p in others)), 1)
        name = name or "/".join(paths[number][-depth:])
        if name in found:
            raise ConfigError(f"two reports are called {name!r}; name them apart, as in NAME=REPORT")
        found[name] = content
    return found


def compare(reports: Mapping[str, Mapping[str, Any]], only: Collection[str] = ()) -> Comparison:
    """Puts reports beside each other.

    Args:
        reports: name -> content, as `read_reports` gives them.
        only: words; what is kept are the metrics whose name, or whose suite's, holds one of them in any case; none
            of them: all.

    Raises:
        ConfigError: no metric is left.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for suite in dict.fromkeys(suite for content in reports.values() for suite in content["suites"]):
        records = [content["suites"].get(suite) for content in reports.values()]
        metrics = dict.fromkeys(metric for record in records if record for metric in record["metrics"])
        kept = [m for m in metrics if not only or any(word.lower() in f"{suite} {m}".lower() for word in only)]
        if not kept:
            continue
        rows.append(Row(suite, [_how_many(record) for record in records], is_heading=True))
        same_images = len({_judged(record) for record in records if record}) == 1
        for metric in kept:
            cells = [
                read_metric(record["metrics"][metric]) if record and metric in record["metrics"] else None
                for record in records
            ]
            rows.append(Row(metric, cells, _best(metric, cells) if same_images else ()))
        different = _different(record["settings"] for record in records if record)
        why = [] if same_images else ["of other images, or of another number of them, so that none is called the best"]
        why += [f"with different {', '.join(different)}"] if different else []
        notes += [f"{suite}: measured {'; '.join(why)}"] if why else []
    if not rows:
        raise ConfigError("no metric in these reports" + (f" has any of {list(only)} in its name" if only else ""))
    return Comparison(list(reports), rows, notes, _curves(reports, {row.name for row in rows if row.is_heading}))


def _how_many(record: Mapping[str, Any] | None) -> str | None:
    """Images and seed."""
    if record is None:
        return None
    seed = record["settings"].get("seed")
    return f"n = {record['num_samples']:,}" + ("" if seed is None else f", seed {seed}")


def _judged(record: Mapping[str, Any]) -> str:
    """Which images, and how many; networks of other sizes may judge the same ones."""
    data = data_meaning(record["settings"].get("data") or {})
    return repr(sorted((data | {"image_size": None, "num_samples": record["num_samples"]}).items()))


def _best(metric: str, cells: Sequence[Metric | None]) -> tuple[int, ...]:
    """Numbers of the best cells, of several that are equal all; none where there is nothing to compare."""
    values = [cell.value for cell in cells if cell is not None]
    if len(values) < 2 or re.search(NEUTRAL, metric):
        return ()
    for pattern, choice in ((SMALLER, min), (LARGER, max)):
        if re.search(pattern, metric):
            return tuple(i for i, cell in enumerate(cells) if cell is not None and cell.value == choice(values))
    return ()


def _different(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the settings, but for the seed, that are not the same in all of them."""
    flat = []
    for values in settings:
        values = {**values, "data": data_meaning(values.get("data") or {})}
        own: dict[str, Any] = {}
        for key, value in values.items():
            own |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        flat.append(own)
    keys = dict.fromkeys(key for own in flat for key in own if key not in ("seed", "batch_size"))
    return [key for key in keys if any(own.get(key) != flat[0].get(key) for own in flat)]


def _curves(reports: Mapping[str, Mapping[str, Any]], suites: Collection[str]) -> dict[str, dict[str, Curves]]:
    """The curves of these suites, by the file that they go to; older reports have none."""
    found: dict[str, dict[str, Curves]] = {}
    for name, content in reports.items():
        for suite, record in content["suites"].items():
            for figure in record["figures"] if suite in suites else ():
                for stored in figure.get("curves", ()):
                    series = {
                        key: (x, [read_metric(point) if isinstance(point, dict) else point for point in y])
                        for key, (x, y) in stored["series"].items()
                    }
                    file = re.sub(r"\W+", "_", f"{suite}_{figure['file'].rpartition(suite + '_')[2][:-4]}")
                    if len(figure["curves"]) > 1:
                        file += "_" + re.sub(r"\W+", "_", stored["y_name"])
                    found.setdefault(file, {})[name] = Curves(**{**stored, "series": series})
    return found


def markdown(comparison: Comparison) -> str:
    """The table and its notes as Markdown."""
    lines = [["", *map(_markdown_text, comparison.names)], ["---", *["---:"] * len(comparison.names)]]
    for row in comparison.rows:
        cells = []
        for number, cell in enumerate(row.cells):
            text = _markdown_text("" if cell is None else str(cell))
            text = f"**{text}**" if number in row.best else text
            interval = cell.interval_text if isinstance(cell, Metric) else ""
            cells.append(f"{text} ({interval})" if interval else text)
        name = _markdown_text(row.name)
        lines.append([f"**{name}**" if row.is_heading else name, *cells])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([table, "", *(f"- {_markdown_text(note)}" for note in comparison.notes)]).rstrip() + "\n"


def latex(comparison: Comparison) -> str:
    """The table as LaTeX for the package booktabs; the notes are comments above it."""
    lines = ["% needs \\usepackage{booktabs}", *(f"% {note}" for note in comparison.notes)]
    lines += [f"\\begin{{tabular}}{{l{'r' * len(comparison.names)}}}", "\\toprule"]
    lines.append(" & ".join(["", *map(_latex_text, comparison.names)]) + r" \\")
    for row in comparison.rows:
        cells = []
        for number, cell in enumerate(row.cells):
            text = _latex_text("" if cell is None else str(cell))
            text = f"\\textbf{{{text}}}" if number in row.best else text
            interval = cell.interval_text if isinstance(cell, Metric) else ""
            cells.append(f"{text} {{\\footnotesize ({_latex_text(interval)})}}" if interval else text)
        name = _latex_text(row.name)
        lines += ["\\midrule"] if row.is_heading else []
        lines.append(" & ".join([f"\\textit{{{name}}}" if row.is_heading else name, *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def _latex_text(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def draw(comparison: Comparison, folder: Path, kind: Literal["png", "pdf"]) -> list[Path]:
    """Writes a picture of each quantity of which a report has curves, and returns their files."""
    paths = []
    for name, curves in comparison.curves.items():
        picture = plots.overlaid(curves, kind)
        paths.append(folder / f"{name}.{kind}")
        replace_file(paths[-1], lambda unfinished, picture=picture: unfinished.write_bytes(picture))
    return paths
