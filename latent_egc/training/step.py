"""One optimiser step, and its numbers, which are read one step late.

To read a number of the step that a GPU is still computing is to wait for it, and to leave it idle afterwards. So a loss
or gradient that is not finite is noticed where it is: on the device, where such a step changes nothing. The error comes
one step later, and before anything is written.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from latent_egc.config import TrainingConfig
from latent_egc.objective import EGCLosses
from latent_egc.training.checkpoints import checkpoint_folders
from latent_egc.training.sharding import whole

# What a step computes, in this order; the losses and the gradient's norm must be finite.
NUMBERS = (*EGCLosses._fields, "grad_norm", "num_skipped", "num_asked_to_stop")
MUST_BE_FINITE = 4


class NonFiniteLossError(FloatingPointError):
    """Training stopped before a loss that is not finite could reach the weights."""


class StepResult(NamedTuple):
    """What the micro-batches of one step gave, over all processes."""

    values: dict[str, float]  # means of the objective's losses, and grad_norm
    num_skipped: int  # corrupt images
    stop: bool  # some process was asked to


def take_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: EMAModel,
    batches: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]],
    training: TrainingConfig,
    accelerator: Accelerator,
    should_stop: Callable[[], bool],
) -> torch.Tensor:
    """One step of the weights and of their average, from the next of `micro_batches`; waits for no device.

    Where a loss or the gradient's norm is not finite, weights, moments, the optimiser's count of steps and the average
    stay as they are to the bit. `should_stop` is asked after the micro-batches.

    Returns:
        (6,) float32 on the device, `NUMBERS`, alike on all processes.
    """
    totals = torch.zeros(len(NUMBERS), device=accelerator.device)
    for _ in range(training.gradient_accumulation_steps):
        inputs, num_skipped = next(batches)
        with accelerator.accumulate(objective):
            losses = objective(**inputs)
            accelerator.backward(losses.loss)
            if accelerator.sync_gradients:
                limit = math.inf if training.max_grad_norm is None else training.max_grad_norm
                totals[3] = whole(accelerator.clip_grad_norm_(objective.parameters(), limit))
        totals[:3] += torch.stack(losses).detach() / training.gradient_accumulation_steps
        totals[4] += num_skipped
    totals[5] = should_stop()
    numbers = accelerator.reduce(totals, "mean")
    not_finite = (~numbers[:MUST_BE_FINITE].isfinite().all()).float()
    sharded = isinstance(optimizer.optimizer, ZeroRedundancyOptimizer)
    # How a GradScaler tells torch's fused optimisers to leave everything as it is.
    (optimizer.optimizer.optim if sharded else optimizer.optimizer).found_inf = not_finite
    optimizer.step()
    optimizer.zero_grad()
    update_average(average, objective.parameters(), 1 - not_finite)
    return numbers


@torch.no_grad()
def update_average(average: EMAModel, parameters: Iterator[nn.Parameter], share: torch.Tensor) -> None:
    """`EMAModel.step` on the device, times `share` (): 1 is that step, 0 leaves the average as it is to the bit."""
    average.optimization_step += 1
    weight = share * (1 - average.get_decay(average.optimization_step))
    differences = torch._foreach_sub(average.shadow_params, list(parameters))
    torch._foreach_sub_(average.shadow_params, torch._foreach_mul(differences, weight))


class LateNumbers:
    """The numbers of steps that were taken, on their way from the device.

    Args:
        step: the first step that will be added.
        run: the run's folder, for the error.
        num_processes: whose means they are.
    """

    def __init__(self, step: int, run: Path, num_processes: int) -> None:
        self.step, self.run, self.num_processes = step, run, num_processes
        self.on_the_way: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, numbers: torch.Tensor) -> None:
        """Sends the `NUMBERS` of one step on their way."""
        arrived = torch.cuda.Event() if numbers.is_cuda else None
        copy = numbers.to("cpu", non_blocking=numbers.is_cuda)
        if arrived is not None:
            arrived.record()
        self.on_the_way.append((copy, arrived))

    def read(self, leave: int) -> Iterator[StepResult]:
        """The results of the steps so far in order, but for the last `leave` ones, unless some process was to stop.

        Raises:
            NonFiniteLossError: a loss or the gradient's norm is not finite.
        """
        while len(self.on_the_way) > leave:
            copy, arrived = self.on_the_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            found = dict(zip(NUMBERS, copy.tolist(), strict=True))
            num_skipped = round(found.pop("num_skipped") * self.num_processes)
            stop = found.pop("num_asked_to_stop") > 0
            if not all(map(math.isfinite, found.values())):
                kept = checkpoint_folders(self.run)
                raise NonFiniteLossError(
                    f"not finite at step {self.step}: {found}; it did not touch the weights, the last checkpoint is "
                    f"{kept[-1] if kept else 'none'}; a lower training.learning_rate or training.max_grad_norm may help"
                )
            self.step, leave = self.step + 1, 0 if stop else leave
            yield StepResult(found, num_skipped, stop)
