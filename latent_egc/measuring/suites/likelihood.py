"""Suite `likelihood`: bits per dimension of the latents; see methods/likelihood.py and methods/density.py."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from latent_egc.config import within
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Figure, SuiteResult
from latent_egc.methods.density import one_pass_log_density
from latent_egc.methods.likelihood import log_density
from latent_egc.models import energy_potential


@dataclass(frozen=True)
class Settings:
    """Density of the latents."""

    num_images: int | None = within(200, 2)  # null: all that are evaluated
    num_steps: int = within(60, 2)  # of Heun's method, each one gradient and the divergences of the batch
    num_probes: int = within(2, 2)  # random estimates of the divergence an image


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Bits per dimension of the latents of validation images with their errors, and those of a standard normal.

    Where the network was trained for it, the density in one pass as well: bias and correlation over the images.
    """
    positions = context.choose(np.arange(len(context.rows)), settings.num_images)
    latents, rows, device = context.latents[positions], context.rows[positions], context.accelerator.device
    model, log_normalizer = context.model, context.pipeline.config.log_normalizer
    levels, potential = (model.noise_levels, model.alphas_cumprod), energy_potential(model)
    _, sigma = model.noise_levels(torch.tensor(0, device=device))
    num_dimensions = latents[0].numel()

    def densities(batch: range) -> torch.Tensor:
        noisy = context.noised(latents[list(batch)].to(device), rows[list(batch)], 0)
        streams = [np.random.default_rng([context.settings.seed, int(rows[i])]) for i in batch]
        shape = (settings.num_probes, *noisy.shape[1:])
        signs = np.stack([stream.choice([-1, 1], shape) for stream in streams], axis=1)
        normal = -noisy.double().square().sum(dim=(1, 2, 3)) / 2 - num_dimensions / 2 * math.log(2 * math.pi)
        found = [normal, *log_density(potential, *levels, noisy, torch.from_numpy(signs).to(noisy), settings.num_steps)]
        if log_normalizer is not None:
            found.append(one_pass_log_density(potential, model.noise_levels, noisy, 0, log_normalizer))
        return torch.stack(found, dim=1)

    log_densities = context.over_in_parts(len(latents), densities, "likelihood").numpy()
    normal_bits, bits, solver_error, trace_error, *one_pass = log_densities.T / (num_dimensions * math.log(2))
    normal_bits, bits, one_pass = -normal_bits, -bits, [-found for found in one_pass]
    metrics = {
        "bits per dimension": context.with_interval(np.mean, bits),
        "bits per dimension under N(0, I)": context.with_interval(np.mean, normal_bits),
        "solver error in bits per dimension": context.with_interval(np.mean, -solver_error),
        "trace error in bits per dimension": context.with_interval(np.mean, trace_error),
    }
    shown = {"the model": bits, "N(0, I)": normal_bits}
    for found in one_pass:
        metrics |= {
            "bits per dimension, one pass": context.with_interval(np.mean, found),
            "one pass less ODE": context.with_interval(np.mean, found - bits),
            "correlation of one pass and ODE": context.with_interval(_correlation, found, bits),
        }
        shown["the model in one pass"] = found
    picture = plots.histograms(shown, "bits per dimension of the latent")
    return SuiteResult(
        num_samples=len(bits),
        metrics=metrics,
        figures=[Figure("bits", "Bits per dimension of the latents, image by image (lower = likelier).", picture)],
        notes=[
            f"The density is that of the scaled latents ({num_dimensions} dimensions) noised to timestep 0, where "
            f"sigma is {float(sigma):.3g}; by the probability-flow ODE, Heun's method with {settings.num_steps} steps "
            f"and {settings.num_probes} probes of the divergence an image. The solver's error is what the bits are too "
            "many, estimated from half as many steps; the trace's is an image's standard error. It is a density of "
            "continuous values, so the bits may be negative, and do not compare with those of 8-bit pixels or of "
            "another autoencoder's latents."
        ],
    )


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, over the images."""
    return float(np.corrcoef(first, second)[0, 1])
