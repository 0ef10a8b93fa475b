"""Started by test_loop.py, by torchrun or alone: OUT NUM_PROCESSES BACKBONE MODE.

Writes the gradients of one global batch, by a model of several gradient buckets.
"""

import sys
import warnings

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from tiny import tiny_transformer, tiny_unet

from latent_egc import EGCObjective
from latent_egc.objective import CompiledForward


def gradients(accelerator: Accelerator, backbone: str, mode: str) -> torch.Tensor:
    """(all parameters,), of this process's rows, averaged over the processes."""
    if backbone == "unet":
        model = tiny_unet(head="inner", class_embedding=True, block_out_channels=(48, 96), norm_num_groups=8)
    else:
        model = tiny_transformer(class_embedding=True, width=256, num_layers=1)
    assert sum(p.numel() for p in model.parameters()) * 4 > 4e6, sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():  # at this width the tiny models' standard deviation would be too large
            parameter *= 0.3
    if mode == "checkpointed":
        model.enable_gradient_checkpointing()
    objective = EGCObjective(model, classification_weight=0.5, label_smoothing=0.1)
    if mode in ("aot_eager", "inductor"):
        objective.forward = CompiledForward(objective, backend=mode)
    objective = accelerator.prepare(objective)
    generator = torch.Generator().manual_seed(0)
    latents, clean_latents, noise = torch.randn(3, 8, 2, 4, 4, generator=generator)
    timesteps = torch.randint(1000, (8,), generator=generator)
    class_labels = torch.tensor([0, -1, 2, 1, -1, -1, 2, 0])
    label_dropped = torch.tensor([True, False] * 4)

    rows = slice(accelerator.process_index, None, accelerator.num_processes)
    for _ in range(2):  # DDP makes its final buckets after the first step
        objective.zero_grad()
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
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])


if __name__ == "__main__":
    out, num_processes, backbone, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    warnings.filterwarnings("error", message="training.compile")
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=1)])
    assert accelerator.num_processes == num_processes, accelerator.num_processes
    found = gradients(accelerator, backbone, mode)
    if accelerator.is_main_process:
        torch.save(found, out)
    accelerator.wait_for_everyone()
    # Ends Gloo's threads: one that still drops a backward pass's Python context while Python shuts down aborts.
    accelerator.free_memory()
    accelerator.end_training()
