"""EditingPipeline: what an energy network does with images that there are already.

Two ways lead from an image to noise. Drawn noise brings variety: `image_to_image` and `inpaint`, by whatever scheduler
the pipeline has. The probability flow's own noise, found by DDIM inversion, brings the image back: `invert`,
`reconstruct`, `interpolate`, `edit_class` and `counterfactual`, by DDIM up and down, whatever the scheduler.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from latent_egc.methods.editing import slerp

from .class_names import ClassLabels
from .counterfactual import Counterfactuals
from .editing_steps import EditingGuidance
from .images import crop_images, crop_masks
from .sampling_checks import check_start
from .schedulers import check_scheduler, last_timesteps, step_options


class EditingPipeline(Counterfactuals):
    """Edits images.

    Images are as `preprocess_images` takes them, one or many, and come back at the pipeline's `image_size`. Labels are
    one for all images or one each. A network pass is one forward and one backward pass of all images in it; each
    method says how many it takes.
    """

    # --- drawn noise ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def image_to_image(
        self,
        image: PipelineImageInput,
        class_labels: ClassLabels | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        classifier_free_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple:
        """Noises images and denoises them. SDEdit, Meng et al. (ICLR 2022).

        strength * num_inference_steps network passes.

        Args:
            image: one or many; an image is given several times to have it in several forms.
            class_labels: what it shall be; None leaves that open, without guidance.
            strength: how much of the image is given up, in [0, 1]: 0 leaves what the autoencoder makes of it, 1 is
                sampling, from noise alone.
            num_inference_steps: of the whole way from noise; the last share `strength` of them is gone.
            guidance_scale, classifier_free_scale, guidance_interval: as for sampling, see `EGCPipeline.__call__`.
            generator: one for all images, or one an image (an image then does not depend on its batch).
            output_type: "pil", "np", "pt" (images in [0, 1]) or "latent" (scaled latents).
            return_dict: False returns a tuple.
            batch_size: images at once; None: what memory surely holds, by their size.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: an argument that does not fit, by name.
        """
        original = self._begin(image, output_type, num_inference_steps, batch_size, strength)
        guidance = self._guidance(len(original), class_labels, guidance_scale, classifier_free_scale, guidance_interval)
        edited = self._renoise(original, None, guidance, strength, num_inference_steps, generator, batch_size)
        return self._finish(edited, output_type, return_dict)

    @torch.no_grad()
    def inpaint(
        self,
        image: PipelineImageInput,
        mask_image: Any,
        class_labels: ClassLabels | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        classifier_free_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        paste: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple:
        """Paints anew what a mask marks; before each step the rest is the original, noised to that step.

        strength * num_inference_steps network passes. A latent position is painted anew if the mask marks any of its
        pixels.

        Args:
            image: one or many.
            mask_image: as large as the image, white where it is painted anew; one for all or one each, see
                `crop_masks`.
            class_labels, strength, num_inference_steps: as for `image_to_image`; the strength is that of the marked
                part.
            paste: the pixels that are not marked are those of the image, to the bit, cropped as `crop_images` does;
                else they are what the autoencoder makes of them. Latents are never pasted.
            guidance_scale, classifier_free_scale, guidance_interval, generator, output_type, return_dict, batch_size:
                as for `image_to_image`.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: an argument that does not fit, by name, as a mask of another size than its image.
        """
        masks = crop_masks(mask_image, image, self.image_size)
        original = self._begin(image, output_type, num_inference_steps, batch_size, strength)
        guidance = self._guidance(len(original), class_labels, guidance_scale, classifier_free_scale, guidance_interval)
        marked = F.max_pool2d(masks.float(), self.vae_scale_factor).to(original.device) > 0
        edited = self._renoise(original, marked, guidance, strength, num_inference_steps, generator, batch_size)
        if not paste or output_type == "latent":
            return self._finish(edited, output_type, return_dict)
        pixels = crop_images(image, self.image_size).to(edited.device, torch.float32)
        pasted = torch.where(masks.to(edited.device), self._decode_to_unit_range(edited), pixels)
        return self._finish(edited, output_type, return_dict, pasted)

    def _renoise(
        self,
        original: torch.Tensor,
        marked: torch.Tensor | None,
        guidance: EditingGuidance,
        strength: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        batch_size: int | None,
    ) -> torch.Tensor:
        """Latents (N, C, h, w), noised and denoised; only those that are `marked` (N, 1, h, w), None: all."""
        check_start(generator, None, len(original), (None, None))
        check_scheduler(self.scheduler, self.energy_model)
        call = self._own_call()
        noise = randn_tensor(original.shape, generator=generator, device=original.device, dtype=original.dtype)

        def denoised(rows: slice) -> torch.Tensor:
            self._set_steps(call, num_inference_steps)
            scheduler, clean, drawn = call.scheduler, original[rows], noise[rows]
            timesteps = last_timesteps(scheduler, num_inference_steps, strength)

            def noised(step: int) -> torch.Tensor:
                """The original, as it stands before a step; clean before the one that there is not."""
                return scheduler.add_noise(clean, drawn, timesteps[step, None]) if step < len(timesteps) else clean

            def with_known(latents: torch.Tensor, step: int) -> torch.Tensor:
                return torch.where(marked[rows], latents, noised(step + 1))

            start = drawn * scheduler.init_noise_sigma if strength == 1 else noised(0)
            of_each = generator[rows] if isinstance(generator, list) else generator
            return call._denoise(
                start if marked is None else with_known(start, -1),
                self._guided(call, guidance.of(rows)),
                step_options(scheduler, of_each, 0.0),
                timesteps=timesteps,
                between=None if marked is None else with_known,
            )

        return self._in_batches(denoised, len(original), batch_size)

    # --- the flow's own noise ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def invert(
        self,
        images: PipelineImageInput,
        num_inference_steps: int = 50,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 0.0,
        num_refinements: int = 1,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """The noise of which images are made: the latents from which DDIM comes back to them.

        (1 + num_refinements) * num_inference_steps network passes. With the same labels, scale and steps,
        `pipeline(latents=...)` with `default_scheduler` gives the images back, up to the autoencoder and to what the
        refinements leave; other schedulers and steps, up to their own error too. There is no chance in it.

        Args:
            images: one or many.
            num_inference_steps: of DDIM.
            class_labels, guidance_scale: along which energy; None and 0: the unguided one's.
            num_refinements: of each step, see `ddim_inversion`; 0 is the usual inversion.
            batch_size: images at once; None: what memory surely holds, by their size.

        Returns:
            (N, C, h, w) at DDIM's highest noise level, nearly standard normal, on the pipeline's device.

        Raises:
            ValueError: an argument that does not fit, by name.
        """
        if not isinstance(num_refinements, int) or num_refinements < 0:
            raise ValueError(f"num_refinements must be at least 0, got {num_refinements!r}")
        original = self._begin(images, "latent", num_inference_steps, batch_size)
        guidance = self._guidance(len(original), class_labels, guidance_scale)
        noise = self._up(original, guidance, num_inference_steps, 1.0, batch_size, num_refinements)
        self.maybe_free_model_hooks()
        return noise

    @torch.no_grad()
    def reconstruct(
        self,
        images: PipelineImageInput,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Images to their noise and back, unguided: what the inversion keeps of them.

        3 * num_inference_steps network passes, two thirds of them up. Arguments, result and errors are those of
        `invert` and `image_to_image`.
        """
        original = self._begin(images, output_type, num_inference_steps, batch_size)
        unguided = self._guidance(len(original))
        noise = self._up(original, unguided, num_inference_steps, 1.0, batch_size)
        edited = self._down(noise, unguided, num_inference_steps, 1.0, batch_size)
        return self._finish(edited, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: PipelineImageInput,
        image_b: PipelineImageInput,
        num_images: int = 8,
        class_labels: ClassLabels | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """From one image to another: the images of the noise between their noises (slerp). No chance in it.

        4 * num_inference_steps network passes of the N pairs' images up, num_inference_steps of all images down.

        Args:
            image_a, image_b: one or many, as many of each.
            num_images: of each pair, at least 2; the first and the last are the pair, reconstructed.
            class_labels: what all images of a pair shall be on the way down; None: unguided, which alone brings the
                pair itself back.
            num_inference_steps: of DDIM.
            guidance_scale: as for sampling.
            output_type, return_dict, batch_size: as for `image_to_image`.

        Returns:
            `ImagePipelineOutput` with N * num_images `images`, pair by pair, or `(images,)`.

        Raises:
            ValueError: an argument that does not fit, by name.
        """
        if not isinstance(num_images, int) or num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {num_images!r}")
        ends = [self._begin(images, output_type, num_inference_steps, batch_size) for images in (image_a, image_b)]
        num_pairs = len(ends[0])
        if len(ends[1]) != num_pairs:
            raise ValueError(f"image_b must be as many images as image_a, {num_pairs}, got {len(ends[1])}")
        guidance, unguided = self._guidance(num_pairs, class_labels, guidance_scale), self._guidance(num_pairs)
        guidance = guidance.of(torch.arange(num_pairs).repeat_interleave(num_images))
        first, second = (self._up(latents, unguided, num_inference_steps, 1.0, batch_size) for latents in ends)
        between = slerp(first, second, torch.linspace(0, 1, num_images)).flatten(0, 1)
        edited = self._down(between, guidance, num_inference_steps, 1.0, batch_size)
        return self._finish(edited, output_type, return_dict)

    @torch.no_grad()
    def edit_class(
        self,
        image: PipelineImageInput,
        class_labels: ClassLabels,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """The image as one of another class: to its own noise unguided, and back guided. No chance in it.

        Of its noise comes what the image has besides its class, as its slant and stroke. Unlike `image_to_image` it
        gives the image back where guidance has nothing to change, and unlike `counterfactual` nothing holds it near.
        3 * strength * num_inference_steps network passes.

        Args:
            image: one or many.
            class_labels: what it shall become.
            strength: the share of the way to noise, in [0, 1].
            num_inference_steps: of DDIM, for the whole way.
            guidance_scale: as for sampling.
            output_type, return_dict, batch_size: as for `image_to_image`.

        Returns:
            `ImagePipelineOutput` with `images`, or `(images,)`.

        Raises:
            ValueError: an argument that does not fit, by name.
        """
        if class_labels is None:
            raise ValueError("edit_class needs class_labels, got None")
        original = self._begin(image, output_type, num_inference_steps, batch_size, strength)
        guidance = self._guidance(len(original), class_labels, guidance_scale)
        unguided = self._guidance(len(original))
        noise = self._up(original, unguided, num_inference_steps, strength, batch_size)
        edited = self._down(noise, guidance, num_inference_steps, strength, batch_size)
        return self._finish(edited, output_type, return_dict)
