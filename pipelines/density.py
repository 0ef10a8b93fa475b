"""The density of images: by the flow of the energy, with an error, or where it was trained for it, in one pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from latent_egc.methods.density import estimated_log_normalizer, one_pass_log_density
from latent_egc.methods.likelihood import log_density
from latent_egc.models.noise_schedule import add_noise
from latent_egc.models.potentials import energy_potential

from .class_names import ClassLabels
from .energy_pipeline import EnergyPipeline
from .images import preprocess_images
from .sampling_checks import check_start


@dataclass
class EGCDensityOutput(BaseOutput):
    """The density of the latents of N images, noised to timestep 0: float64, on the CPU.

    Args:
        log_density: (N,), natural logarithm.
        bits_per_dimension: (N,), -log2 of the density over the number of dimensions; low = likely. Of continuous
            values, so that it may be negative, and does not compare with another autoencoder's.
        solver_error: (N,) in nats, what log_density is too much because the ODE was solved in finite steps, estimated;
            None for method "one_pass".
        trace_error: (N,) in nats, the standard error from the random estimates of the divergence; None likewise.
    """

    log_density: torch.Tensor
    bits_per_dimension: torch.Tensor
    solver_error: torch.Tensor | None = None
    trace_error: torch.Tensor | None = None


class DensityPipeline(EnergyPipeline):
    """Reads densities off the energy; see `methods/likelihood.py` and `methods/density.py`."""

    @torch.no_grad()
    def log_density(
        self,
        images: PipelineImageInput,
        method: Literal["ode", "one_pass"] = "ode",
        *,
        class_labels: ClassLabels | None = None,
        num_steps: int = 40,
        num_probes: int = 4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
    ) -> EGCDensityOutput:
        """log p of the images' latents, which are noised to timestep 0 first.

        Args:
            images: as in `preprocess_images`: PIL, numpy or torch, one or many, of any size.
            method: "ode", the probability-flow ODE of any network: 3 num_steps forward and backward passes, and for
                each probe 1.5 num_steps backward passes through the backward ones. Or "one_pass", one forward pass, for
                a network that was trained with `objective.time_score_weight`.
            class_labels: ids or names, one for all images or one each: log p(z | c) instead of log p(z), by the ODE of
                a network with a class embedding.
            num_steps: of Heun's method, at least 2; solved again with half as many for the error.
            num_probes: random estimates of the divergence an image, at least 2.
            generator: of the noise and the probes; one for all images, or one each (an image then does not depend on
                its batch).
            batch_size: images at once; None: what memory surely holds, by their size.

        Raises:
            ValueError: an unknown method, "one_pass" with a network that was not trained for it or with labels, labels
                without class embedding, or another argument out of range, by name.
        """
        model, device = self.energy_model, self._execution_device
        pixel_values = preprocess_images(images, self.image_size)
        num_images = len(pixel_values)
        labels = self._check_density(method, class_labels, num_steps, num_probes, batch_size, num_images)
        check_start(generator, None, num_images, (None, None))
        batch_size = batch_size or self._default_image_batch_size()
        starts = range(0, num_images, batch_size)
        found: list[Sequence[torch.Tensor]] = []
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            rows = slice(start, start + batch_size)
            latents = self.encode(pixel_values[rows].to(device))
            latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
            own = generator[rows] if isinstance(generator, list) else generator
            noise = partial(randn_tensor, latents.shape, own, device, latents.dtype)
            noisy_latents = add_noise(latents, noise(), model.noise_levels(torch.tensor(0, device=device)))
            potential = energy_potential(model, None if labels is None else labels[rows].to(device))
            if method == "one_pass":
                constant = self.config.log_normalizer
                found.append([one_pass_log_density(potential, model.noise_levels, noisy_latents, 0, constant)])
            else:
                probes = torch.stack([noise().sign() for _ in range(num_probes)])
                levels = model.noise_levels, model.alphas_cumprod
                found.append(log_density(potential, *levels, noisy_latents, probes, num_steps))
        self.maybe_free_model_hooks()
        value, *errors = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        bits = -value / (latents[0].numel() * math.log(2))
        return EGCDensityOutput(value, bits, *errors)

    @torch.no_grad()
    def fit_log_normalizer(self, num_samples: int = 1024) -> tuple[float, float]:
        """Estimates log Z at the highest noise level and keeps it with the pipeline; training with the time score does.

        For a network that was trained with `objective.time_score_weight`: of another its energies are not one density,
        whatever this finds.

        Args:
            num_samples: of N(0, I), each one forward pass of a row; they are the same every time.

        Returns:
            log Z in nats and its standard error.
        """
        model = self.energy_model
        config, device = model.config, self._execution_device
        shape = (num_samples, config.in_channels, config.sample_size, config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        last, batch_size = config.num_train_timesteps - 1, self._default_batch_size()
        value, error = estimated_log_normalizer(energy_potential(model), model.noise_levels, noise, last, batch_size)
        self.maybe_free_model_hooks()
        self.register_to_config(log_normalizer=value)
        return value, error

    def _check_density(
        self,
        method: str,
        class_labels: ClassLabels | None,
        num_steps: int,
        num_probes: int,
        batch_size: int | None,
        num_images: int,
    ) -> torch.Tensor | None:
        """Raises ValueError as `log_density`; returns the labels, (N,) int64, or None."""
        if method not in ("ode", "one_pass"):
            raise ValueError(f"method must be 'ode' or 'one_pass', got {method!r}")
        for name, count, fewest in (("num_steps", num_steps, 2), ("num_probes", num_probes, 2)):
            if not isinstance(count, int) or count < fewest:
                raise ValueError(f"{name} must be at least {fewest}, got {count!r}")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if method == "one_pass" and self.config.log_normalizer is None:
            raise ValueError(
                "method='one_pass' needs a network that was trained with objective.time_score_weight above 0: this "
                "pipeline has log_normalizer=None; method='ode' works with every network"
            )
        labels = self.label_ids(class_labels)
        if labels is None:
            return None
        if method == "one_pass":
            raise ValueError("method='one_pass' gives log p(z) without class_labels: log Z is that of the null label")
        if not self.energy_model.config.class_embedding:
            raise ValueError("class_labels need a model with class embedding, the density of this one sees no label")
        if len(labels) not in (1, num_images):
            raise ValueError(f"class_labels must be one or {num_images}, got {len(labels)}")
        return labels.expand(num_images)
