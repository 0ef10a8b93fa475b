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
    others, chosen = _other_heads(context, settings, place)
    predictions = {"linear, L-BFGS": context.probe(place)[1]} | others
    return SuiteResult(
        num_samples=len(context.labels),
        metrics={name: context.accuracy(found == context.labels) for name, found in predictions.items()},
        notes=[
            f"Features at {place}, standardised; {len(context.train_labels)} training rows.",
            f"k-NN: cosine similarity, {settings.neighbours} neighbours. The other heads train for {settings.epochs} "
            f"epochs. {'; '.join(f'{name}: {how}' for name, how in chosen.items())}.",
        ],
    )


def _other_heads(
    context: ProbeContext, settings: Settings, place: Place
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Name -> predicted labels (M,) of the validation rows, and of what was chosen, how it trained."""
    seed, device = context.settings.seed, context.denoiser.network.device
    train, validation = context.standardised(place)
    channels, p = train.shape[1:3]
    num_classes, width = len(context.class_names), settings.width
    neighbours = KNeighborsClassifier(min(settings.neighbours, len(train)), metric="cosine")
    neighbours.fit(train.reshape(len(train), -1), context.train_labels)
    predictions = {f"{neighbours.n_neighbors}-NN": neighbours.predict(validation.reshape(len(validation), -1))}
    maps, labels, of_validation = (torch.from_numpy(x) for x in (train, context.train_labels, validation))

    torch.manual_seed(seed)
    linear = probe_heads.linear_head(channels, p, num_classes).to(device)
    optimizer = torch.optim.SGD(linear.parameters(), settings.sgd_learning_rate, momentum=0.9)
    probe_heads.train_head(linear, optimizer, [maps], labels, settings.epochs, settings.train_batch_size, seed)
    heads, chosen = {"linear, SGD": linear}, {}
    builders = {
        "MLP": lambda: probe_heads.mlp_head(channels, p, num_classes, width).to(device),
        "CNN": lambda: probe_heads.cnn_head(channels, num_classes, width).to(device),
        "attention": lambda: probe_heads.FusionHead([(channels, p)], 1, num_classes, width).to(device),
    }
    for name, build in builders.items():
        held_out = context.settings.linear.held_out
        heads[name], chosen[name] = probe_heads.fit_head(build, [maps], labels, settings, held_out, seed)
    for name, head in heads.items():
        predictions[name] = probe_heads.predict(head, [of_validation], settings.train_batch_size).numpy()
    return predictions, chosen
