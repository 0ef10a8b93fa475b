"""The whole idea in the plane: one energy of two numbers is trained on two moons, then classifies and samples.

    python examples/density_2d.py            (a minute on two CPU cores; writes docs/density_2d.png)

A point is a "latent" of 2 channels and 1x1 pixels, so that the package is used as it is. One scalar gives all that is
drawn: a density, the gradient that denoises and samples, and a classifier.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from tqdm.auto import trange

from latent_egc import EGCObjective, EGCPipeline, EGCTransformer
from latent_egc.pipelines.schedulers import default_scheduler

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "density_2d.png"


def moons(num_points: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (N, 2, 1, 1) of about unit variance, and which moon each lies on, (N,)."""
    points, labels = make_moons(num_points, noise=0.06, random_state=seed)
    points = (torch.from_numpy(points).float() - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])
    return points[:, :, None, None], torch.from_numpy(labels)


def main(max_steps: int = 1200, picture: Path = PICTURE) -> None:
    """Trains an energy network of 0.2 M parameters and draws its energy, score, classifier and samples."""
    torch.manual_seed(0)
    size = {"sample_size": 1, "patch_size": 1, "in_channels": 2, "width": 64, "num_layers": 3, "num_attention_heads": 4}
    model = EGCTransformer(num_classes=2, **size)
    objective = EGCObjective(model, classification_weight=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    for step in trange(max_steps, desc="train"):
        points, labels = moons(256, seed=step)
        optimizer.zero_grad()
        objective(points, labels, clean_latents=points).loss.backward()
        optimizer.step()
        lr_scheduler.step()

    axis = torch.linspace(-2.4, 2.4, 161)
    grid = torch.cartesian_prod(axis, axis).flip(1)[:, :, None, None]  # (161 * 161, 2, 1, 1), row by row
    timestep = torch.tensor(60)  # at which energy and score are drawn: sigma_t = 0.26, the moons a little blurred
    _, sigma = model.noise_levels(timestep)
    with torch.no_grad():
        energy = (model(grid, timestep).energy / sigma).view(161, 161)
        score = (-model.epsilon(grid, timestep) / sigma).view(161, 161, 2)
        probability = model(grid, 0).logits.softmax(dim=1)[:, 1].view(161, 161)
    points, labels = moons(600, seed=0)
    pipeline = EGCPipeline(model, None, default_scheduler(model))
    samples = pipeline(labels, num_inference_steps=100, output_type="latent").images

    figure, axes = plt.subplot_mosaic([["energy", "score", "classifier", "samples"]], figsize=(14, 4), layout="tight")
    axes["energy"].contourf(axis, axis, (energy - energy.min()).clamp(max=12), levels=40, cmap="magma_r")
    axes["score"].streamplot(axis.numpy(), axis.numpy(), *score.movedim(2, 0).numpy(), linewidth=0.6, color="#333333")
    axes["classifier"].contourf(axis, axis, probability, levels=40, cmap="RdBu", vmin=-0.25, vmax=1.25)
    for name, shown in (("classifier", points), ("samples", samples)):
        axes[name].scatter(*shown.flatten(1).T, s=6, c=labels, cmap="RdBu", linewidths=0)
    for name, panel in axes.items():
        panel.set(title=name, xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small; a second thread would only wait
    main()
