"""Pictures of a run and of what its network says: sample grids, training curves, certificates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import einops
import matplotlib
import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from PIL import Image
from tqdm.auto import tqdm

from latent_egc.config import SamplingConfig
from latent_egc.data.stream import noise_generator
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.images import preprocess_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.textpath import TextPath


def sample_rows(
    pipeline: EGCPipeline,
    class_ids: Sequence[int] | None,
    images_per_row: int,
    num_inference_steps: int,
    seed: int = 0,
    batch_size: int = 40,
    **arguments: Any,
) -> np.ndarray:
    """Samples in [0, 1], one row a class; the same seed in every call gives the same starting noise.

    Args:
        pipeline: what samples; its progress bar is replaced by one over batches.
        class_ids: one a row; None: unlabelled, `images_per_row` rows.
        num_inference_steps, arguments: what the pipeline's call takes.
        seed: the image in row r, column c starts from `noise_generator(seed, r * images_per_row + c)`.

    Returns:
        (rows, columns, H, W, 3) float32 in [0, 1].
    """
    num_rows = images_per_row if class_ids is None else len(class_ids)
    total = num_rows * images_per_row
    images = []
    pipeline.set_progress_bar_config(disable=True)
    for first in tqdm(range(0, total, batch_size), desc="sample", leave=False):
        numbers = range(first, min(first + batch_size, total))
        generators = [noise_generator(seed, number) for number in numbers]
        if class_ids is None:
            labels, per_label = None, len(numbers)
        else:
            labels, per_label = [class_ids[number // images_per_row] for number in numbers], 1
        images.append(
            pipeline(
                labels,
                num_images_per_label=per_label,
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="np",
                batch_size=batch_size,
                **arguments,
            ).images
        )
    pipeline.set_progress_bar_config(disable=False)
    return einops.rearrange(np.concatenate(images), "(r c) h w d -> r c h w d", r=num_rows)


@torch.no_grad()
def with_noised_copy(
    pipeline: EGCPipeline, image: PipelineImageInput, sigma: float, noise: str, generator: torch.Generator
) -> np.ndarray:
    """An image, and one of the copies that vote in `EGCPipeline.certify`.

    Args:
        pipeline: what certifies.
        image: one.
        sigma, noise: as for `certify`; noised "latents" are decoded.
        generator: of the noise.

    Returns:
        (2, H, W, 3) float32 in [0, 1].
    """
    pixel_values = preprocess_images(image, pipeline.image_size).to(pipeline.device)
    of_pixels = noise == "pixels"
    clean = pixel_values if of_pixels else pipeline.encode(pixel_values)
    drawn = torch.randn(clean.shape, generator=generator).to(clean)
    noised = clean + (2 if of_pixels else 1) * sigma * drawn
    both = torch.cat([pixel_values, noised if of_pixels else pipeline.decode(noised).to(pixel_values)])
    return (both / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()


@dataclass(frozen=True)
class Panel:
    """A grid of images and what is written around it.

    Args:
        images: (rows, columns, H, W, 3) in [0, 1].
        row_names: of each row, at its left; may have several lines.
        title: above all.
        column_names: of each column, above it; may have several lines.
    """

    images: np.ndarray
    row_names: Sequence[str] | None = None
    title: str = ""
    column_names: Sequence[str] | None = None

    @property
    def head(self) -> float:
        """Height in inches of what is above the images."""
        return (0.35 if self.title else 0.05) + 0.13 * max(map(_num_lines, self.column_names or [""]))

    def sheet(self) -> Image.Image:
        """The images beside each other.

        Small ones are enlarged by a whole factor, pixel by pixel, so that nothing is invented between pixels.
        """
        factor, gap = max(1, round(64 / self.images.shape[2])), 2
        images = np.pad(self.images, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1.0)
        sheet = einops.rearrange(images, "r c h w d -> (r h) (c w) d")
        size = (sheet.shape[1] * factor, sheet.shape[0] * factor)
        sheet = Image.fromarray((sheet * 255).round().clip(0, 255).astype(np.uint8))
        return sheet.resize(size, Image.Resampling.NEAREST)


def _num_lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _width(text: str) -> float:
    """Of text of size 9, in inches."""
    return max(TextPath((0, 0), line, size=9).get_extents().width if line else 0.0 for line in text.split("\n")) / 72


def save_grid(images: np.ndarray, path: str | Path, row_names: Sequence[str] | None = None, title: str = "") -> None:
    """`save_panels` of one panel."""
    save_panels([Panel(images, row_names, title)], path)


def save_panels(panels: Sequence[Panel], path: str | Path, file_format: str = "png") -> None:
    """Writes panels, one above another, as a PNG or, with `file_format` "jpg", as a smaller JPEG."""
    dpi = 100
    sheets = [panel.sheet() for panel in panels]
    names = [_width(name) for panel in panels for name in panel.row_names or []]
    name_width = max(names) + 0.2 if names else 0.05
    width = name_width + max(max(sheet.width / dpi, _width(p.title)) for p, sheet in zip(panels, sheets, strict=True))
    height = sum(panel.head + sheet.height / dpi for panel, sheet in zip(panels, sheets, strict=True))
    figure, top = plt.figure(figsize=(width, height), dpi=dpi), height
    for panel, sheet in zip(panels, sheets, strict=True):
        rows, columns = panel.images.shape[:2]
        if panel.title:
            figure.text(name_width / width, (top - 0.12) / height, panel.title, va="top", fontsize=9, color="0.25")
        top -= panel.head
        for column, name in enumerate(panel.column_names or []):
            x = name_width + (column + 0.5) * sheet.width / columns / dpi
            figure.text(x / width, (top + 0.02) / height, name, ha="center", va="bottom", fontsize=7.5)
        bottom = top - sheet.height / dpi
        axes = figure.add_axes(
            (name_width / width, bottom / height, sheet.width / dpi / width, sheet.height / dpi / height)
        )
        axes.imshow(sheet, interpolation="none", aspect="auto")
        axes.set_axis_off()
        for row, name in enumerate(panel.row_names or []):
            y = top - (row + 0.5) * sheet.height / rows / dpi
            figure.text((name_width - 0.08) / width, y / height, name, ha="right", va="center", fontsize=9)
        top = bottom
    options = {"quality": 85} if file_format == "jpg" else {"optimize": True}
    figure.savefig(path, dpi=dpi, format=file_format, pil_kwargs=options)
    plt.close(figure)


def save_samples(pipeline: EGCPipeline, config: SamplingConfig, step: int, path: Path) -> None:
    """Writes a PNG of a run's samples at `step`, a row a class, from the same noise every time."""
    names = list(pipeline.id2label.values())[: config.max_classes] or None
    class_ids = None if names is None else list(range(len(names)))
    images = sample_rows(
        pipeline, class_ids, config.num_images_per_label, config.num_inference_steps, batch_size=config.batch_size
    )
    guidance = "unguided" if names is None else f"guidance {config.guidance_scale:g}"
    save_grid(images, path, names, f"step {step}, {guidance}, {config.num_inference_steps} steps")


def save_curves(metrics: list[dict[str, float]], path: str | Path) -> None:
    """Writes a PNG of the losses over the steps: training as a line, validation as points, accuracy in a panel."""

    def series(key: str) -> tuple[list[float], list[float]]:
        rows = [row for row in metrics if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    panels = [("denoising_loss", "validation_denoising_loss", "denoising loss")]
    if any(row.get("classification_loss") for row in metrics):
        panels.append(("classification_loss", None, "classification loss"))
    if any("validation_accuracy" in row for row in metrics):
        panels.append((None, "validation_accuracy", "validation accuracy"))
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", squeeze=False
    )
    for axes, (train_key, validation_key, name) in zip(all_axes[0], panels, strict=True):
        if train_key is not None:
            steps, values = series(train_key)
            axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
            window = max(1, len(values) // 25)
            if values:
                padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
                smooth = np.convolve(padded, np.ones(window) / window, mode="valid")
                axes.plot(steps, smooth, color="tab:blue", label="training")
            axes.set_yscale("log")
        if validation_key is not None:
            axes.plot(*series(validation_key), color="tab:orange", marker="o", markersize=4, label="validation (EMA)")
        if name == "validation accuracy":
            axes.set_ylim(0, 1.02)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def save_certificates(
    pairs: Sequence[np.ndarray],
    names: Sequence[str],
    radii: Sequence[float],
    largest: float,
    path: str | Path,
    radius_name: str,
) -> None:
    """Writes a PNG with a row an image: the image, a noised copy as the classifier saw many, and its radius as a bar.

    Args:
        pairs: image and copy, (2, H, W, 3) in [0, 1] each.
        names: what is said of each.
        radii: of each; 0 where the classifier abstained.
        largest: what the number of votes allows, drawn as a line.
        path: of the PNG.
        radius_name: and its unit.
    """
    grid = {"squeeze": False, "width_ratios": (1, 1, 4.5), "layout": "constrained"}
    figure, rows = plt.subplots(len(pairs), 3, figsize=(6.5, 0.35 + 0.95 * len(pairs)), **grid)
    for (*pictures, bar), pair, name, radius in zip(rows, pairs, names, radii, strict=True):
        for axes, picture in zip(pictures, pair, strict=True):
            axes.imshow(picture.clip(0, 1), interpolation="nearest")
            axes.set_axis_off()
        bar.barh([0], [radius], height=0.35, color="tab:blue")
        bar.axvline(largest, color="0.5", linestyle="--", linewidth=1)
        bar.text(0, 0.42, name, ha="left", va="center", fontsize=9)
        bar.set(xlim=(0, 1.08 * largest or 1), ylim=(-0.4, 0.65), yticks=[])
        bar.spines[["top", "right"]].set_visible(False)
        bar.tick_params(labelbottom=bar is rows[-1, 2], labelsize=8)
    rows[-1, 2].set_xlabel(f"{radius_name}; dashed: the largest that so many votes can have", fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
