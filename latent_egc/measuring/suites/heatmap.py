"""The analyses `heatmap`, `pooling`, `heads` and `comparison`."""

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from latent_egc.config import ConfigError
from latent_egc.measuring import plots
from latent_egc.measuring.linear_probe import linear_probe
from latent_egc.measuring.probe_context import Place, ProbeContext, best
from latent_egc.measuring.probe_heads import FusionHead, cnn_head, linear_head, mlp_head, predict, train_head
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table
from latent_egc.models import EnergyModel

CHOICE_NOTE = (
    "Every choice (penalty, block, timestep, pooling) is made on held-out rows of the training split; accuracies are "
    "those of the validation split. A network that was itself trained on these training rows with their labels knows "
    "the held-out ones too: then the choice, not the accuracy, is optimistic."
)


def analyse_heatmap(context: ProbeContext) -> SuiteResult:
    """Linear-probe accuracy of every block at every timestep.

    Source: Mukhopadhyay et al., arXiv 2307.08702.
    """
    scores, settings = context.scores, context.settings
    blocks, timesteps = context.cache.blocks, settings.timesteps
    pooling = settings.heatmap.pooling
    accuracy = np.array([[scores[Place(b, t, pooling)].accuracy for t in timesteps] for b in blocks])
    chosen = best(scores)
    metrics = {f"linear probe at {chosen}": context.accuracy_of(scores[chosen])}
    picture = plots.heat_map(
        100 * accuracy,
        blocks,
        [str(t) for t in timesteps],
        ("block", "timestep", "linear-probe accuracy (%)"),
        (blocks.index(chosen.block), timesteps.index(chosen.timestep)),
    )
    rows = [
        [block, *(Metric(value, percent=True) for value in row)] for block, row in zip(blocks, accuracy, strict=True)
    ]
    return SuiteResult(
        num_samples=len(context.labels),
        metrics=metrics,
        tables=[Table("Accuracy by block and timestep", ["block", *(f"t = {t}" for t in timesteps)], rows)],
        figures=[
            Figure("map", f"Linear-probe accuracy, maps pooled to {pooling} x {pooling}; framed: chosen.", picture)
        ],
        notes=[
            CHOICE_NOTE,
            f"Logistic regression by L-BFGS on standardised features, {len(context.train_labels)} training rows; one "
            "draw of noise an image, the same at every timestep.",
        ],
    )


def analyse_pooling(context: ProbeContext) -> SuiteResult:
    """Linear-probe accuracy against p, maps pooled to p x p, at the chosen block and timestep."""
    scores = context.poolings
    metrics = {f"linear probe at {place}": context.accuracy_of(score) for place, score in scores.items()}
    chosen = best(scores)
    name = f"{chosen.block}, timestep {chosen.timestep}"
    bands = {name: tuple(zip(*(metric.interval for metric in metrics.values()), strict=True))}
    values = {name: [score.accuracy for score in scores.values()]}
    picture = plots.lines(
        [f"{p.pooling} x {p.pooling}" for p in scores], values, "map averaged to", "accuracy", None, bands
    )
    rows = [[p.pooling, context.features("validation", p)[0].size, metrics[f"linear probe at {p}"]] for p in scores]
    return SuiteResult(
        num_samples=len(context.labels),
        metrics=metrics,
        tables=[Table("Accuracy by pooling", ["p", "features", "accuracy"], rows)],
        figures=[Figure("curve", "Linear-probe accuracy against the pooling, with 95 % intervals.", picture)],
        notes=[CHOICE_NOTE, f"Chosen: {chosen}."],
    )


def analyse_heads(context: ProbeContext) -> SuiteResult:
    """Linear (L-BFGS, SGD), k-NN, MLP, CNN and attention heads at the chosen place."""
    settings, place = context.settings, context.place
    predictions = {"linear, L-BFGS": context.probe(place)[1]} | _trained_heads(context, place)
    metrics = {name: context.accuracy(found == context.labels) for name, found in predictions.items()}
    heads = settings.heads
    return SuiteResult(
        num_samples=len(context.labels),
        metrics=metrics,
        notes=[
            f"Features at {place}, standardised; {len(context.train_labels)} training rows.",
            f"k-NN: cosine similarity, {heads.neighbours} neighbours. The other heads train for {heads.epochs} epochs; "
            "their settings were not searched.",
        ],
    )


def _trained_heads(context: ProbeContext, place: Place) -> dict[str, np.ndarray]:
    """Name -> predicted labels (M,) of the validation rows."""
    config, seed = context.settings.heads, context.settings.seed
    train, validation = context.standardised(place)
    channels, p = train.shape[1:3]
    num_classes, width = len(context.class_names), config.width
    neighbours = KNeighborsClassifier(min(config.neighbours, len(train)), metric="cosine")
    neighbours.fit(train.reshape(len(train), -1), context.train_labels)
    predictions = {f"{neighbours.n_neighbors}-NN": neighbours.predict(validation.reshape(len(validation), -1))}
    torch.manual_seed(seed)
    heads = {
        "linear, SGD": linear_head(channels, p, num_classes),
        "MLP": mlp_head(channels, p, num_classes, width),
        "CNN": cnn_head(channels, num_classes, width),
        "attention": FusionHead([(channels, p)], 1, num_classes, width),
    }
    labels = torch.from_numpy(context.train_labels)
    for name, head in heads.items():
        head.to(context.denoiser.network.device)
        optimizer = "sgd" if name == "linear, SGD" else "adamw"
        train_head(head, [torch.from_numpy(train)], labels, config, seed, optimizer)
        predictions[name] = predict(head, [torch.from_numpy(validation)], config.train_batch_size).numpy()
    return predictions


def analyse_comparison(context: ProbeContext) -> SuiteResult:
    """The energy's own classifier beside the linear probe of its features, on the same weights and images.

    Raises:
        ConfigError: another denoiser than an energy network, or other classes than its own.
    """
    denoiser = context.denoiser
    if not isinstance(denoiser.network, EnergyModel):
        raise ConfigError(f"--analysis comparison needs an energy network, got {type(denoiser.network).__name__}")
    if denoiser.class_names != context.class_names:
        raise ConfigError(
            "--analysis comparison needs the energy network's own classes, "
            f"{denoiser.class_names[:3]} ..., the data's are {context.class_names[:3]} ..."
        )
    own = classify(denoiser.network, context.cache.latents("validation"), context.settings.batch_size)
    _, probed = context.probe(context.place)
    _, raw = linear_probe(
        context.cache.latents("train").numpy(),
        context.train_labels,
        context.cache.latents("validation").numpy(),
        context.labels,
        context.settings.linear,
        context.settings.seed,
    )
    own, probed, raw = (found == context.labels for found in (own, probed, raw))
    difference = context.accuracy(probed.astype(float) - own)  # of pairs: the same images
    both = [
        [int((own & probed).sum()), int((own & ~probed).sum())],
        [int((~own & probed).sum()), int((~own & ~probed).sum())],
    ]
    return SuiteResult(
        num_samples=len(context.labels),
        metrics={
            "energy's own classifier, clean latents at timestep 0": context.accuracy(own),
            f"linear probe at {context.place}": context.accuracy(probed),
            "probe less classifier": difference,
            "linear probe of the clean latents": context.accuracy(raw),
        },
        tables=[
            Table(
                "Images by who is right",
                ["classifier", "probe right", "probe wrong"],
                [["right", *both[0]], ["wrong", *both[1]]],
            )
        ],
        notes=[CHOICE_NOTE, "The difference's interval resamples images, which both sides share."],
    )


@torch.no_grad()
def classify(network: EnergyModel, latents: torch.Tensor, batch_size: int) -> np.ndarray:
    """(M,) the energy network's own prediction of clean latents (M, C, h, w), at timestep 0."""
    batches = latents.split(batch_size)
    return torch.cat([network(batch.to(network.device), 0).logits.argmax(dim=1).cpu() for batch in batches]).numpy()
