"""The gradients of two steps in a row: called by test_sharding.py, and started by it on two processes, with OUT RUN...

A run is BACKBONE-MODE. In mode "stale" the weights that were gathered for the first step stay.

The second step's gradients are those of other weights than the first's, so that stale weights are found.
"""

import sys
import warnings

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import TINY_BACKBONES

from latent_egc import EGCObjective
from latent_egc.objective import CompiledForward
from latent_egc.training.sharding import shard_parameters, whole


def gradients_of_two_steps(backbone: str, mode: str, accelerator: Accelerator | None = None) -> torch.Tensor:
    """(2, all parameters), float64 on one process, float32 and sharded with an `accelerator`."""
    shallow = {"num_layers": 1} if backbone == "transformer" else {}  # the compiler's time
    model = TINY_BACKBONES[backbone](head="inner", class_embedding=True, **shallow)
    objective = EGCObjective(model, classification_weight=0.5, label_smoothing=0.1)
    process, num_processes, dtype = 0, 1, torch.float64
    if accelerator is None:
        objective.double()
    else:
        process, num_processes, dtype = accelerator.process_index, accelerator.num_processes, torch.float32
        if mode == "recomputed":
            model.enable_gradient_checkpointing()
        if mode == "compiled":
            objective.forward = CompiledForward(objective, backend="aot_eager")
        objective = shard_parameters(objective, accelerator)
        if mode == "stale":
            objective.set_reshard_after_backward(False)
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(0)
    latents, clean_latents, noise = torch.randn(3, 8, 2, 4, 4, generator=generator).to(dtype)
    rows = slice(process, None, num_processes)
    gradients = []
    for timesteps in torch.randint(1000, (2, 8), generator=generator):
        optimizer.zero_grad()
        objective(
            latents[rows],
            torch.tensor([0, -1, 2, 1, -1, -1, 2, 0])[rows],
            clean_latents[rows],
            noise=noise[rows],
            timesteps=timesteps[rows],
            label_dropped=torch.tensor([True, False] * 4)[rows],
        ).loss.backward()
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients.append(torch.cat([whole(parameter.grad).double().flatten() for parameter in weights]))
        optimizer.step()
    return torch.stack(gradients)


if __name__ == "__main__":
    warnings.filterwarnings("error", message="training.compile")
    found = {}
    for run in sys.argv[2:]:
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision="bf16" if run.endswith("bf16") else "no")
        assert accelerator.num_processes == 2
        found[run] = gradients_of_two_steps(*run.split("-"), accelerator)
    if accelerator.is_main_process:
        torch.save(found, sys.argv[1])
    accelerator.free_memory()  # see training/ddp_gradients.py
    accelerator.end_training()
