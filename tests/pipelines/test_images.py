"""Images to pixel values: what is cut off, and the memory that it takes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from latent_egc.pipelines.images import central_crop, preprocess_images

LARGEST_MEMORY = """
import io, resource
from PIL import Image
from latent_egc.data.sources import read_image
from latent_egc.pipelines.images import central_crop, preprocess_images

preprocess_images(Image.new("RGB", (9, 9)), 8)
for mode, width, height in (("RGB", 1, 60000), ("RGB", 60000, 1), ("RGB", 5000, 5000), ("RGBA", 5000, 5000)):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    preprocess_images(read_image(file, "a"), 64)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(10, 8), (8, 8), (37, 11), (12, 48), (300, 200), (5, 7)])
def test_the_crop_is_the_middle_of_the_resized_image(shape):
    image = noise(*shape)
    expected = VaeImageProcessor(resample="lanczos").resize(image, 8, 8, resize_mode="crop")
    assert np.array_equal(central_crop(image, 8), expected)
    assert torch.equal(preprocess_images(central_crop(image, 8), 8), preprocess_images(image, 8))


@pytest.mark.parametrize("shape", [(4, 100), (100, 4)])
def test_a_very_long_image_is_cut_before_it_is_resized(shape):
    """To the same pixels, but for rounding, as PIL image and as tensor."""
    image = noise(*shape)
    whole = VaeImageProcessor(resample="lanczos").resize(image, 8, 8, resize_mode="crop")
    assert np.abs(np.asarray(central_crop(image, 8)).astype(int) - np.asarray(whole)).max() <= 1
    tensor = torch.from_numpy(np.array(image)).movedim(-1, 0)
    scaled = torch.nn.functional.interpolate(tensor[None] / 255, scale_factor=2, mode="bicubic", antialias=True)
    top, left = (side // 2 - 4 for side in scaled.shape[-2:])
    middle = 2 * scaled.clamp(0, 1)[..., top : top + 8, left : left + 8] - 1
    torch.testing.assert_close(preprocess_images(tensor, 8), middle, atol=1e-4, rtol=0)


def test_memory_is_little_more_than_the_decoded_image():
    """Which takes 4 bytes a pixel, 95 MiB here, and twice that where the file is not RGB; in MiB."""
    done = subprocess.run([sys.executable, "-c", LARGEST_MEMORY], check=True, capture_output=True, text=True)
    tall, wide, square, transparent = map(int, done.stdout.split())
    assert max(tall, wide) < 50
    assert square < 150
    assert transparent < 150  # beyond what the square image took
