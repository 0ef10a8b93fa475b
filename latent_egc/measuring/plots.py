"""The report's pictures, as PNG bytes in one style."""

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import einops
import matplotlib
import numpy as np
from PIL import Image

from latent_egc.measuring.results import Curves, Metric

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 130
LINE_STYLES = ("-", "--", ":", "-.")


def _axes() -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(5.0, 3.4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    return _file(figure, "png", {})


def _file(figure: Figure, kind: str, metadata: Mapping[str, None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    plt.close(figure)
    return buffer.getvalue()


def lines(
    x: Sequence[float] | Sequence[str],
    series: Mapping[str, Sequence[float | Metric]],
    x_name: str,
    y_name: str,
    y_limits: tuple[float, float] | None = None,
    level: tuple[float, str] | None = None,
) -> bytes:
    """Curves over one axis.

    Args:
        x: positions of the points, or their names.
        series: name -> values at `x`; the intervals of metrics are drawn as a shade.
        y_limits: of the vertical axis, None: by the data.
        level: a horizontal line's height and its name.
    """
    figure, axes = _axes()
    for name, points in series.items():
        metrics = [point if isinstance(point, Metric) else Metric(point) for point in points]
        (line,) = axes.plot(x, [metric.value for metric in metrics], marker="o", markersize=3.5, label=name)
        bounds = zip(*(metric.interval or (metric.value,) * 2 for metric in metrics), strict=True)
        axes.fill_between(x, *bounds, color=line.get_color(), alpha=0.15, linewidth=0)
    if level is not None:
        axes.axhline(level[0], color="0.5", linestyle="--", linewidth=1, label=level[1])
    axes.set(xlabel=x_name, ylabel=y_name)
    if y_limits is not None:
        axes.set_ylim(*y_limits)
    if len(series) > 1 or level is not None:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def overlaid(curves: Mapping[str, Curves], kind: Literal["png", "pdf"] = "png") -> bytes:
    """Several networks' curves of one quantity over one axis: a colour a network, a style of line a series.

    Args:
        curves: network -> its curves; axes are named by the first.
        kind: of the file.
    """
    figure, axes = _axes()
    first = next(iter(curves.values()))
    names = list(dict.fromkeys(name for own in curves.values() for name in own.series))
    for number, (network, own) in enumerate(curves.items()):
        for name, (x, points) in own.series.items():
            style = {"color": f"C{number % 10}", "linestyle": LINE_STYLES[names.index(name) % len(LINE_STYLES)]}
            marker = {"marker": "o", "markersize": 3} if len(x) <= 20 else {}
            metrics = [point if isinstance(point, Metric) else Metric(point) for point in points]
            label = f"{network}, {name}" if name else network
            axes.plot(x, [metric.value for metric in metrics], label=label, linewidth=1.2, **style, **marker)
            bounds = zip(*(metric.interval or (metric.value,) * 2 for metric in metrics), strict=True)
            axes.fill_between(x, *bounds, color=style["color"], alpha=0.12, linewidth=0)
    if first.aims_at_diagonal:
        axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel=first.x_name, ylabel=first.y_name)
    axes.legend(frameon=False, fontsize=7)
    return _file(figure, kind, {"CreationDate": None} if kind == "pdf" else {})


def panels(
    curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float | Metric]]]],
    x_name: str,
    marked: Mapping[str, tuple[float, float]],
    logarithmic: Collection[str] = (),
) -> bytes:
    """Panels side by side, the same curves of several quantities.

    Args:
        curves: quantity -> name of the curve -> x and y of its points.
        x_name: the axis of all panels.
        marked: quantity -> x and y of a point that is circled.
        logarithmic: quantities whose axis is.
    """
    figure, row = plt.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.4), layout="constrained", squeeze=False)
    for axes, (quantity, lines_of) in zip(row[0], curves.items(), strict=True):
        for name, (x, points) in lines_of.items():
            values = [point.value if isinstance(point, Metric) else point for point in points]
            axes.plot(x, values, marker="o", markersize=3.5, linewidth=1.2, label=name)
        axes.plot(*marked[quantity], "o", markersize=11, fillstyle="none", color="black", label="chosen")
        axes.set(title=quantity, xlabel=x_name)
        axes.title.set_fontsize(10)
        if quantity in logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axes.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
    handles, names = row[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False, fontsize=8)
    return _png(figure)


def histograms(values: Mapping[str, np.ndarray], x_name: str) -> bytes:
    """Overlaid histograms of the same quantity for several sets."""
    figure, axes = _axes()
    together = np.concatenate(list(values.values()))
    edges = np.histogram_bin_edges(together, bins=min(50, max(10, len(together) // 10)))
    for name, sample in values.items():
        axes.hist(sample, edges, density=True, alpha=0.55, label=name)
    axes.set(xlabel=x_name, ylabel="density")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Rows are true classes, columns predicted ones, coloured by the share of the row; few classes also show counts."""
    num_classes, few = len(names), len(names) <= 20
    side = min(8.0, 2.2 + 0.42 * num_classes)
    figure, axes = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, shrink=0.75, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if few:
        axes.set_xticks(range(num_classes), names, rotation=50, ha="right", fontsize=8)
        axes.set_yticks(range(num_classes), names, fontsize=8)
        for row, column in np.argwhere(counts > 0):
            color = "white" if shares[row, column] > 0.55 else "0.25"
            axes.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    return _png(figure)


def heat_map(
    values: np.ndarray,
    row_names: Sequence[str],
    column_names: Sequence[str],
    names: tuple[str, str, str],
    marked: tuple[int, int] | None = None,
    decimals: int = 1,
) -> bytes:
    """A matrix as coloured, numbered cells.

    Args:
        values: (R, C), shown with so many `decimals`.
        row_names, column_names: R and C of them.
        names: of the rows' axis, the columns' axis and the values.
        marked: row and column of a cell that is framed.
    """
    num_rows, num_columns = values.shape
    size = (min(12.0, 2.6 + 0.56 * num_columns), min(12.0, 1.4 + 0.34 * num_rows))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axes, label=names[2])
    axes.set(ylabel=names[0], xlabel=names[1])
    turned = max(map(len, column_names)) > 5
    axes.set_xticks(range(num_columns), column_names, fontsize=8, **({"rotation": 50, "ha": "right"} if turned else {}))
    axes.set_yticks(range(num_rows), row_names, fontsize=8)
    middle = (values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value < middle else "black"
        axes.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", fontsize=7, color=color)
    if marked is not None:
        corner = (marked[1] - 0.5, marked[0] - 0.5)
        axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2))
    return _png(figure)


def reliability_diagram(edges: np.ndarray, bins: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> bytes:
    """Accuracy against confidence, a panel for each classifier, the number of images below.

    Args:
        edges: (B + 1,), of the confidence bins.
        bins: title -> mean confidence, accuracy and count (B,) of each bin; NaN in an empty one.
    """
    size, grid = (3.6 * len(bins), 4.2), {"squeeze": False, "sharex": True, "height_ratios": (3, 1)}
    figure, panels = plt.subplots(2, len(bins), figsize=size, layout="constrained", **grid)
    centres, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    for (upper, lower), (title, (confidence, accuracy, count)) in zip(panels.T, bins.items(), strict=True):
        upper.bar(centres, accuracy, width * 0.94, color="tab:blue", alpha=0.75, label="accuracy")
        upper.plot(confidence, confidence, "o", color="tab:orange", markersize=3.5, label="mean confidence")
        upper.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1)
        upper.set(xlim=(0, 1), ylim=(0, 1), title=title, ylabel="accuracy")
        upper.legend(fontsize=8, loc="upper left", edgecolor="none", framealpha=0.9)  # over the bars
        lower.bar(centres, count, width * 0.94, color="0.6")
        lower.set(xlabel="confidence", ylabel="images")
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def image_grid(images: np.ndarray, row_names: Sequence[str] | None = None, gap_after: int | None = None) -> bytes:
    """Images side by side, enlarged by a whole factor, pixel by pixel.

    Args:
        images: (rows, columns, H, W, 3) in [0, 1].
        row_names: at the left of the rows.
        gap_after: a wider gap after this many columns.
    """
    rows, height, width = images.shape[0], *images.shape[2:4]
    factor, gap = max(1, round(64 / height)), max(1, height // 24)
    images = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1.0)
    sheet = einops.rearrange(images, "r c h w d -> (r h) (c w) d")
    if gap_after is not None:
        at = gap_after * (width + gap)
        sheet = np.concatenate([sheet[:, :at], np.ones((len(sheet), height // 3, 3)), sheet[:, at:]], axis=1)
    size = (sheet.shape[1] * factor, sheet.shape[0] * factor)
    sheet = Image.fromarray((sheet * 255).round().clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    name_width = 0.075 * max(map(len, row_names)) + 0.2 if row_names else 0.0
    figure_width, figure_height = name_width + size[0] / DPI, size[1] / DPI
    figure = plt.figure(figsize=(figure_width, figure_height), dpi=DPI)
    axes = figure.add_axes((name_width / figure_width, 0, 1 - name_width / figure_width, 1))
    axes.imshow(sheet, interpolation="none", aspect="auto")
    axes.set_axis_off()
    for row, name in enumerate(row_names or []):
        y = 1 - (row + 0.5) / rows
        figure.text((name_width - 0.1) / figure_width, y, name, ha="right", va="center", fontsize=8)
    return _png(figure)
