"""Images to pixel values."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import load_image

EXIF_ORIENTATION = 0x0112
# Of the part of an image that is resized.
MAX_ASPECT_RATIO = 4


def preprocess_images(images: PipelineImageInput, size: int) -> torch.Tensor:
    """Images of any size -> a batch, the shorter side resized to `size` and the centre cropped.

    Args:
        images: a PIL image (any mode; its EXIF orientation is applied), a numpy array (H, W, 3) or (N, H, W, 3), a
            tensor (3, H, W) or (N, 3, H, W), or a list of one of these. Arrays and tensors are in [0, 1], or uint8.
        size: height and width of the result, in pixels.

    Returns:
        (N, 3, size, size) in [-1, 1], on the CPU for PIL and numpy, differentiable for tensors.

    Raises:
        ValueError: no image, wrong type, wrong channel count, or values that are not finite or outside [0, 1].
    """
    return 2 * crop_images(images, size) - 1


def crop_images(images: PipelineImageInput, size: int) -> torch.Tensor:
    """As `preprocess_images`, in [0, 1]; 8-bit images of this size are their bytes over 255."""
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError("images must hold at least one image, got none")
    return torch.cat([_crop_one(image, size) for image in images])


def crop_masks(masks: Any, images: PipelineImageInput, size: int) -> torch.Tensor:
    """Masks as large as their images -> what of the cropped images they mark.

    Args:
        masks: one for all images or one each: a PIL image (any mode), an array or tensor (H, W), (1, H, W) or
            (N, 1, H, W) in [0, 1], uint8 or bool; or a list of them. From one half on, white, a pixel is marked.
        images: as for `preprocess_images`.
        size: height and width of the result.

    Returns:
        (N, 1, size, size) bool, on the CPU.

    Raises:
        ValueError: a mask of another size than its image, or neither one mask nor one each.
    """
    images = single_images(images)
    masks = [_as_channels_first(mask) for mask in single_images(masks)]
    if len(masks) not in (1, len(images)):
        raise ValueError(f"mask_image must be one or one for each of {len(images)} images, got {len(masks)}")
    masks = masks * len(images) if len(masks) == 1 else masks
    for mask, image in zip(masks, images, strict=True):
        found, wanted = tuple(mask.shape[-2:]), _height_and_width(image)
        if found != wanted:
            raise ValueError(f"mask_image must be as large as its image, {wanted} (height, width), got {found}")
    return crop_images([mask.expand(3, -1, -1) for mask in masks], size)[:, :1] >= 0.5


def single_images(images: Any) -> list[Any]:
    """What may be one image, a batch, or a list of either, as a list of single images. Raises ValueError on none."""
    given = images if isinstance(images, (list, tuple)) else [images]
    one_by_one = [image for entry in given for image in (entry if getattr(entry, "ndim", 3) == 4 else [entry])]
    if not one_by_one:
        raise ValueError("images must hold at least one image, got none")
    return one_by_one


def _as_channels_first(mask: Any) -> torch.Tensor:
    """A mask as (1, H, W) on the CPU, uint8 or float."""
    if hasattr(mask, "convert"):
        mask = VaeImageProcessor.pil_to_numpy(load_rgb(mask).convert("L"))[0]
    mask = torch.as_tensor(mask).cpu()
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or mask.shape[0] != 1:
        raise ValueError(f"mask_image must be (H, W) or (1, H, W), got shape {tuple(mask.shape)}")
    return mask.float() if mask.dtype == torch.bool else mask


def _height_and_width(image: Any) -> tuple[int, int]:
    """Of one image, upright."""
    if hasattr(image, "convert"):
        return load_rgb(image).size[::-1]
    height, width = image.shape[-2:] if torch.is_tensor(image) else image.shape[:2]
    return height, width


def load_rgb(image: Any) -> Any:
    """A PIL image of any mode as an upright RGB image: EXIF orientation applied, 16-bit grey and floats as 8 bits.

    One that is RGB and upright is returned itself, since a copy of a large one takes half a gigabyte.

    Raises:
        ValueError: a float image whose values are neither in [0, 1] nor in [0, 255].
    """
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert would clip to white
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode == "F":  # Pillow's convert takes them as 0 to 255, which makes those in [0, 1] black
        lowest, highest = image.getextrema()
        if not 0 <= lowest <= highest <= 255:
            raise ValueError(f"a float image must be in [0, 1] or [0, 255], got {lowest:g} to {highest:g}")
        if highest <= 1:
            image = image.point(lambda value: value * 255 + 0.5)
        image = image.convert("L")
    if image.getexif().get(EXIF_ORIENTATION, 1) == 1:
        return image if image.mode == "RGB" else image.convert("RGB")
    return load_image(image)


def central_crop(image: Any, size: int) -> Any:
    """A PIL image of any mode and size -> (size, size) RGB: shorter side resized, centre cropped.

    Raises ValueError as `load_rgb`.
    """
    image = load_rgb(image)
    box = _central_box(*image.size)
    image = image if box == (0, 0, *image.size) else image.crop(box)
    return VaeImageProcessor(resample="lanczos").resize(image, size, size, resize_mode="crop")


def _central_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is resized: all, or the middle of an image that is very long, whose other parts
    would be enlarged (a 1 x 60000 image to gigabytes) and cut off.
    """
    longest = MAX_ASPECT_RATIO * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return left, top, min(width, left + longest), min(height, top + longest)


def _crop_one(image: Any, size: int) -> torch.Tensor:
    if hasattr(image, "convert"):  # a PIL image
        processor = VaeImageProcessor()
        return processor.numpy_to_pt(processor.pil_to_numpy(central_crop(image, size)))
    if not torch.is_tensor(image):
        if not hasattr(image, "__array__"):
            raise ValueError(f"images must be PIL images, numpy arrays or tensors, got {type(image).__name__}")
        array = torch.as_tensor(image)
        image = array.movedim(-1, -3) if array.ndim in (3, 4) else array
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(
            "images must have 3 channels: arrays (N, H, W, 3), tensors (N, 3, H, W); as channels first this is "
            f"{tuple(image.shape)}"
        )
    if batch.dtype == torch.uint8:
        batch = batch / 255
    if not batch.is_floating_point():
        raise ValueError(f"images must be uint8 or floats in [0, 1], got {batch.dtype}")
    if not (batch.isfinite().all() and batch.min() >= 0 and batch.max() <= 1):
        raise ValueError(f"images must be in [0, 1], got {batch.min().item():g} to {batch.max().item():g}")
    left, top, right, bottom = _central_box(batch.shape[-1], batch.shape[-2])
    batch = batch[..., top:bottom, left:right]
    height, width = batch.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        resized = (max(size, round(height * scale)), max(size, round(width * scale)))
        batch = F.interpolate(batch, resized, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
        batch = batch[..., top : top + size, left : left + size]
    return batch
