"""A corrector between a scheduler's steps: at the noise level that a step has led to, in the network's own scale."""

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin

from latent_egc.methods.correctors import Corrector, Generators
from latent_egc.models.potentials import Potential

# What a scheduler starts its next step from in place of the latents that it is given.
OWN_LATENTS = ("last_sample", "cur_sample")


def checked_corrector(
    corrector: Corrector | str | None, scheduler: SchedulerMixin, guidance_rescale: float = 0.0
) -> Corrector | None:
    """A corrector, by its kind with the other values as they are by default, or None.

    Raises:
        ValueError: an unknown kind, a scheduler that would forget a correction, or a rescaled guidance, which is no
            potential's gradient.
    """
    if corrector is None:
        return None
    if guidance_rescale != 0:
        raise ValueError(f"corrector and guidance_rescale={guidance_rescale} exclude each other: no density has it")
    name = type(scheduler).__name__
    if any(hasattr(scheduler, attribute) for attribute in OWN_LATENTS):
        raise ValueError(
            f"corrector: {name} steps from latents of its own memory, and would forget what a corrector did; use "
            "DDIMScheduler, DPMSolverMultistepScheduler or EulerDiscreteScheduler for example"
        )
    return corrector if callable(corrector) else Corrector(corrector)  # type: ignore[arg-type]  # it says which it knows


class Correction:
    """What `EnergyPipeline._denoise` does between the steps of one batch where there is a corrector.

    Args:
        corrector: the chain of each level.
        scheduler: of the call, at the first of its steps.
        noise_levels: alpha_t and sigma_t of a timestep, the energy model's.
        potential_at: from a timestep to the potential whose density is sampled there.
        num_images: N.
        generator: one, or one an image.

    Attributes:
        acceptance_rates: (N, L), of each image at each of L levels from noisy to clean; NaN at a level that was not
            reached, or where a scheduler of second order was in the middle of a step.
    """

    def __init__(
        self,
        corrector: Corrector,
        scheduler: SchedulerMixin,
        noise_levels: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        potential_at: Callable[[torch.Tensor], Potential],
        num_images: int,
        generator: Generators,
    ) -> None:
        self.corrector, self.scheduler, self.generator = corrector, scheduler, generator
        self.noise_levels, self.potential_at = noise_levels, potential_at
        self.step_sizes = torch.full((num_images,), corrector.step_size)
        self.acceptance_rates = torch.full((num_images, len(scheduler.timesteps) - 1), float("nan"))

    def __call__(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Latents (N, C, h, w) in the scheduler's scale after its step of that number -> corrected ones.

        After the last step, which leads to clean latents, they stay as they are.
        """
        level = step + 1
        in_the_middle = not getattr(self.scheduler, "state_in_first_order", True)
        if level == len(self.scheduler.timesteps) or in_the_middle:
            return latents
        timestep = self.scheduler.timesteps[level]
        _, sigma = self.noise_levels(timestep)
        scale = self.scheduler.scale_model_input(torch.ones_like(latents[:1, :1, :1, :1]), timestep)
        corrected, rates = self.corrector(
            self.potential_at(timestep), latents * scale, timestep, sigma, self.step_sizes, self.generator
        )
        self.acceptance_rates[:, step] = rates.float().cpu()
        self.step_sizes = self.corrector.adapted(self.step_sizes, self.acceptance_rates[:, step])
        return corrected / scale
