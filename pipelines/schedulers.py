"""Which noise scheduler an energy network samples with: one on its own noise schedule."""

import torch
from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin


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
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"{name} has prediction_type {config.prediction_type!r}, this pipeline needs 'epsilon'")
    own = energy_model.alphas_cumprod.float().cpu()
    other = getattr(scheduler, "alphas_cumprod", None)
    if other is None or own.shape != other.shape or not torch.allclose(own, other.float().cpu(), atol=1e-5):
        fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        needed = {field: energy_model.config[field] for field in fields}
        received = {field: config.get(field) for field in fields}
        raise ValueError(
            f"{name} has another noise schedule than the energy network: it needs {needed}, got {received}; build "
            f"it with {name}.from_config(pipeline.scheduler.config)"
        )
