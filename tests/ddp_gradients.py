"""Started by test_training.py, by torchrun or alone: OUT NUM_PROCESSES. Writes the gradients of one global batch."""

import sys

import torch
from accelerate import Accelerator
from conftest import tiny_unet

from latent_egc import EGCObjective

out, num_processes = sys.argv[1], int(sys.argv[2])
accelerator = Accelerator()
assert accelerator.num_processes == num_processes, accelerator.num_processes

model = tiny_unet(head="inner", class_embedding=True)
objective = accelerator.prepare(EGCObjective(model, classification_weight=0.5, label_smoothing=0.1))
generator = torch.Generator().manual_seed(0)
latents, clean_latents, noise = torch.randn(3, 8, 2, 4, 4, generator=generator)
timesteps = torch.randint(1000, (8,), generator=generator)
class_labels = torch.tensor([0, -1, 2, 1, -1, -1, 2, 0])
label_dropped = torch.tensor([True, False] * 4)

rows = slice(accelerator.process_index, None, num_processes)
losses = objective(
    latents[rows],
    class_labels[rows],
    clean_latents[rows],
    noise=noise[rows],
    timesteps=timesteps[rows],
    label_dropped=label_dropped[rows],
)
assert losses.denoising_loss > 0
assert losses.classification_loss > 0
accelerator.backward(losses.loss)
if accelerator.is_main_process:
    gradients = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()]
    torch.save(torch.cat(gradients), out)
accelerator.wait_for_everyone()
accelerator.end_training()
