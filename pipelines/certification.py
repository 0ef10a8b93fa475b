"""What the energy network says of images: one pass, the mean over noised and denoised copies, or with a certificate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from latent_egc.methods.certification import ABSTAIN, certificate
from latent_egc.methods.denoised_classification import denoised_log_probabilities
from latent_egc.models.noise_schedule import timesteps_at
from latent_egc.models.potentials import energy_potential

from .energy_pipeline import EnergyPipeline
from .images import preprocess_images, single_images
from .sampling_checks import check_counts, check_start


@dataclass
class EGCClassificationOutput(BaseOutput):
    """What the energy network says of N images.

    Args:
        logits: (N, K) at timestep 0; where noise was averaged over, the log of the mean probabilities.
        probabilities: (N, K), softmax of the logits.
        labels: for each image the names of its `top_k` most probable classes, most probable first.
        energy: (N,) at timestep 0, low = likely; comparable between images of one model only.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    labels: list[list[str]]
    energy: torch.Tensor


@dataclass
class EGCCertificationOutput(BaseOutput):
    """What the smoothed classifier says of N images, and how far it is certain to say so.

    Args:
        label_ids: (N,) int64; -1 where it abstains.
        labels: for each image the name of its class; None where it abstains.
        radius: (N,) float64, in l2; 0 where it abstains.
        votes: (N, K) int64, what the classifier said of the `n` noised copies that were counted.
        space: what the radius is a distance of: "pixels" in [0, 1], or scaled "latents".
    """

    label_ids: torch.Tensor
    labels: list[str | None]
    radius: torch.Tensor
    votes: torch.Tensor
    space: str


class CertifyingPipeline(EnergyPipeline):
    """An `EnergyPipeline` that classifies images."""

    @torch.no_grad()
    def classify(
        self,
        images: PipelineImageInput,
        top_k: int = 1,
        batch_size: int | None = None,
        num_noise_samples: int = 1,
        timesteps: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> EGCClassificationOutput:
        """Classifies images by one forward pass of the energy network on their clean latents at timestep 0.

        With `timesteps` that pass gives the energy alone. The class probabilities are the mean over noised copies of
        the latents, each brought to one of the timesteps, denoised by one step of the energy's gradient and classified
        as clean latents are.

        Args:
            images: as in `preprocess_images`: PIL, numpy or torch, one or many, of any size.
            top_k: how many class names to return for each image, in [1, K].
            batch_size: images at once; None: what memory surely holds, by their size.
            num_noise_samples: noised copies at each of the timesteps, two forward and one backward pass each.
            timesteps: one or many in [0, T), how much noise; None: none.
            generator: of the noise; one for all images, or one an image (an image then does not depend on its batch).

        Returns:
            `EGCClassificationOutput` on the CPU.

        Raises:
            ValueError: a model without classes, unusable images, or another argument out of range; by name.
        """
        num_classes, one_by_one = self._num_classes(), single_images(images)
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"top_k must be in [1, {num_classes}], got {top_k}")
        levels = self._check_levels(timesteps, num_noise_samples)
        if batch_size is None:
            batch_size = self._default_image_batch_size()
        check_counts(1, 1, batch_size, 1)
        check_start(generator, None, len(one_by_one), (None, None))
        starts = range(0, len(one_by_one), batch_size)
        logits, energy = [], []
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            rows = slice(start, start + batch_size)
            pixel_values = preprocess_images(one_by_one[rows], self.image_size)
            latents = self.encode(pixel_values.to(self._execution_device))
            output = self.energy_model(latents, 0)
            energy.append(output.energy.cpu())
            if levels:
                own = generator[rows] if isinstance(generator, list) else generator
                logits.append(self._denoised_logits(latents, levels, num_noise_samples, own).cpu())
            else:
                logits.append(output.logits.cpu())
        self.maybe_free_model_hooks()
        logits, id2label = torch.cat(logits), self.id2label
        return EGCClassificationOutput(
            logits=logits,
            probabilities=logits.softmax(dim=-1),
            labels=[[id2label[i] for i in row] for row in logits.topk(top_k, dim=-1).indices.tolist()],
            energy=torch.cat(energy),
        )

    def _denoised_logits(
        self,
        latents: torch.Tensor,
        levels: Sequence[int],
        num_noise_samples: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """log of the mean of the class probabilities (N, K) of noised and denoised latents (N, C, h, w)."""
        potential, options = energy_potential(self.energy_model), {"device": latents.device, "dtype": latents.dtype}
        found = []
        for timestep in levels:
            for _ in range(num_noise_samples):
                noise = randn_tensor(latents.shape, generator, **options)[:, None]
                found.append(denoised_log_probabilities(potential, self.energy_model, latents, noise, timestep))
        return torch.stack(found).logsumexp(dim=0) - math.log(len(found))

    @torch.no_grad()
    def certify(
        self,
        images: PipelineImageInput,
        sigma: float,
        n0: int = 100,
        n: int = 1000,
        alpha: float = 0.001,
        noise: Literal["pixels", "latents"] = "pixels",
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> EGCCertificationOutput:
        """Classifies images by the vote over noised copies, with an l2 radius within which the vote is certain.

        Noised pixels are read by the network itself, at the timestep of that noise: without an autoencoder there is
        nothing to be denoised. With one they are encoded first and read at timestep 0; noise on the latents is read at
        its timestep too, but what it certifies is a distance of latents, not of pixels. The largest radius that can be
        had is sigma Phi^-1(alpha^(1/n)). Source: Cohen et al. (ICML 2019).

        Args:
            images: as in `preprocess_images`: PIL, numpy or torch, one or many, of any size.
            sigma: of the noise, in units of pixels in [0, 1], or of scaled latents.
            n0: noised copies that choose the class, one forward pass each.
            n: further ones that say how often it is chosen, one forward pass each; with noise on pixels before an
                autoencoder each of both is also encoded.
            alpha: in (0, 1), the probability that an image's certificate is wrong.
            noise: on the "pixels", or on the "latents".
            batch_size: noised copies at once; None: what memory surely holds, by their size.
            generator: of the noise; one for all images, or one an image (which then does not depend on the others).

        Returns:
            `EGCCertificationOutput` on the CPU; the radius is in units of pixels in [0, 1], or of scaled latents.

        Raises:
            ValueError: a model without classes, unusable images, a sigma beyond the noise schedule, or another argument
                out of range; by name.
        """
        num_classes, one_by_one = self._num_classes(), single_images(images)
        for name, count in (("n0", n0), ("n", n)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be in (0, 1), got {alpha}")
        if batch_size is None:
            batch_size = self._default_image_batch_size()
        check_counts(1, 1, batch_size, 1)
        check_start(generator, None, len(one_by_one), (None, None))
        self._check_pixel_space()
        read = self._reader(sigma, noise)
        votes, certificates = torch.zeros(2, len(one_by_one), num_classes, dtype=torch.long), []
        with self.progress_bar(total=len(one_by_one) * (n0 + n)) as progress_bar:
            for i, image in enumerate(one_by_one):
                clean = preprocess_images([image], self.image_size).to(self._execution_device)
                clean = self.encode(clean) if noise == "latents" else clean
                clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
                own = generator[i] if isinstance(generator, list) else generator
                for stage, count in enumerate((n0, n)):
                    for first in range(0, count, batch_size):
                        shape = (min(batch_size, count - first), *clean.shape[1:])
                        draws = randn_tensor(shape, own, device=clean.device, dtype=clean.dtype)
                        said = read(clean, draws).argmax(dim=1).cpu()
                        votes[stage, i] += said.bincount(minlength=num_classes)
                        progress_bar.update(len(draws))
                certificates.append(certificate(votes[0, i], votes[1, i], sigma, alpha))
        self.maybe_free_model_hooks()
        label_ids, radius = zip(*certificates, strict=True)
        return EGCCertificationOutput(
            label_ids=torch.tensor(label_ids),
            labels=[None if i == ABSTAIN else self.id2label[i] for i in label_ids],
            radius=torch.tensor(radius, dtype=torch.float64),
            votes=votes[1],
            space=noise,
        )

    def _reader(self, sigma: float, noise: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Pixel values in [-1, 1] or latents (1, C, H, W), and standard normal draws (B, C, H, W) of their noise, to
        logits (B, K). Raises ValueError on what `certify` says.
        """
        if noise not in ("pixels", "latents"):
            raise ValueError(f"noise must be 'pixels' or 'latents', got {noise!r}")
        if noise == "latents" and self.vae is None:
            raise ValueError("noise='latents' needs an autoencoder, this network works on pixels: noise='pixels'")
        in_pixels = 2 if noise == "pixels" else 1  # the network's are in [-1, 1], twice as far apart as in [0, 1]
        if noise == "pixels" and self.vae is not None:
            if not 0 < sigma < math.inf:
                raise ValueError(f"sigma must be positive and finite, got {sigma}")
            return lambda pixels, draws: self.energy_model(self.encode(pixels + in_pixels * sigma * draws), 0).logits
        alphas_cumprod = self.energy_model.alphas_cumprod.cpu().double()
        ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()  # sigma_t / alpha_t
        lowest, highest = (float(ratio) / in_pixels for ratio in (ratios[0], ratios[-1]))
        if not lowest <= sigma <= highest:
            raise ValueError(f"sigma must be in [{lowest:.3g}, {highest:.4g}], the network's noise levels, got {sigma}")
        ratio = in_pixels * sigma
        timestep = float(timesteps_at(alphas_cumprod, torch.tensor([ratio]).log()))
        alpha = 1 / math.hypot(1, ratio)
        return lambda clean, draws: self.energy_model(alpha * (clean + ratio * draws), timestep).logits

    def _num_classes(self) -> int:
        """K. Raises ValueError for a model without classes."""
        num_classes = self.energy_model.config.num_classes
        if num_classes is None:
            raise ValueError("this model was trained without classes, it cannot classify")
        return num_classes

    def _check_levels(self, timesteps: int | Sequence[int] | None, num_noise_samples: int) -> list[int]:
        """The timesteps to noise latents to. Raises ValueError where they or their number of samples do not fit."""
        if not isinstance(num_noise_samples, int) or num_noise_samples < 1:
            raise ValueError(f"num_noise_samples must be an integer of at least 1, got {num_noise_samples!r}")
        if timesteps is None:
            if num_noise_samples != 1:
                raise ValueError(f"num_noise_samples={num_noise_samples} needs timesteps, got None")
            return []
        levels = [timesteps] if isinstance(timesteps, int) else list(timesteps)
        num_timesteps = self.energy_model.config.num_train_timesteps
        if not levels or not all(isinstance(t, int) and 0 <= t < num_timesteps for t in levels):
            raise ValueError(f"timesteps must be integers in [0, {num_timesteps}), got {timesteps!r}")
        return levels
