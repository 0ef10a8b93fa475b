"""Validation while training: its numbers by hand."""

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_unet

from latent_egc.data.stream import VALIDATION_NOISE, random_stream
from latent_egc.training.validation import validate


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [2, 6])
def test_validation_by_hand_in_any_batches(batch_size):
    """A row's noise and timestep follow from its number; rows without a label are not judged."""
    model = tiny_unet().double()
    latents = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers, timesteps, quarters = [0, 7, 21, 33, 45, 58], [25, 375, 75, 675, 275, 925], [1, 2, 1, 3, 2, 4]
    predicted = model(latents, 0).logits.argmax(dim=1)
    labels = predicted.clone()
    labels[1], labels[2:5] = (labels[1] + 1) % 3, -1  # right, wrong, three without a label, right
    errors = []
    for z_0, number, timestep in zip(latents, numbers, timesteps, strict=True):
        noise = torch.from_numpy(random_stream(0, VALIDATION_NOISE, number).standard_normal((2, 4, 4)))
        alpha, sigma = model.noise_levels(torch.tensor(timestep))
        epsilon = model.epsilon((alpha * z_0 + sigma * noise)[None], timestep)[0]
        errors.append(float((epsilon - noise).square().mean()))
    expected = {"validation_accuracy": 2 / 3, "validation_denoising_loss": sum(errors) / 6}
    for quarter in (1, 2, 3, 4):
        own = [error for error, q in zip(errors, quarters, strict=True) if q == quarter]
        expected[f"validation_denoising_loss_q{quarter}"] = sum(own) / len(own)
    found = validate(model, latents, labels, torch.tensor(numbers), Accelerator(cpu=True), batch_size)
    assert found == pytest.approx(expected)
