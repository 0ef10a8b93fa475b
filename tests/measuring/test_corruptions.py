"""The 15 corruptions."""

import io
import itertools

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from latent_egc.measuring import corruptions
from latent_egc.measuring.corruptions import FUNCTIONS, PARAMETERS, SEVERITIES, corrupt, published_side

GREY = np.full((64, 64, 3), 128, np.uint8)


@pytest.fixture
def scene() -> np.ndarray:
    """(64, 64, 3) uint8 with edges, colours and the falling spectrum of a photograph."""
    rng = np.random.default_rng(1)
    tiles = [np.kron(rng.random((n, n, 3)), np.ones((90 // n, 90 // n, 1))) for n in (2, 5, 9, 18, 30)]
    layers = [np.roll(layer, rng.integers(90, size=2), (0, 1))[:64, :64] for layer in tiles]
    smooth = scipy.ndimage.gaussian_filter(np.average(layers, axis=0, weights=[9, 6, 4, 2, 1]), (0.7, 0.7, 0))
    return (255 * (smooth - smooth.min()) / np.ptp(smooth)).round().astype(np.uint8)


def mean_distance(scene: np.ndarray, name: str, severity: int) -> float:
    """Root mean square from the clean image, over a few draws."""
    draws = [corrupt(scene, name, severity, np.random.default_rng(i)) for i in range(4)]
    return float(np.sqrt(np.mean((np.stack(draws) - scene.astype(float)) ** 2)))


# --- each of the 15 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shape_range_and_draws(scene, name):
    for side in (8, 32, 64):
        image = scene[:side, :side]
        for severity in SEVERITIES:
            first, again, other = (corrupt(image, name, severity, np.random.default_rng(seed)) for seed in (0, 0, 1))
            assert first.shape == (side, side, 3)
            assert first.dtype == np.uint8
            np.testing.assert_array_equal(first, again)
            random = name not in ("defocus blur", "zoom blur", "brightness", "contrast", "pixelate", "jpeg")
            if side == 64:
                assert (first != image).any()
                assert (first != other).any() == random


# The published parameters of elastic, glass blur and frost do not grow in each of their parts.
@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"elastic", "glass blur", "frost"}))
@pytest.mark.parametrize("side", [32, 64])
def test_distance_grows_with_severity(scene, name, side):
    distances = [mean_distance(scene[:side, :side], name, severity) for severity in SEVERITIES]
    for weaker, stronger in itertools.pairwise(distances):
        assert stronger > 0.97 * weaker, distances
    assert distances[-1] > 1.2 * distances[0]


def test_every_corruption_has_five_severities_of_three_sizes():
    assert list(PARAMETERS) == list(FUNCTIONS)
    assert len(PARAMETERS) == 15
    for by_side in PARAMETERS.values():
        assert list(by_side) == [32, 64, 224]
        assert all(len(severities) == 5 for severities in by_side.values())


def test_published_sides():
    assert [published_side(side) for side in (8, 32, 64, 128, 224, 256, 1024)] == [32, 32, 64, 224, 224, 224, 224]


# --- against the definitions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_its_published_moments(severity):
    """On grey of 128 / 255 little is clipped below a deviation of 0.18."""
    rng, level = np.random.default_rng(0), 128 / 255
    found = corrupt(GREY, "gaussian noise", severity, rng) / 255
    assert found.std() == pytest.approx((0.04, 0.08, 0.12, 0.15, 0.18)[severity - 1], rel=0.03)
    found = corrupt(GREY, "shot noise", severity, rng) / 255
    photons = (250, 100, 50, 30, 15)[severity - 1]
    assert found.std() == pytest.approx((level / photons) ** 0.5, rel=0.05)
    found = corrupt(GREY, "impulse noise", severity, rng)
    share = (0.01, 0.02, 0.05, 0.08, 0.14)[severity - 1]
    assert (found != 128).mean() == pytest.approx(share, rel=0.2)
    assert set(np.unique(found)) == {0, 128, 255}
    assert (found == 0).mean() == pytest.approx(share / 2, rel=0.35)


def test_blurs_keep_the_mean_and_a_point_shows_their_kernel():
    point = np.zeros((64, 64, 3))
    point[32, 32] = 1
    rng = np.random.default_rng(0)
    blurred = corruptions.defocus_blur(point, rng, 3, 0.1)[..., 0]
    assert blurred.sum() == pytest.approx(1)
    assert (blurred > 1e-6).sum() == 29  # points of the plane's grid within a radius of 3
    moved = corruptions._moved(point, 10, 2.0, 0.0)[..., 0]
    expected = np.exp(-(np.arange(21) ** 2) / 8)
    np.testing.assert_allclose(moved[32, 32:11:-1], expected / expected.sum(), atol=1e-9)
    for name, severity in itertools.product(("defocus blur", "glass blur", "motion blur", "zoom blur"), SEVERITIES):
        for side in (32, 64):
            np.testing.assert_allclose(corrupt(GREY[:side, :side], name, severity, rng), 128, atol=1)


def test_zoom_is_scipys(scene):
    x = scene / 255
    for factor in (1.0, 1.07, 2.25):
        kept = int(np.ceil(64 / factor))
        first = (64 - kept) // 2
        enlarged = scipy.ndimage.zoom(x[first : first + kept, first : first + kept], (factor, factor, 1), order=1)
        trimmed = (len(enlarged) - 64) // 2
        expected = enlarged[trimmed : trimmed + 64, trimmed : trimmed + 64]
        np.testing.assert_allclose(corruptions._zoomed(x, factor), expected, atol=1e-9)


def test_glass_takes_every_pixel_from_near():
    """Without blur: each pixel shows where it came from, at most one step up or left."""
    row, column = np.mgrid[:64, :64]
    x = np.stack([row, column, row], axis=2) / 255
    found = 255 * corruptions.glass_blur(x, np.random.default_rng(0), 1e-3, 1, 1)
    up, left = row - found[..., 0], column - found[..., 1]
    inside = slice(2, 64)
    assert set(np.unique(up[inside, inside].round())) == {0, 1}
    assert set(np.unique(left[inside, inside].round())) == {0, 1}
    assert not up[:2].any()


def test_colours_by_hand(scene):
    x = scene / 255
    rng = np.random.default_rng(0)
    brighter = corruptions.brightness(x, rng, 0.2)
    value = x.max(axis=2, keepdims=True)
    np.testing.assert_allclose(brighter, x * np.minimum(value + 0.2, 1) / np.maximum(value, 1e-9), atol=1e-6)
    flatter = corrupt(scene, "contrast", 3, rng) / 255
    np.testing.assert_allclose(flatter.mean(axis=(0, 1)), x.mean(axis=(0, 1)), atol=0.004)
    np.testing.assert_allclose(flatter.std(axis=(0, 1)), 0.2 * x.std(axis=(0, 1)), atol=0.002)


def test_fog_and_frost_are_weighted_sums(scene):
    x = scene / 255
    weighted = corruptions.fog(x, np.random.default_rng(0), 0.7, 3.0)
    cloud = (weighted * (x.max() + 0.7) / x.max() - x) / 0.7
    assert (cloud.min(), cloud.max()) == pytest.approx((0, 1))
    np.testing.assert_allclose(cloud[..., 0], cloud[..., 2], atol=1e-12)
    frosted = corruptions.frost(x, np.random.default_rng(0), 0.9, 0.4)
    texture = (frosted - 0.9 * x) / 0.4
    np.testing.assert_allclose(texture.mean(axis=(0, 1)), [0.57, 0.66, 0.70], atol=0.02)
    assert texture.std(axis=(0, 1)) == pytest.approx(np.full(3, 0.1), abs=0.02)


def test_plasma_halves_its_grid_and_divides_its_amplitude():
    """The spread of what a level adds to the mean of its neighbours, against the level above."""
    ratios = []
    for seed in range(20):
        heights = corruptions._plasma(64, 2.0, np.random.default_rng(seed))
        added = []
        for step in (4, 8):
            grid = heights[:: step // 2, :: step // 2]
            corners = grid[::2, ::2] + np.roll(grid[::2, ::2], -1, 0)
            added.append((grid[1::2, 1::2] - (corners + np.roll(corners, -1, 1)) / 4).std())
        ratios.append(added[1] / added[0])
    assert np.mean(ratios) == pytest.approx(4, rel=0.1)


def test_elastic_maps(scene):
    """Without shifts an affine map of reach 0 is the identity; the corners of a reach say how far it may go."""
    x = scene / 255
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(corruptions.elastic(x, rng, 0, 1.0, 0.0), x, atol=1e-9)
    ramp = np.repeat(np.repeat(np.arange(64.0)[None, :, None], 64, 0), 3, 2)
    shift = corruptions.elastic(ramp, rng, 0, 1.0, 3.0) - ramp
    # Three corners about the centre, each moved by at most 3: so is the centre between two of them.
    assert 0 < abs(shift[32, 32, 0]) <= 3
    assert np.ptp(np.diff(shift[20:44, 20:44, 0], axis=1)) == pytest.approx(0, abs=1e-9)  # affine


def test_files_are_pillows(scene):
    file = io.BytesIO()
    Image.fromarray(scene).save(file, "JPEG", quality=50)
    np.testing.assert_array_equal(corrupt(scene, "jpeg", 3, np.random.default_rng(0)), np.asarray(Image.open(file)))
    half = corrupt(scene, "pixelate", 5, np.random.default_rng(0))
    blocks = scene.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(half[::2, ::2], blocks, atol=1.01)  # Pillow rounds after the rows and the columns
    np.testing.assert_array_equal(half[::2, ::2], half[1::2, 1::2])
