"""Validation while training: accuracy at timestep 0 and a denoising loss that is the same quantity every time."""

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from tqdm.auto import tqdm

from latent_egc.data.autoencoders import latents_from_moments
from latent_egc.data.stream import VALIDATION_NOISE, random_stream
from latent_egc.data.views import Views
from latent_egc.models import EnergyModel
from latent_egc.models.noise_schedule import add_noise

# Each image is noised to one timestep of a fixed grid: the middles of this many equal parts of [0, T).
NUM_TIMESTEPS = 20


def validation_latents(
    views: Views, vae: ModelMixin | None, num_images: int | None, shape: tuple[int, int, int], accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This process's share of the first `num_images` (None: of all) validation images, on the CPU.

    Returns:
        Latents (M, C, h, w), (C, h, w) being `shape`; labels (M,), -1 = unlabelled; row numbers (M,).
    """
    count = min(len(views), num_images or len(views))
    shares = range(accelerator.process_index, count, accelerator.num_processes)
    latents, labels, kept = [torch.empty(0, *shape)], [], []
    for first in tqdm(range(0, len(shares), 64), desc="validation latents", leave=False):
        found = views.central(shares[first : first + 64])
        if found:
            numbers, batch, batch_labels = zip(*found, strict=True)
            latents.append(latents_from_moments(vae, views.moments(vae, torch.stack(batch))).cpu())
            labels += batch_labels
            kept += numbers
    return torch.cat(latents), torch.tensor(labels), torch.tensor(kept)


@torch.no_grad()
def validate(
    model: EnergyModel,
    latents: torch.Tensor,
    labels: torch.Tensor,
    numbers: torch.Tensor,
    accelerator: Accelerator,
    batch_size: int,
) -> dict[str, float]:
    """Accuracy at timestep 0 and denoising loss over a fixed grid of timesteps with fixed noise, over all processes.

    The model has the weights to judge; latents, labels and numbers are this process's, from `validation_latents`.

    Returns:
        validation_accuracy (for a model with classes), validation_denoising_loss, and its mean over each quarter of the
        timesteps: validation_denoising_loss_q1 (nearly clean) to _q4 (nearly noise).
    """
    num_timesteps = model.config.num_train_timesteps
    # correct, labelled; then by quarter of the timesteps: summed squared error, elements
    sums = torch.zeros(10, dtype=torch.float64)
    for first in range(0, len(latents), batch_size):
        rows = slice(first, first + batch_size)
        clean, batch_labels = latents[rows].to(accelerator.device), labels[rows]
        cells = numbers[rows] % NUM_TIMESTEPS
        timesteps = ((cells.double() + 0.5) * num_timesteps / NUM_TIMESTEPS).long()
        streams = [random_stream(0, VALIDATION_NOISE, number) for number in numbers[rows].tolist()]
        noise = torch.from_numpy(np.stack([stream.standard_normal(clean.shape[1:]) for stream in streams])).to(clean)
        noisy = add_noise(clean, noise, model.noise_levels(timesteps.to(clean.device)))
        error = (model.epsilon(noisy, timesteps) - noise).square().sum(dim=(1, 2, 3))
        quarters = (cells * 4) // NUM_TIMESTEPS
        sums[2:6].index_add_(0, quarters, error.cpu().double())
        sums[6:10].index_add_(0, quarters, torch.full(quarters.shape, noise[0].numel(), dtype=torch.float64))
        if model.config.num_classes is not None:
            predicted = model(clean, 0).logits.argmax(dim=1).cpu()
            labelled = batch_labels >= 0
            sums[0] += (predicted == batch_labels)[labelled].sum()
            sums[1] += labelled.sum()
    # Counts stay exact in float32 up to 2^24; errors of that relative size do not matter.
    sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").cpu().double()
    results = {}
    if sums[1] > 0:
        results["validation_accuracy"] = float(sums[0] / sums[1])
    results["validation_denoising_loss"] = float(sums[2:6].sum() / sums[6:10].sum())
    for quarter in range(4):
        if sums[6 + quarter] > 0:
            results[f"validation_denoising_loss_q{quarter + 1}"] = float(sums[2 + quarter] / sums[6 + quarter])
    return results
