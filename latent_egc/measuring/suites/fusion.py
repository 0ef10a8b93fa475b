"""Suite `fusion`: several blocks and timesteps at once, by concatenation, by attention, and by feedback.

DifFormer attends over the features of several blocks and timesteps. DifFeed runs the network twice: in the second pass
each level on the way down receives what that level gave on the way up in the first, through small convolutions that
are trained with the head. From the paper ours takes the layout: 1x1 convolutions, attention within a timestep with a
class token, joining over timesteps, and the feedback's convolution - batch norm - ReLU - depthwise convolution. Not
taken over: its choice of blocks (they are the heat map's best), its image sizes and augmentation, and any training of
the network itself, which stays frozen here; the feedback starts at zero, so that the second pass starts as the first.

Source: Mukhopadhyay et al., arXiv 2311.17921.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from latent_egc.config import within
from latent_egc.measuring.denoisers import Denoiser
from latent_egc.measuring.probe_context import CHOICE_NOTE, Place, ProbeContext
from latent_egc.measuring.probe_heads import FusionHead, fit_head, linear_probe, predict
from latent_egc.measuring.results import SuiteResult


@dataclass(frozen=True)
class Settings:
    """DifFormer and DifFeed; their heads train with the settings of `heads`."""

    blocks: tuple[str, ...] | None = None  # null: the num_blocks best of the heat map
    timesteps: tuple[int, ...] | None = None  # null: the num_timesteps best of the heat map
    num_blocks: int = within(3, 1)
    num_timesteps: int = within(3, 1)
    feedback_epochs: int = within(0, 0)  # of DifFeed, two passes of the network a batch; 0: no DifFeed
    feedback_images: int | None = within(None, 1)  # training rows of DifFeed; null: all


class DifFeed(nn.Module):
    """Two passes of a frozen denoiser with trained feedback between them, and attention over the second's features.

    Args:
        denoiser, timestep: frozen, and the latents' timestep.
        means, deviations: block -> (D, p, p), by which its features are standardised before the head.
        head: takes the standardised maps of these blocks.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        timestep: int,
        means: dict[str, torch.Tensor],
        deviations: dict[str, torch.Tensor],
        head: FusionHead,
    ) -> None:
        super().__init__()
        self.denoiser, self.timestep, self.head = denoiser, timestep, head  # the denoiser is no module: not trained
        device = denoiser.network.device
        self.means = {block: mean.to(device) for block, mean in means.items()}
        self.deviations = {block: deviation.to(device) for block, deviation in deviations.items()}
        zeros = torch.zeros(1, denoiser.channels, denoiser.sample_size, denoiser.sample_size, device=device)
        with torch.no_grad():
            channels = {block: values.shape[1] for block, values in denoiser.features(zeros, timestep).items()}
        self.feedback = nn.ModuleList(_feedback(channels[a], channels[b]) for a, b in denoiser.feedback_pairs)

    def forward(self, noisy_latents: torch.Tensor) -> torch.Tensor:
        """Noisy latents (N, C, h, w) -> logits (N, K)."""
        with torch.no_grad():
            first = self.denoiser.features(noisy_latents, self.timestep)
        edits = {
            earlier: lambda maps, layers=layers, given=first[later]: maps + layers(given)
            for layers, (later, earlier) in zip(self.feedback, self.denoiser.feedback_pairs, strict=True)
        }
        second = self.denoiser.features(noisy_latents, self.timestep, edits)
        return self.head(*(self._standardised(block, second[block]) for block in self.means))

    def _standardised(self, block: str, maps: torch.Tensor) -> torch.Tensor:
        mean = self.means[block]
        return (F.adaptive_avg_pool2d(maps, mean.shape[-1]) - mean) / self.deviations[block]


def _feedback(channels_in: int, channels_out: int) -> nn.Module:
    last = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1, groups=channels_out, bias=False)
    nn.init.zeros_(last.weight)
    first = nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(channels_out), nn.ReLU(), last)


def run(context: ProbeContext, settings: Settings) -> SuiteResult:
    """The linear probe of concatenated features, DifFormer, and with `fusion.feedback_epochs` DifFeed."""
    heads, seed = context.settings.heads, context.settings.seed
    blocks, timesteps = chosen_sources(context, settings)
    p = context.place.pooling
    places = [Place(block, t, p) for t in timesteps for block in blocks]
    pairs = [context.standardised(place) for place in places]
    train, validation = ([arrays[i] for arrays in pairs] for i in (0, 1))

    config = context.settings.linear
    flat = [np.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1) for arrays in (train, validation)]
    _, joined = linear_probe(flat[0], context.train_labels, flat[1], context.labels, config, seed)
    device, num_classes = context.denoiser.network.device, len(context.class_names)
    shapes = [array.shape[1:3] for array in train[: len(blocks)]]
    maps, labels = [torch.from_numpy(x) for x in train], torch.from_numpy(context.train_labels)

    def build() -> nn.Module:
        return FusionHead(shapes, len(timesteps), num_classes, heads.width).to(device)

    head, chosen = fit_head(build, maps, labels, heads, config.held_out, seed)
    attended = predict(head, [torch.from_numpy(x) for x in validation], heads.train_batch_size).numpy()

    predictions = {"concatenation, linear probe": joined, "DifFormer": attended}
    notes = [
        CHOICE_NOTE,
        f"Blocks {', '.join(blocks)}; timesteps {', '.join(map(str, timesteps))}; {p} x {p}.",
        f"DifFormer: {chosen}.",
    ]
    if settings.feedback_epochs > 0:
        t = context.place.timestep
        predictions[f"DifFeed at timestep {t}"], count, chosen = _diff_feed(context, settings, blocks, t)
        epochs = settings.feedback_epochs
        notes.append(f"DifFeed: the same blocks at timestep {t} alone, {epochs} epochs of {count} rows, {chosen}.")
    return SuiteResult(
        num_samples=len(context.labels),
        metrics={name: context.accuracy(found == context.labels) for name, found in predictions.items()},
        notes=notes,
    )


def chosen_sources(context: ProbeContext, settings: Settings) -> tuple[list[str], list[int]]:
    """Blocks and timesteps to join: as set, or each one's best cell of the heat map decides, on held-out rows."""
    scores = context.scores

    def top(values: Sequence, count: int, attribute: str) -> list:
        def highest(value: object) -> float:
            return max(score.held_out for place, score in scores.items() if getattr(place, attribute) == value)

        taken = sorted(values, key=highest, reverse=True)[:count]
        return [value for value in values if value in taken]  # in the network's order

    blocks = settings.blocks or top(context.cache.blocks, settings.num_blocks, "block")
    timesteps = settings.timesteps or top(context.settings.timesteps, settings.num_timesteps, "timestep")
    return list(blocks), list(timesteps)


def _diff_feed(
    context: ProbeContext, settings: Settings, blocks: list[str], timestep: int
) -> tuple[np.ndarray, int, str]:
    """Predicted labels (M,) of the validation rows, the number of training rows, and what was chosen."""
    heads, batch_size, seed = context.settings.heads, context.settings.batch_size, context.settings.seed
    denoiser, cache = context.denoiser, context.cache
    means, deviations = {}, {}
    for block in blocks:
        features = torch.from_numpy(cache.features("train", timestep, block, context.place.pooling))
        means[block], deviations[block] = features.mean(dim=0), features.std(dim=0) + 1e-6
    shapes = [(len(mean), mean.shape[-1]) for mean in means.values()]

    def build() -> nn.Module:
        head = FusionHead(shapes, 1, len(context.class_names), heads.width)
        return DifFeed(denoiser, timestep, means, deviations, head).to(denoiser.network.device)

    def noised(split: str) -> torch.Tensor:
        latents, noise = cache.latents(split), cache.noise(split, cache.splits[split].rows)
        device = denoiser.alphas_cumprod.device
        batches = zip(latents.split(batch_size), noise.split(batch_size), strict=True)
        return torch.cat([denoiser.noised(z.to(device), eps.to(device), timestep).cpu() for z, eps in batches])

    rows = torch.randperm(len(context.train_labels), generator=torch.Generator().manual_seed(seed))
    rows = rows[: settings.feedback_images]
    labels = torch.from_numpy(context.train_labels)[rows]
    held_out, inputs = context.settings.linear.held_out, [noised("train")[rows]]
    model, chosen = fit_head(build, inputs, labels, heads, held_out, seed, settings.feedback_epochs)
    return predict(model, [noised("validation")], batch_size).numpy(), len(rows), chosen
