"""One step on the device: what is not finite changes nothing, and is told one step later."""

import math

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tiny_runs import run_config
from torch.distributed.optim import ZeroRedundancyOptimizer

from latent_egc.objective import EGCLosses, EGCObjective
from latent_egc.training.build import build_network, resolve
from latent_egc.training.loop import build_objective, prepare
from latent_egc.training.step import NUMBERS, LateNumbers, NonFiniteLossError, take_step, update_average


class ScaledObjective(EGCObjective):
    """Its loss is a multiple of the parameters' squares."""

    def forward(self, factor):
        loss = factor * sum(parameter.square().sum() for parameter in self.parameters())
        return EGCLosses(loss, loss, loss)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, accumulation):
    config = resolve(run_config(tmp_path, gradient_accumulation_steps=accumulation, weight_decay=0.1))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = build_network(config.model)
    objective = build_objective(model, config, ScaledObjective)
    objective, optimizer, average = prepare(objective, config.training, accelerator)

    def step(*factors):
        batches = iter([({"factor": torch.tensor(factor)}, torch.tensor(0)) for factor in factors])
        return take_step(objective, optimizer, average, batches, config.training, accelerator, lambda: False)

    def state():
        moments = [value for kept in optimizer.state_dict()["state"].values() for value in kept.values()]
        return [t.clone() for t in (*model.parameters(), *average.shadow_params, *moments)]

    assert step(*[0.1] * accumulation)[:4].isfinite().all()
    before = state()
    for bad in (math.nan, math.inf):
        numbers = step(*[0.1] * (accumulation - 1), bad)
        assert not numbers[:4].isfinite().all()
        assert all(map(torch.equal, state(), before))
    assert step(*[0.1] * accumulation)[:4].isfinite().all()
    assert not all(map(torch.equal, state(), before))


def test_the_average_is_that_of_diffusers():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    ours, theirs = (EMAModel(parameters, decay=0.9) for _ in range(2))
    for _ in range(20):
        for parameter in parameters:
            parameter.data += torch.randn_like(parameter)
        update_average(ours, iter(parameters), torch.ones(()))
        theirs.step(parameters)
    assert ours.optimization_step == theirs.optimization_step
    for found, expected in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def numbers(loss, num_skipped=0.0, asked_to_stop=0.0):
    return torch.tensor([loss, loss, loss, 1.0, num_skipped, asked_to_stop])


def test_numbers_come_one_step_late_and_in_order(tmp_path):
    assert len(NUMBERS) == len(numbers(0.0))
    late = LateNumbers(7, tmp_path, num_processes=2)
    late.add(numbers(1.0, num_skipped=1.5))
    assert list(late.read(leave=1)) == []
    late.add(numbers(2.0))
    (result,) = late.read(leave=1)
    assert (result.values["loss"], result.num_skipped, result.stop) == (1.0, 3, False)
    late.add(numbers(math.nan))
    (result,) = late.read(leave=1)
    assert result.values["loss"] == 2.0
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 9: .*last checkpoint is none"):
        list(late.read(leave=0))


def test_a_process_that_was_asked_to_stop_waits_for_every_number(tmp_path):
    late = LateNumbers(0, tmp_path, num_processes=1)
    late.add(numbers(1.0, asked_to_stop=1.0))
    late.add(numbers(math.inf))
    with pytest.raises(NonFiniteLossError, match="step 1"):
        list(late.read(leave=1))


def test_a_sharded_optimizer_is_told_too(tmp_path, monkeypatch):
    """What steps is the optimiser inside the sharded one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        weight = torch.nn.Parameter(torch.ones(3))
        sharded = ZeroRedundancyOptimizer([weight], optimizer_class=torch.optim.AdamW, lr=0.1, fused=True)
        weight.grad = torch.full((3,), math.nan)
        sharded.optim.found_inf = torch.ones(())
        sharded.step()
        assert torch.equal(weight, torch.ones(3))
    finally:
        torch.distributed.destroy_process_group()
