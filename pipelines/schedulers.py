"""Which noise scheduler an energy network samples with: one on its own noise schedule; and how it is asked to."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

# Solvers by the names of their papers.
SOLVERS: dict[str, type[SchedulerMixin]] = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++(2M)": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "Heun": HeunDiscreteScheduler,
    "Euler": EulerDiscreteScheduler,
}
# What a trained pipeline samples with, see docs/decisions.md: as good as DDIM in twice as many steps.
DEFAULT_SOLVER = "DPM-Solver++(2M)"


def solver(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """A solver of `SOLVERS` on a scheduler's noise schedule.

    It starts at the last timestep, which few steps with the spacing "leading" of DDIM's leave out.

    Raises:
        ValueError: no such solver.
    """
    if name not in SOLVERS:
        raise ValueError(f"there is no solver {name!r}, only {', '.join(SOLVERS)}")
    return SOLVERS[name].from_config(scheduler.config, timestep_spacing="trailing")


def steps_within(scheduler: SchedulerMixin, budgets: Sequence[int]) -> dict[int, int]:
    """Numbers of steps -> evaluations that they take: the most steps within each budget that allows any."""
    scheduler, found = copy.deepcopy(scheduler), {}
    for budget in sorted(budgets):
        for steps in range(budget, 0, -1):
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) <= budget:
                found[steps] = len(scheduler.timesteps)
                break
    return found


def default_scheduler(energy_model: ModelMixin) -> DDIMScheduler:
    """A DDIM scheduler on the energy network's own noise schedule, which ends on clean latents and clips nothing."""
    config = energy_model.config
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def check_scheduler(scheduler: SchedulerMixin, energy_model: ModelMixin) -> None:
    """Raises ValueError where a scheduler predicts something else than epsilon or is on another noise schedule.

    The energy network owns its noise schedule; on another one it would sample nonsense silently.
    """
    name, config = type(scheduler).__name__, scheduler.config
    remedy = "build one with from_config(pipeline.scheduler.config), of DDIMScheduler for example"
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{name} has no alphas_cumprod: it is made for flow matching or EDM's noise levels, on which this network "
            f"was not trained; {remedy}"
        )
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"{name} has prediction_type={config.prediction_type!r}, this pipeline needs 'epsilon'")
    if config.get("use_flow_sigmas"):
        raise ValueError(
            f"{name} has use_flow_sigmas=True: these are flow matching's noise levels, on which this network was not "
            "trained; set it to False"
        )
    own, other = energy_model.alphas_cumprod.float().cpu(), scheduler.alphas_cumprod.float().cpu()
    if own.shape == other.shape and torch.allclose(own, other, atol=1e-5):
        return
    fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    needed = {field: energy_model.config[field] for field in fields} | {
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
    }
    different = [
        f"{field}={config[field]!r}, the network has {value!r}"
        for field, value in needed.items()
        if field in config and config[field] != value
    ]
    raise ValueError(
        f"{name} has another noise schedule than the energy network: {'; '.join(different) or 'other alphas_cumprod'}; "
        f"{remedy}"
    )


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timesteps: Sequence[int] | None,
    sigmas: Sequence[float] | None,
    device: torch.device,
) -> None:
    """Sets a scheduler's steps: a number of them, or its own `timesteps` or `sigmas`.

    Raises:
        ValueError: both are given, or the scheduler takes no such argument.
    """
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if len(given) == 2:
        raise ValueError("timesteps and sigmas exclude each other, got both")
    for name in given:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} takes no {name}; leave it out, or use another scheduler")
    if given:
        scheduler.set_timesteps(**given, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps=num_inference_steps, device=device)


def last_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, strength: float) -> torch.Tensor:
    """The last of a scheduler's timesteps, with which it shall begin.

    Args:
        scheduler: set to `num_inference_steps`.
        num_inference_steps: all of its steps.
        strength: the share of them that is gone, in [0, 1]; above 0 at least one step.

    Returns:
        Descending timesteps; none for strength 0.
    """
    num_steps = max(round(strength * num_inference_steps), 1) if strength > 0 else 0
    first = (num_inference_steps - num_steps) * scheduler.order  # of solvers that look twice in a step
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:] if num_steps > 0 else scheduler.timesteps[:0]


def step_options(
    scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float
) -> dict[str, Any]:
    """What `scheduler.step` takes besides epsilon: deterministic schedulers have no generator, few have an eta.

    Raises:
        ValueError: an `eta` that the scheduler would ignore.
    """
    taken = inspect.signature(scheduler.step).parameters
    if eta != 0 and "eta" not in taken:
        raise ValueError(f"{type(scheduler).__name__} takes no eta, got {eta}; DDIMScheduler does")
    options = {"generator": generator, "eta": eta}
    return {name: value for name, value in options.items() if name in taken}
