"""Counterfactuals: the smallest change of an image after which the classifier says another class."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput

from .class_names import ClassLabels
from .editing_steps import EditingSteps
from .images import crop_images


@dataclass
class EGCCounterfactualOutput(BaseOutput):
    """N images, changed until the classifier says another class, and how far they are from what they were.

    Distances are l2, of the pixels with values in [0, 1]. The pixels' holds what the autoencoder alone changes, which
    is given beside it. Whether another classifier agrees is not known here: the suite `counterfactual` asks one.

    Args:
        images: as the call's `output_type` says.
        labels_before: what the classifier says of the originals.
        labels_asked: what it shall say.
        labels_after: what it says of the images, decoded and encoded again.
        flipped: (N,) bool, whether it says what was asked for now and did not before.
        guidance_scales: (N,), with which each was made.
        latent_distance: (N,) between the originals' latents and those that were decoded.
        pixel_distance: (N,) between the originals and the images.
        autoencoder_distance: (N,) between the originals and these through the autoencoder; 0 in pixel space.
    """

    images: Any
    labels_before: list[str]
    labels_asked: list[str]
    labels_after: list[str]
    flipped: torch.Tensor
    guidance_scales: torch.Tensor
    latent_distance: torch.Tensor
    pixel_distance: torch.Tensor
    autoencoder_distance: torch.Tensor


class Counterfactuals(EditingSteps):
    """One way of editing; see `EditingPipeline`."""

    @torch.no_grad()
    def counterfactual(
        self,
        images: PipelineImageInput,
        class_labels: ClassLabels | None = None,
        strength: float = 0.8,
        distance_scale: float = 0.3,
        guidance_scale: float | None = None,
        num_doublings: int = 4,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        batch_size: int | None = None,
    ) -> EGCCounterfactualOutput:
        """The smallest change that is found after which the classifier says another class. No chance in it.

        As `edit_class`, with a potential that holds the image near to the original (`methods.editing.held_near`). The
        weakest guidance that flips it is taken: the scale is doubled for the images that have not flipped.
        (3 + num_doublings) * strength * num_inference_steps network passes at most, and 2 + num_doublings forward
        passes of the classifier.

        Args:
            images: one or many.
            class_labels: what the classifier shall say; None: what is second to it now.
            strength: the share of the way to noise, in [0, 1].
            distance_scale: how strongly it is held near; 0 is not at all.
            guidance_scale: the first one that is tried, above 0; None: the one stored with the pipeline.
            num_doublings: how often it is doubled at most.
            num_inference_steps: of DDIM, for the whole way.
            output_type, batch_size: as for `image_to_image`.

        Returns:
            `EGCCounterfactualOutput`, its tensors on the CPU. Images that never flipped are those of the last scale.

        Raises:
            ValueError: an argument that does not fit, by name, or a model without classes.
        """
        if not (distance_scale >= 0 and math.isfinite(distance_scale)):
            raise ValueError(f"distance_scale must be finite and not negative, got {distance_scale}")
        if not isinstance(num_doublings, int) or num_doublings < 0:
            raise ValueError(f"num_doublings must be at least 0, got {num_doublings!r}")
        original = self._begin(images, output_type, num_inference_steps, batch_size, strength)
        pixels = crop_images(images, self.image_size).float().cpu()
        before = self.classify(pixels, batch_size=batch_size).logits
        asked = before.topk(2).indices[:, 1] if class_labels is None else class_labels
        guidance = self._guidance(len(original), asked, guidance_scale)
        asked, before = guidance.labels.cpu(), before.argmax(dim=1)
        unguided = self._guidance(len(original))
        noise = self._up(original, unguided, num_inference_steps, strength, batch_size)

        autoencoder_distance = l2_distance(self._decode_to_unit_range(original).cpu(), pixels)
        edited, found, after = original.clone(), torch.empty_like(pixels), before.clone()
        scales, left = torch.zeros(len(original)), torch.arange(len(original))
        for doubling in range(num_doublings + 1):
            stronger = replace(guidance.of(left), scale=guidance.scale * 2**doubling)
            edited[left] = self._down(
                noise[left], stronger, num_inference_steps, strength, batch_size, (original[left], distance_scale)
            )
            found[left] = self._decode_to_unit_range(edited[left]).cpu()
            after[left] = self.classify(found[left], batch_size=batch_size).logits.argmax(dim=1)
            scales[left] = stronger.scale
            left = left[after[left] != asked[left]]
            if len(left) == 0:
                break

        names = self.id2label
        return EGCCounterfactualOutput(
            images=self._finish(edited, output_type, True, found).images,
            labels_before=[names[i] for i in before.tolist()],
            labels_asked=[names[i] for i in asked.tolist()],
            labels_after=[names[i] for i in after.tolist()],
            flipped=(after == asked) & (before != asked),
            guidance_scales=scales,
            latent_distance=l2_distance(edited, original),
            pixel_distance=l2_distance(found, pixels),
            autoencoder_distance=autoencoder_distance,
        )


def l2_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Between the rows of two tensors (N, ...): (N,) on the CPU."""
    return (first - second).flatten(1).norm(dim=1).cpu()
