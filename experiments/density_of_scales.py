"""Where matching the score alone loses a density: two Gaussians about the same point, of different widths.

    python experiments/density_of_scales.py        (two minutes on one CPU core)

In 32 dimensions the mixture's samples lie on two shells with nothing between them, so that the score says nothing of
how much of the mass is on which, and nothing of how the energies of different noise levels compare. Trained with and
without the time score, the same small network is asked for log p of clean samples in one pass; printed are what that is
too much on the average of each shell's samples, and the error of single ones. docs/decisions.md has what came of it.
"""

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from latent_egc import EGCObjective, EnergyModel
from latent_egc.methods.density import estimated_log_normalizer, one_pass_log_density
from latent_egc.models import energy_potential

NUM_DIMENSIONS = 32
SHARES, SCALES = (0.8, 0.2), (0.4, 1.6)  # of the two Gaussians


class RadialEnergy(EnergyModel):
    """An energy of |z|^2 and the noise level alone, by a perceptron; a "latent" is one position of many channels."""

    size_divisor = 1

    @register_to_config
    def __init__(
        self,
        sample_size: int = 1,
        in_channels: int = NUM_DIMENSIONS,
        num_classes: int | None = None,
        head: str = "map",
        energy_channels: int | None = 1,
        energy_pooling: str = "logmeanexp",
        gaussian_part: bool = True,
        class_embedding: bool = False,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        width: int = 128,
    ) -> None:
        super().__init__()
        self.check_energy_config()
        layers = [nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.layers[-1].weight)

    def network(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """See `EnergyModel.network`."""
        alpha, sigma = self.noise_levels(timesteps)
        squares = noisy_latents.square().sum(dim=(1, 2, 3)) / NUM_DIMENSIONS
        # Of an energy near timestep 0, where it is log p times sigma_t, what is learned is log p.
        features = torch.stack([squares.log(), squares, (sigma / alpha).log()], dim=1)
        return (sigma[:, None] * self.layers(features))[:, :, None, None] * NUM_DIMENSIONS, None


def samples(num_rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 32, 1, 1), and which of the two Gaussians each is of, (N,)."""
    which = (torch.rand(num_rows, generator=generator) < SHARES[1]).long()
    noise = torch.randn(num_rows, NUM_DIMENSIONS, 1, 1, generator=generator)
    return torch.tensor(SCALES)[which].view(-1, 1, 1, 1) * noise, which


def true_log_density(noisy_latents: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(N,) float64, of latents at a noise level."""
    squares = noisy_latents.double().square().sum(dim=(1, 2, 3))
    variances = [float(alpha) ** 2 * scale**2 + float(sigma) ** 2 for scale in SCALES]
    parts = [
        math.log(share) - squares / (2 * variance) - NUM_DIMENSIONS / 2 * math.log(2 * math.pi * variance)
        for share, variance in zip(SHARES, variances, strict=True)
    ]
    return torch.stack(parts).logsumexp(dim=0)


def train(time_score_weight: float, num_steps: int, seed: int = 0) -> EnergyModel:
    """A network trained on fresh samples, by the objective of every other network."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = RadialEnergy()
    objective = EGCObjective(model, time_score_weight=time_score_weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        latents, _ = samples(512, generator)
        objective(latents).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
    return model


def errors(model: EnergyModel) -> tuple[float, float, float]:
    """One pass less the truth at timestep 0, in nats: its mean over each Gaussian's samples, and its deviation."""
    generator = torch.Generator().manual_seed(1)
    latents, which = samples(4000, generator)
    alpha, sigma = model.noise_levels(torch.tensor(0))
    noisy = alpha * latents + sigma * torch.randn(latents.shape, generator=generator)
    potential = energy_potential(model)
    noise = torch.randn(4000, *latents.shape[1:], generator=generator)
    log_z, _ = estimated_log_normalizer(
        potential, model.noise_levels, noise, model.config.num_train_timesteps - 1, 4000
    )
    found = one_pass_log_density(potential, model.noise_levels, noisy, 0, log_z)
    error = found - true_log_density(noisy, alpha, sigma)
    return float(error[which == 0].mean()), float(error[which == 1].mean()), float(error.std())


def main(num_steps: int = 1500) -> None:
    """Trains with several weights and prints a table."""
    print(
        "| weight of the time score | error, narrow | error, wide | deviation over samples |\n| --- | --- | --- | --- |"
    )
    for weight in (0.0, 0.01, 0.1, 1.0):
        narrow, wide, deviation = errors(train(weight, num_steps))
        print(f"| {weight:g} | {narrow:.2f} | {wide:.2f} | {deviation:.2f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small; a second thread would only wait
    main()
