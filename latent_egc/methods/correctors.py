"""Correctors: Markov chains within one noise level, whose density of z is exp(-U(z, t) / sigma_t) up to a constant.

    score      = -grad U / sigma_t,    xi and p standard normal
    ULA        z' = z + h score + sqrt(2 h) xi
    HMC        L leapfrog steps of length sqrt(2 h) from (z, p) to (z', p'), accepted with probability
               min(1, exp(H(z, p) - H(z', p'))),   H = U / sigma_t + |p|^2 / 2
    MALA       HMC with L = 1: the proposal is ULA's, the acceptance takes its bias away

A diffusion model without an energy knows the score alone and has ULA, whose bias grows with h: on N(0, 1) its variance
is 1 / (1 - h / 2). The true energy difference makes MALA and HMC exact for every h. h is given in units of sigma_t^2,
the scale on which noised data vary, so that one number suits all levels.

A row's chain uses its own step size and acceptance, and its own generator where there is one a row: it does not depend
on the rows beside it. Sources: Roberts and Tweedie (Bernoulli 1996, MALA), Neal (2011, HMC), Du et al. (ICML 2023,
arXiv 2302.11552: correctors in compositions of diffusion models).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.utils.torch_utils import randn_tensor

from latent_egc.models.heads import EnergyOutput
from latent_egc.models.potentials import input_gradient

# U(z, t) and what it was read from: a `Potential`, or any other such function.
PotentialFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, list[EnergyOutput]]]
Generators = torch.Generator | list[torch.Generator] | None


def log_density_and_score(
    potential: PotentialFunction, latents: torch.Tensor, timestep: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-U / sigma_t (N,), and its gradient (N, C, h, w). 2 units: one forward and one backward pass."""

    def with_value(noisy_latents: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, list[EnergyOutput]]:
        values, _ = potential(noisy_latents, at)
        return values, [EnergyOutput(energy=values)]

    epsilon, (output,) = input_gradient(with_value, latents, timestep)
    return -output.energy / sigma, -epsilon / sigma


def _by_row(values: float | torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """A number, or one a row, as (N, 1, 1, 1) beside latents."""
    return torch.as_tensor(values, dtype=latents.dtype, device=latents.device).expand(len(latents))[:, None, None, None]


@torch.no_grad()
def ula(
    potential: PotentialFunction,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    sigma: torch.Tensor,
    step_sizes: float | torch.Tensor,
    num_steps: int = 1,
    generator: Generators = None,
) -> torch.Tensor:
    """Unadjusted Langevin steps; `num_steps` times 2 units.

    Args:
        potential: U(z, t).
        latents: (N, C, h, w) at `timestep`, at least float32.
        timestep: a scalar.
        sigma: sigma_t of it, a scalar.
        step_sizes: h / sigma_t^2, one or (N,).
        num_steps: at least 1.
        generator: one, or one a row.

    Returns:
        (N, C, h, w).
    """
    step = _by_row(step_sizes, latents) * sigma**2
    for _ in range(num_steps):
        _, score = log_density_and_score(potential, latents, timestep, sigma)
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        latents = latents + step * score + (2 * step).sqrt() * noise
    return latents


@torch.no_grad()
def hmc(
    potential: PotentialFunction,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    sigma: torch.Tensor,
    step_sizes: float | torch.Tensor,
    num_steps: int = 1,
    num_leapfrog_steps: int = 1,
    generator: Generators = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hamiltonian Monte Carlo, with one leapfrog step MALA; 1 + `num_steps` * `num_leapfrog_steps` times 2 units.

    Args:
        num_leapfrog_steps: L, at least 1.
        potential, latents, timestep, sigma, step_sizes, num_steps, generator: as for `ula`.

    Returns:
        (N, C, h, w), and (N,) the mean over the steps of the probability with which a row's proposal was accepted.
        A proposal whose energy is NaN is not.
    """
    length = (2 * _by_row(step_sizes, latents)).sqrt() * sigma
    options = {"generator": generator, "device": latents.device, "dtype": latents.dtype}
    log_density, score = log_density_and_score(potential, latents, timestep, sigma)
    acceptance = torch.zeros_like(log_density)
    for _ in range(num_steps):
        momentum = randn_tensor(latents.shape, **options)
        # The log of a uniform number, by a normal one: that is what there is a draw of with one generator a row.
        log_uniform = torch.special.log_ndtr(randn_tensor((len(latents), 1), **options)).squeeze(1)
        before = log_density - momentum.square().sum(dim=(1, 2, 3)) / 2
        proposal, there = latents, (log_density, score)
        for _ in range(num_leapfrog_steps):
            momentum = momentum + length / 2 * there[1]
            proposal = proposal + length * momentum
            there = log_density_and_score(potential, proposal, timestep, sigma)
            momentum = momentum + length / 2 * there[1]
        log_ratio = there[0] - momentum.square().sum(dim=(1, 2, 3)) / 2 - before
        accepted = log_uniform < log_ratio
        latents = torch.where(accepted[:, None, None, None], proposal, latents)
        log_density = torch.where(accepted, there[0], log_density)
        score = torch.where(accepted[:, None, None, None], there[1], score)
        acceptance += log_ratio.clamp(max=0).exp().nan_to_num(0.0)
    return latents, acceptance / num_steps


@dataclass(frozen=True)
class Corrector:
    """Which chain runs at each noise level, and how long.

    Args:
        kind: "ula", "mala" or "hmc".
        num_steps: of the chain at each level. A level costs `num_steps` gradients by ULA, 1 + `num_steps` by MALA and
            1 + `num_steps` * `num_leapfrog_steps` by HMC; a gradient is one forward and one backward pass.
        step_size: h / sigma_t^2, at the first level.
        target_acceptance: to which MALA's and HMC's step sizes are adapted, each image's from level to level; within a
            level it is fixed, so that the level's density stays as it is. None: the step size stays. ULA accepts all.
        num_leapfrog_steps: L, of HMC alone.

    Raises:
        ValueError: a value out of its range, by name.
    """

    kind: Literal["ula", "mala", "hmc"] = "mala"
    num_steps: int = 2
    step_size: float = 0.1
    target_acceptance: float | None = 0.6
    num_leapfrog_steps: int = 3

    def __post_init__(self) -> None:
        if self.kind not in ("ula", "mala", "hmc"):
            raise ValueError(f"corrector must be of kind 'ula', 'mala' or 'hmc', got {self.kind!r}")
        for name in ("num_steps", "num_leapfrog_steps"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"corrector: {name} must be an integer of at least 1, got {count!r}")
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"corrector: step_size must be finite and positive, got {self.step_size}")
        if self.target_acceptance is not None and not 0 < self.target_acceptance < 1:
            raise ValueError(f"corrector: target_acceptance must be in (0, 1) or None, got {self.target_acceptance}")

    def __call__(
        self,
        potential: PotentialFunction,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        sigma: torch.Tensor,
        step_sizes: float | torch.Tensor,
        generator: Generators = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Corrected latents and acceptance rates (N,), ones by ULA; arguments as for `ula`."""
        arguments = potential, latents, timestep, sigma, step_sizes, self.num_steps
        if self.kind == "ula":
            return ula(*arguments, generator=generator), torch.ones_like(latents[:, 0, 0, 0])
        num_leapfrog_steps = self.num_leapfrog_steps if self.kind == "hmc" else 1
        return hmc(*arguments, num_leapfrog_steps, generator)

    def adapted(self, step_sizes: torch.Tensor, acceptance_rates: torch.Tensor) -> torch.Tensor:
        """Step sizes (N,) for the next level: larger where more than the target was accepted, smaller where less."""
        if self.kind == "ula" or self.target_acceptance is None:
            return step_sizes
        return step_sizes * (acceptance_rates - self.target_acceptance).exp()
