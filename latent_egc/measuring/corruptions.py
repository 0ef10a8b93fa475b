"""The 15 common corruptions, for square RGB images of any size.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(ICLR 2019). The parameters are those of its published code. The kept packages that apply them (imagecorruptions,
imgcorr) hold those for 224 px only and do not import beside current setuptools and scikit-image.

Each function below takes an image (H, H, 3) in [0, 1], a generator and one severity's parameters, and returns an image
whose values `corrupt` clips. Lengths are in pixels.
"""

import functools
import io
import math
from collections.abc import Callable

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from scipy.signal import fftconvolve

SEVERITIES = (1, 2, 3, 4, 5)

# Parameters of the five severities (of the functions below, in their order), by the side of the images that they were
# published for: CIFAR-10-C (32 px), Tiny-ImageNet-C (64 px) and ImageNet-C (224 px).
PARAMETERS = {
    "gaussian noise": {  # standard deviation
        32: (0.04, 0.06, 0.08, 0.09, 0.10),
        64: (0.04, 0.08, 0.12, 0.15, 0.18),
        224: (0.08, 0.12, 0.18, 0.26, 0.38),
    },
    "shot noise": {32: (500, 250, 100, 75, 50), 64: (250, 100, 50, 30, 15), 224: (60, 25, 12, 5, 3)},
    "impulse noise": {  # share of the values
        32: (0.01, 0.02, 0.03, 0.05, 0.07),
        64: (0.01, 0.02, 0.05, 0.08, 0.14),
        224: (0.03, 0.06, 0.09, 0.17, 0.27),
    },
    "defocus blur": {  # radius, its own blur
        32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    "glass blur": {  # blur, reach of the shuffle, repeats
        32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        224: ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    },
    "motion blur": {  # radius, standard deviation along the way
        32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    "zoom blur": {  # end of the range of factors that begins at 1, its step
        32: ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        64: ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        224: ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    },
    "snow": {  # mean, deviation, zoom and threshold of the flakes; radius and deviation of their motion; image's weight
        32: (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        64: (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        224: (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    },
    "frost": {  # weights of the image and of the frost
        32: ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        64: ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        224: ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    },
    "fog": {  # weight, decay of the fractal
        32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    },
    "brightness": {32: (0.05, 0.1, 0.15, 0.2, 0.3), 64: (0.1, 0.2, 0.3, 0.4, 0.5), 224: (0.1, 0.2, 0.3, 0.4, 0.5)},
    "contrast": {32: (0.75, 0.5, 0.4, 0.3, 0.15), 64: (0.4, 0.3, 0.2, 0.1, 0.05), 224: (0.4, 0.3, 0.2, 0.1, 0.05)},
    "elastic": {  # size and smoothness of the local shifts, reach of the affine map's corners
        32: ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
        64: ((0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)),
        224: ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    },
    "pixelate": {32: (0.95, 0.9, 0.85, 0.75, 0.65), 64: (0.9, 0.8, 0.7, 0.6, 0.5), 224: (0.6, 0.5, 0.4, 0.3, 0.25)},
    "jpeg": {32: (80, 65, 58, 50, 40), 64: (65, 58, 50, 40, 25), 224: (25, 18, 15, 10, 7)},  # quality
}


def published_side(side: int) -> int:
    """The published image side whose parameters serve images of this one: the nearest in ratio."""
    return min(PARAMETERS["jpeg"], key=lambda published: abs(math.log(side / published)))


def corrupt(pixels: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A corrupted image.

    Args:
        pixels: (H, H, 3) uint8.
        name: a key of `PARAMETERS`.
        severity: 1 to 5.
        rng: of the corruption's randomness; the result is a function of it and the other arguments.

    Returns:
        (H, H, 3) uint8.
    """
    parameters = PARAMETERS[name][published_side(len(pixels))][severity - 1]
    parameters = parameters if isinstance(parameters, tuple) else (parameters,)
    corrupted = FUNCTIONS[name](pixels / 255, rng, *parameters)
    # Truncated, as the published sets are; the addend keeps 255 (k / 255) from falling below k.
    return (255 * corrupted.clip(0, 1) + 1e-6).astype(np.uint8)


def gaussian_noise(x: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Normal noise, as of a sensor in low light."""
    return x + sigma * rng.standard_normal(x.shape)


def shot_noise(x: np.ndarray, rng: np.random.Generator, photons: float) -> np.ndarray:
    """Poisson noise of counted light."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Salt and pepper, in each channel for itself."""
    return np.where(rng.random(x.shape) < share, rng.integers(0, 2, x.shape), x)


def defocus_blur(x: np.ndarray, rng: np.random.Generator, radius: float, blur: float) -> np.ndarray:
    """Convolution with a softened disk."""
    softening = 1 if radius <= 8 else 2
    reach = int(radius) + softening
    row, column = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (row**2 + column**2 <= radius**2).astype(float)
    kernel = gaussian_filter(disk / disk.sum(), blur, radius=softening, mode="constant")
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return fftconvolve(padded, kernel[:, :, None], mode="valid", axes=(0, 1))


def glass_blur(x: np.ndarray, rng: np.random.Generator, sigma: float, reach: int, repeats: int) -> np.ndarray:
    """Blurred, every pixel replaced by one near it, blurred again."""
    side = len(x)
    rows = np.arange(side - reach, reach, -1)[:, None]
    columns = rows.T
    source = list(range(side * side))
    for _ in range(repeats):
        down, right = rng.integers(-reach, reach, (2, len(rows), len(rows)))
        pixels = (rows * side + columns).ravel().tolist()
        neighbours = ((rows + down) * side + columns + right).ravel().tolist()
        # One after the other: a neighbour may have been replaced before. The published code means to swap the two, but
        # its sides are views of one array, so that it copies.
        for pixel, neighbour in zip(pixels, neighbours, strict=True):
            source[pixel] = source[neighbour]
    blurred = np.floor(255 * _blurred(x, sigma) + 1e-6) / 255
    return _blurred(blurred.reshape(-1, 3)[source].reshape(x.shape), sigma)


def motion_blur(x: np.ndarray, rng: np.random.Generator, radius: int, sigma: float) -> np.ndarray:
    """Smeared along a direction of at most 45 degrees."""
    return _moved(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: np.ndarray, rng: np.random.Generator, end: float, step: float) -> np.ndarray:
    """The mean of the image and its enlargements."""
    return np.mean([x, *(_zoomed(x, factor) for factor in np.arange(1, end, step))], axis=0)


def _blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _moved(x: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Half a Gaussian along a direction, 2 radius + 1 pixels long, on the grid: ImageMagick's motion blur."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angle, last = math.radians(degrees), len(x) - 1
    down = np.ceil(steps * math.sin(angle) - 0.5).astype(int)
    right = np.ceil(steps * math.cos(angle) - 0.5).astype(int)
    position = np.arange(len(x))
    smeared = np.zeros_like(x)
    for i, weight in enumerate(weights / weights.sum()):
        smeared += weight * x[np.ix_((position + down[i]).clip(0, last), (position + right[i]).clip(0, last))]
    return smeared


@functools.lru_cache(maxsize=256)
def _zoom_matrix(side: int, factor: float) -> np.ndarray:
    """(side, side): linear interpolation of the middle of a line, enlarged to the line's length."""
    kept = math.ceil(side / factor)
    first = (side - kept) // 2
    enlarged = zoom(np.eye(side)[first : first + kept], (factor, 1), order=1)
    trimmed = (len(enlarged) - side) // 2
    return enlarged[trimmed : trimmed + side]


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    matrix = _zoom_matrix(len(x), float(factor))
    return np.einsum("ip,jq,pqc->ijc", matrix, matrix, x, optimize=True)


def snow(x: np.ndarray, rng: np.random.Generator, *parameters: float) -> np.ndarray:
    """A whitened image under two layers of falling flakes, one the other turned round."""
    mean, deviation, factor, threshold, radius, sigma, weight = parameters
    flakes = _zoomed(rng.normal(mean, deviation, (*x.shape[:2], 1)), factor)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _moved(flakes, radius, sigma, rng.uniform(-135, -45))
    grey = x @ np.array([0.299, 0.587, 0.114])
    whitened = weight * x + (1 - weight) * np.maximum(x, 1.5 * grey[:, :, None] + 0.5)
    return whitened + flakes + np.rot90(flakes, 2)


def frost(x: np.ndarray, rng: np.random.Generator, weight: float, frost_weight: float) -> np.ndarray:
    """The image under frost.

    The original adds crops of five photographs of frost. This texture is ours: the ridges of a fractal, with the
    photographs' mean colour and a contrast like theirs.
    """
    ridges = -abs(_plasma(len(x), 1.3, rng) - 0.5)
    ridges = (ridges - ridges.mean()) / ridges.std()
    texture = np.array([0.57, 0.66, 0.70]) + 0.1 * ridges[:, :, None]
    return weight * x + frost_weight * texture.clip(0, 1)


def fog(x: np.ndarray, rng: np.random.Generator, weight: float, decay: float) -> np.ndarray:
    """The image under a cloud, its brightest value kept."""
    brightest = x.max()
    return (x + weight * _plasma(len(x), decay, rng)[:, :, None]) * brightest / (brightest + weight)


def brightness(x: np.ndarray, rng: np.random.Generator, addend: float) -> np.ndarray:
    """A brighter image of the same hue and saturation."""
    hue, saturation, value = np.moveaxis(rgb_to_hsv(x), 2, 0)
    return hsv_to_rgb(np.stack([hue, saturation, (value + addend).clip(0, 1)], axis=2))


def _plasma(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """(side, side) in [0, 1] before it is cropped: a fractal by the diamond-square algorithm on a torus.

    Each halving of the grid divides the amplitude of the random part by decay^2.
    """
    heights, amplitude = np.zeros((1, 1)), 1.0
    while len(heights) < side:
        noise = amplitude * rng.uniform(-1, 1, (3, *heights.shape))
        pairs = heights + np.roll(heights, -1, 0)
        centres = (pairs + np.roll(pairs, -1, 1)) / 4 + noise[0]
        finer = np.empty((2 * len(heights), 2 * len(heights)))
        finer[::2, ::2], finer[1::2, 1::2] = heights, centres
        finer[::2, 1::2] = (heights + np.roll(heights, -1, 1) + centres + np.roll(centres, 1, 0)) / 4 + noise[1]
        finer[1::2, ::2] = (pairs + centres + np.roll(centres, 1, 1)) / 4 + noise[2]
        heights, amplitude = finer, amplitude / decay**2
    heights -= heights.min()
    return (heights / heights.max())[:side, :side]


def contrast(x: np.ndarray, rng: np.random.Generator, factor: float) -> np.ndarray:
    """Every channel drawn to its mean."""
    mean = x.mean(axis=(0, 1))
    return mean + factor * (x - mean)


def elastic(x: np.ndarray, rng: np.random.Generator, size: float, smoothness: float, reach: float) -> np.ndarray:
    """A random affine map, then random local shifts."""
    side = len(x)
    corners = side // 2 + side // 3 * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = corners + rng.uniform(-reach, reach, corners.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # [row, column, 1] @ back: where from
    grid = np.stack(np.mgrid[:side, :side], axis=2)
    shifts = gaussian_filter(rng.uniform(-1, 1, grid.shape), (smoothness, smoothness, 0), mode="reflect", truncate=3)
    return _sampled(_sampled(x, grid @ back[:2] + back[2], "mirror"), grid + size * shifts, "reflect")


def pixelate(x: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Made smaller and large again by averages of boxes."""
    side = len(x)
    small = _to_image(x).resize((int(side * share), int(side * share)), Image.Resampling.BOX)
    return np.asarray(small.resize((side, side), Image.Resampling.BOX)) / 255


def jpeg(x: np.ndarray, rng: np.random.Generator, quality: int) -> np.ndarray:
    """Through a JPEG file."""
    file = io.BytesIO()
    _to_image(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def _sampled(x: np.ndarray, places: np.ndarray, mode: str) -> np.ndarray:
    """Values of an image at places (H, H, 2), by linear interpolation."""
    channels = np.moveaxis(x, 2, 0)
    return np.stack([map_coordinates(c, np.moveaxis(places, 2, 0), order=1, mode=mode) for c in channels], axis=2)


def _to_image(x: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * x).round().astype(np.uint8))


# The paper's four groups.
CATEGORIES: dict[str, dict[str, Callable[..., np.ndarray]]] = {
    "noise": {"gaussian noise": gaussian_noise, "shot noise": shot_noise, "impulse noise": impulse_noise},
    "blur": {
        "defocus blur": defocus_blur,
        "glass blur": glass_blur,
        "motion blur": motion_blur,
        "zoom blur": zoom_blur,
    },
    "weather": {"snow": snow, "frost": frost, "fog": fog, "brightness": brightness},
    "digital": {"contrast": contrast, "elastic": elastic, "pixelate": pixelate, "jpeg": jpeg},
}
FUNCTIONS = {name: function for group in CATEGORIES.values() for name, function in group.items()}
