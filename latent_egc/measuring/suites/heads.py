"""Suite `heads`: other heads than the linear probe, at the chosen block, timestep and pooling."""

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from latent_egc.measuring import probe_heads
from latent_egc.measuring.probe_context import Place, ProbeContext
from latent_egc.measuring.results import SuiteResult

Settings = probe_heads.HeadsSettings


def run(context: ProbeContext, settings: Settings) -> SuiteResult:
    """Linear (L-BFGS, SGD), k-NN, MLP, CNN and attention heads at the chosen place."""
    place = context.place
    predictions = {"linear, L-BFGS": context.probe(place)[1]} | _trained_heads(context, settings, place)
    return SuiteResult(
        num_samples=len(context.labels),
        metrics={name: context.accuracy(found == context.labels) for name, found in predictions.items()},
        notes=[
            f"Features at {place}, standardised; {len(context.train_labels)} training rows.",
            f"k-NN: cosine similarity, {settings.neighbours} neighbours. The other heads train for {settings.epochs} "
            "epochs; their settings were not searched.",
        ],
    )


def _trained_heads(context: ProbeContext, settings: Settings, place: Place) -> dict[str, np.ndarray]:
    """Name -> predicted labels (M,) of the validation rows."""
    seed = context.settings.seed
    train, validation = context.standardised(place)
    channels, p = train.shape[1:3]
    num_classes, width = len(context.class_names), settings.width
    neighbours = KNeighborsClassifier(min(settings.neighbours, len(train)), metric="cosine")
    neighbours.fit(train.reshape(len(train), -1), context.train_labels)
    predictions = {f"{neighbours.n_neighbors}-NN": neighbours.predict(validation.reshape(len(validation), -1))}
    torch.manual_seed(seed)
    heads = {
        "linear, SGD": probe_heads.linear_head(channels, p, num_classes),
        "MLP": probe_heads.mlp_head(channels, p, num_classes, width),
        "CNN": probe_heads.cnn_head(channels, num_classes, width),
        "attention": probe_heads.FusionHead([(channels, p)], 1, num_classes, width),
    }
    labels = torch.from_numpy(context.train_labels)
    for name, head in heads.items():
        head.to(context.denoiser.network.device)
        optimizer = "sgd" if name == "linear, SGD" else "adamw"
        probe_heads.train_head(head, [torch.from_numpy(train)], labels, settings, seed, optimizer)
        predictions[name] = probe_heads.predict(head, [torch.from_numpy(validation)], settings.train_batch_size).numpy()
    return predictions
