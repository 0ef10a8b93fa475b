"""Suite `likelihood`: the density of the latents in bits per dimension; see methods/likelihood.py."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from latent_egc.config import within
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Figure, SuiteResult
from latent_egc.methods.likelihood import log_density, timestep_grid
from latent_egc.models import energy_potential


@dataclass(frozen=True)
class Settings:
    """Density of the latents."""

    num_images: int | None = within(200, 2)  # null: all that are evaluated
    num_steps: int = within(60, 1)  # of Heun's method, each one gradient and one divergence of the batch


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Bits per dimension of the latents of validation images, and those of a standard normal for comparison."""
    positions = context.choose(np.arange(len(context.rows)), settings.num_images)
    latents, rows, device = context.latents[positions], context.rows[positions], context.accelerator.device
    model, timesteps = context.model, timestep_grid(context.model.alphas_cumprod, settings.num_steps)
    _, sigma = model.noise_levels(torch.tensor(0, device=device))
    num_dimensions = latents[0].numel()

    def densities(batch: range) -> torch.Tensor:
        noisy = context.noised(latents[list(batch)].to(device), rows[list(batch)], 0)
        streams = [np.random.default_rng([context.settings.seed, int(rows[i])]) for i in batch]
        signs = np.stack([stream.choice([-1, 1], noisy.shape[1:]) for stream in streams])
        normal = -noisy.double().square().sum(dim=(1, 2, 3)) / 2 - num_dimensions / 2 * math.log(2 * math.pi)
        probe = torch.from_numpy(signs).to(noisy)
        found = log_density(energy_potential(model), model.noise_levels, noisy, probe, timesteps)
        return torch.stack([found, normal], dim=1)

    log_densities = context.over_in_parts(len(latents), densities, "likelihood").numpy()
    bits, normal_bits = -log_densities.T / (num_dimensions * math.log(2))
    picture = plots.histograms({"the model": bits, "N(0, I)": normal_bits}, "bits per dimension of the latent")
    return SuiteResult(
        num_samples=len(bits),
        metrics={
            "bits per dimension": context.with_interval(np.mean, bits),
            "bits per dimension under N(0, I)": context.with_interval(np.mean, normal_bits),
        },
        figures=[Figure("bits", "Bits per dimension of the latents, image by image (lower = likelier).", picture)],
        notes=[
            f"The density is that of the scaled latents ({num_dimensions} dimensions) noised to timestep 0, where "
            f"sigma is {float(sigma):.3g}; by the probability-flow ODE, Heun's method with {settings.num_steps} steps "
            "and one probe of the divergence an image. It is a density of continuous values, so the bits may be "
            "negative, and do not compare with those of 8-bit pixels or of another autoencoder's latents."
        ],
    )
