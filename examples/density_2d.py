"""The whole idea in the plane: one energy of two numbers is trained on two moons, then classifies and samples.

    python examples/density_2d.py            (a minute on two CPU cores; writes docs/density_2d.png)

A point is a "latent" of 2 channels and 1x1 pixels, so that the package's own network, objective and noise schedule are
used as they are. Shown is what one scalar gives: a density, the gradient that denoises and samples, and a classifier.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from tqdm.auto import tqdm

from latent_egc import EGCObjective, EGCTransformer
from latent_egc.pipelines.schedulers import default_scheduler

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "density_2d.png"
TIMESTEP = 60  # at which energy and score are drawn: sigma_t = 0.26, the moons a little blurred
COLOURS = ("#a50f15", "#08519c")


def moons(num_points: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (N, 2, 1, 1) of about unit variance, and which moon each lies on, (N,)."""
    points, labels = make_moons(num_points, noise=0.06, random_state=seed)
    points = (torch.from_numpy(points).float() - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])
    return points[:, :, None, None], torch.from_numpy(labels)


def train(max_steps: int) -> EGCTransformer:
    """An energy network of 0.2 M parameters: of the transformer, one token is left."""
    torch.manual_seed(0)
    size = {"sample_size": 1, "patch_size": 1, "in_channels": 2, "width": 64, "num_layers": 3, "num_attention_heads": 4}
    model = EGCTransformer(num_classes=2, **size)
    objective = EGCObjective(model, classification_weight=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    for step in tqdm(range(max_steps), desc="train"):
        points, labels = moons(256, seed=step)
        loss = objective(points, labels, clean_latents=points).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
    return model.eval()


def sample(model: EGCTransformer, labels: torch.Tensor, num_steps: int = 100) -> torch.Tensor:
    """Points (N, 2, 1, 1) of p(z | y): deterministic DDIM along the energy's and the classifier's gradient."""
    scheduler = default_scheduler(model)
    scheduler.set_timesteps(num_steps)
    points = torch.randn(len(labels), 2, 1, 1, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        epsilon = model.epsilon(points, timestep, guidance_labels=labels, guidance_scale=1.0)
        points = scheduler.step(epsilon.detach(), timestep, points).prev_sample
    return points


def draw(model: EGCTransformer, picture: Path) -> None:
    """Energy, score, classifier and samples, side by side."""
    axis = torch.linspace(-2.4, 2.4, 161)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x.flatten(), y.flatten()], dim=1)[:, :, None, None]
    _, sigma = model.noise_levels(torch.tensor(TIMESTEP))
    with torch.no_grad():
        energy = (model(grid, TIMESTEP).energy / sigma).view_as(x)
        score = (-model.epsilon(grid, TIMESTEP) / sigma).view(*x.shape, 2)
        probability = model(grid, 0).logits.softmax(dim=1)[:, 1].view_as(x)
    energy = energy - energy.min()
    figure, (left, second, third, right) = plt.subplots(1, 4, figsize=(14, 3.9), layout="constrained", sharey=True)

    left.contourf(x, y, energy.clamp(max=12), levels=40, cmap="magma_r")
    left.contour(x, y, energy, levels=[1, 2, 4, 8], colors="white", linewidths=0.5, alpha=0.7)
    left.set_title("energy: $-\\log p_t(z)$ = energy / $\\sigma_t$")
    second.imshow(energy.clamp(max=12), extent=(-2.4, 2.4) * 2, origin="lower", cmap="magma_r", alpha=0.3)
    arrows = {"color": "#333333", "linewidth": 0.6, "density": 1.2, "arrowsize": 0.7}
    second.streamplot(axis.numpy(), axis.numpy(), *score.movedim(2, 0).numpy(), **arrows)
    second.set_title("its gradient: the score")
    third.contourf(x, y, probability, levels=40, cmap="RdBu", vmin=-0.25, vmax=1.25)
    third.contour(x, y, probability, levels=[0.5], colors="white", linewidths=1.2)
    points, labels = moons(300, seed=0)
    third.scatter(
        *points.flatten(1).T.numpy(), s=5, c=[COLOURS[label] for label in labels], edgecolors="white", linewidths=0.2
    )
    third.set_title("its logits: $p(y\\,|\\,z)$")
    labels = torch.arange(600) % 2
    samples = sample(model, labels).flatten(1).numpy()
    for label, colour in enumerate(COLOURS):
        right.scatter(
            *samples[labels.numpy() == label].T, s=6, color=colour, linewidths=0, alpha=0.8, label=f"$y = {label}$"
        )
    right.legend(loc="upper right", fontsize=9, frameon=False)
    right.set_title("samples along both gradients")
    for axes in (left, second, third, right):
        axes.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(max_steps: int = 1200, picture: Path = PICTURE) -> None:
    """Trains and draws."""
    draw(train(max_steps), picture)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small; a second thread would only wait
    main()
