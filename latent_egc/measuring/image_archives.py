"""Many images in one .npz, as the evaluator of ADM (Dhariwal and Nichol, NeurIPS 2021) reads and publishes them.

arr_0 (N, H, W, 3) uint8     the images
arr_1 (N,) int64             their classes, where there are any
mu (D,), sigma (D, D)        mean and covariance of Inception features, of a reference set alone
"""

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from tqdm.auto import tqdm

from latent_egc.atomic import replace_file
from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.autoencoders import encode_moments, latents_from_moments
from latent_egc.data.sources import ImageTable
from latent_egc.data.views import central_view
from latent_egc.measuring.context import chosen_rows
from latent_egc.pipelines.latents import decode_latents


@dataclass(frozen=True)
class ImageArchive:
    """What an .npz holds."""

    path: str
    images: torch.Tensor | None  # (N, 3, H, W) uint8
    labels: np.ndarray | None  # (N,) int64
    moments: tuple[np.ndarray, np.ndarray] | None  # (D,) and (D, D) float64


def read_archive(path: str, key: str, image_size: int) -> ImageArchive:
    """Reads an .npz of images, of moments, or of both.

    Args:
        path: of the file.
        key: of the setting that names it.
        image_size: the images' height and width, which those in the file must have.

    Raises:
        ConfigError: no such file, or one that holds neither, or anything of another shape or type.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("arr_0", "arr_1", "mu", "sigma") if name in file.files}
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: no such file: {path}") from error
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{key}: {path} is not an .npz file of arrays: {error}") from error
    images, labels, mean, covariance = map(arrays.get, ("arr_0", "arr_1", "mu", "sigma"))
    if images is None and (mean is None or covariance is None):
        raise ConfigError(f"{key}: {path} must hold images as arr_0 or statistics as mu and sigma, as ADM's files do")
    wanted = (image_size, image_size, 3)
    if images is not None and (images.dtype != np.uint8 or images.shape[1:] != wanted or len(images) < 5):
        raise ConfigError(
            f"{key}: arr_0 of {path} must hold at least 5 images (N, {', '.join(map(str, wanted))}) uint8, the "
            f"pipeline's size, got {images.shape} {images.dtype}"
        )
    if labels is not None and (images is None or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ConfigError(f"{key}: arr_1 of {path} must hold an integer for each image, got {labels.shape}")
    moments = None if mean is None or covariance is None else (mean.astype(np.float64), covariance.astype(np.float64))
    if moments is not None and (mean.ndim != 1 or covariance.shape != 2 * mean.shape):
        raise ConfigError(f"{key}: mu (D,) and sigma (D, D) of {path} are {mean.shape} and {covariance.shape}")
    return ImageArchive(
        path,
        None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2),
        None if labels is None else labels.astype(np.int64),
        moments,
    )


def write_archive(file: Path, images: Iterable[np.ndarray], count: int, labels: Sequence[int] | None) -> None:
    """Writes images as `np.savez` does, one by one: all of them may be more than memory holds.

    Args:
        file: for it; not whole before this returns.
        images: `count` of them, (H, W, 3) uint8 each and of one size.
        count: N.
        labels: (N,), or None.
    """
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for number, image in enumerate(images):
                if number == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *image.shape)}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(image.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as stream:
                np.lib.format.write_array(stream, np.array(labels, dtype=np.int64))


def write_split(
    table: ImageTable, data: DataConfig, file: Path, count: int | None, seed: int, vae: ModelMixin | None = None
) -> int:
    """Writes centre crops of a split, and their classes if they have any, as a reference; returns how many.

    Args:
        table: the split.
        data: its section, which says the size and whether corrupt images are skipped.
        file: for them; whole or as it was.
        count: how many, drawn by the seed and in the split's order as `generation.num_reference_images` are; None: all.
        seed: of the choice.
        vae: through which they go and back, as samples were decoded; None: as they are.

    Raises:
        CorruptImageError: an unreadable image, unless `data.skip_corrupt`.
    """
    rows = chosen_rows(np.arange(len(table)), count, seed)
    if data.skip_corrupt:
        rows = np.array([row for row in rows if table.is_readable(row)], dtype=np.int64)
    labels = table.labels[rows]

    def crops() -> Iterator[np.ndarray]:
        for row in tqdm(rows, desc="crop", unit="image"):
            crop = central_view(table.image(row), data.image_size)
            if vae is not None:
                crop = _decoded(vae, crop)
            yield ((crop / 2 + 0.5).permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    replace_file(file, lambda path: write_archive(path, crops(), len(rows), labels if (labels >= 0).all() else None))
    return len(rows)


@torch.no_grad()
def _decoded(vae: ModelMixin, crop: torch.Tensor) -> torch.Tensor:
    """An image (3, H, W) in [-1, 1] through the autoencoder and back."""
    latents = latents_from_moments(vae, encode_moments(vae, crop[None]))
    return decode_latents(vae, latents)[0].float().cpu()
