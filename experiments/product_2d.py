"""AND of two networks in the plane, where the answer is known: with a corrector between the steps and without.

    python experiments/product_2d.py            (a minute on a CPU core; writes docs/product_2d.png)

Two mixtures of Gaussians stand for two networks: their energies at every noise level are formulas, so that whatever is
wrong with the samples is the sampler's fault. The product of the two densities is a mixture again. Following the sum of
the two scores does not end there, as the product of noised densities is not the noised product; the corrector does.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers.configuration_utils import register_to_config
from scipy.optimize import linear_sum_assignment

from latent_egc import Corrector, EGCPipeline, EnergyModel
from latent_egc.models.potentials import energy_potential
from latent_egc.pipelines.schedulers import default_scheduler

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "product_2d.png"


class MixtureEnergy(EnergyModel):
    """The energy of data from a mixture of Gaussians with axis-aligned covariances: -sigma_t log p_t(z)."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 1,
        in_channels: int = 2,
        num_classes: int | None = None,
        head: str = "map",
        energy_channels: int | None = 1,
        energy_pooling: str = "logsumexp",
        gaussian_part: bool = False,
        class_embedding: bool = False,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
    ) -> None:
        super().__init__()
        self.size_divisor = 1
        self.check_energy_config()
        for name in ("means", "variances", "log_weights"):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(0), requires_grad=False))

    @classmethod
    def of(cls, means: torch.Tensor, variances: torch.Tensor, weights: torch.Tensor) -> "MixtureEnergy":
        """Means and variances (M, 2), weights (M,)."""
        model = cls()
        model.means.data, model.variances.data, model.log_weights.data = means, variances, weights.log()
        return model

    def _energy_and_logits(self, latents, timesteps, embedded_labels, alpha, sigma):
        alpha, sigma = alpha[:, None], sigma[:, None]
        return -sigma[:, 0] * self.log_density(latents.flatten(1), alpha, sigma), None

    def log_density(self, points: torch.Tensor, alpha: torch.Tensor | float = 1.0, sigma: torch.Tensor | float = 0.0):
        """log p(z) (N,) of points (N, 2); alpha and sigma (N, 1), by default without noise."""
        means = torch.as_tensor(alpha)[..., None] * self.means
        variances = torch.as_tensor(alpha)[..., None] ** 2 * self.variances + torch.as_tensor(sigma)[..., None] ** 2
        normal = torch.distributions.Normal(means, variances.sqrt())
        return (normal.log_prob(points[:, None]).sum(dim=2) + self.log_weights).logsumexp(dim=1)

    def draw(self, num_points: int, generator: torch.Generator) -> torch.Tensor:
        """Exact samples (N, 2)."""
        chosen = self.log_weights.exp().multinomial(num_points, replacement=True, generator=generator)
        noise = torch.randn(num_points, 2, generator=generator, dtype=self.means.dtype)
        return self.means[chosen] + self.variances[chosen].sqrt() * noise


def product(first: MixtureEnergy, second: MixtureEnergy) -> MixtureEnergy:
    """The mixture whose density is the normalised product of two mixtures' densities."""
    variances = first.variances[:, None] + second.variances
    distance = torch.distributions.Normal(second.means, variances.sqrt()).log_prob(first.means[:, None]).sum(dim=2)
    log_weights = first.log_weights[:, None] + second.log_weights + distance
    means = (first.means[:, None] * second.variances + second.means * first.variances[:, None]) / variances
    narrowed = first.variances[:, None] * second.variances / variances
    return MixtureEnergy.of(means.flatten(0, 1), narrowed.flatten(0, 1), log_weights.flatten().softmax(dim=0))


def wasserstein(first: torch.Tensor, second: torch.Tensor) -> float:
    """Wasserstein-2 distance of two sets of as many points (N, 2), by the best assignment."""
    costs = torch.cdist(first, second).square()
    rows, columns = linear_sum_assignment(costs.numpy())
    return float(costs[rows, columns].mean().sqrt())


def two_mixtures() -> tuple[MixtureEnergy, MixtureEnergy]:
    """A ring of eight blobs, and three upright bars of different weight."""
    angles = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    ring = 1.3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    blobs = MixtureEnergy.of(ring, torch.full_like(ring, 0.09), torch.full_like(angles, 1 / 8))
    bars = torch.tensor([[-1.2, 0.0], [0.0, 0.0], [1.2, 0.0]], dtype=torch.float64)
    variances = torch.tensor([[0.03, 1.2]] * 3, dtype=torch.float64)
    return blobs, MixtureEnergy.of(bars, variances, torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64))


def compare(num_points: int, num_inference_steps: int, seed: int = 0) -> dict[str, tuple[torch.Tensor, float, float]]:
    """Name -> points (N, 2), their mean log likelihood under the true product, their distance from samples of it."""
    first, second = two_mixtures()
    truth, generator = product(first, second), torch.Generator().manual_seed(seed)
    pipeline = EGCPipeline(first, None, default_scheduler(first))
    pipeline.set_progress_bar_config(disable=True)
    both = energy_potential(first) + energy_potential(second)
    reference, exact = truth.draw(num_points, generator), truth.draw(num_points, generator)
    found = {"exact": exact}
    samplers = {"DDIM": {}, "DDIM, eta 1": {"eta": 1.0}, "corrected": {"corrector": Corrector("hmc", num_steps=4)}}
    for name, options in samplers.items():
        points = pipeline(
            potential=both,
            num_images_per_label=num_points,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type="latent",
            **options,
        )
        found[name] = points.images.flatten(1)
    return {
        name: (points, float(truth.log_density(points).mean()), wasserstein(points, reference))
        for name, points in found.items()
    }


def main(num_points: int = 1500, num_inference_steps: int = 100, picture: Path = PICTURE) -> None:
    """Prints both numbers of each set of samples, and draws them beside the two factors."""
    found = compare(num_points, num_inference_steps)
    axis = torch.linspace(-2.6, 2.6, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).flip(1)
    figure, panels = plt.subplots(1, 6, figsize=(17, 3.5), layout="constrained")
    for panel, model, title in zip(panels, two_mixtures(), ("first", "second"), strict=False):
        panel.contourf(axis, axis, model.log_density(grid).exp().view(121, 121), levels=30, cmap="magma_r")
        panel.set_title(title, size=9)
    for panel, (name, (points, likelihood, distance)) in zip(panels[2:], found.items(), strict=True):
        print(f"{name}: log likelihood {likelihood:.3f}, Wasserstein-2 {distance:.3f}")
        panel.scatter(*points.T, s=2, linewidths=0, color="#333333")
        title = f"first AND second, {name}\nlog likelihood {likelihood:.2f}, Wasserstein-2 {distance:.2f}"
        panel.set_title(title, size=9)
    for panel in panels:
        panel.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
