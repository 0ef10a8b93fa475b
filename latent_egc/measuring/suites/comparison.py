"""Suite `comparison`: the energy's own classifier beside the linear probe of its features."""

import torch

from latent_egc.config import ConfigError
from latent_egc.measuring.probe_context import CHOICE_NOTE, ProbeContext
from latent_egc.measuring.probe_heads import linear_probe
from latent_egc.measuring.results import SuiteResult, Table
from latent_egc.models import EnergyModel

Settings = None


def run(context: ProbeContext, settings: None = None) -> SuiteResult:
    """The energy's own classifier beside the linear probe of its features, on the same weights and images.

    Raises:
        ConfigError: another denoiser than an energy network, or other classes than its own.
    """
    denoiser = context.denoiser
    if not isinstance(denoiser.network, EnergyModel):
        raise ConfigError(f"--suite comparison needs an energy network, got {type(denoiser.network).__name__}")
    if denoiser.class_names != context.class_names:
        raise ConfigError(
            "--suite comparison needs the energy network's own classes, "
            f"{denoiser.class_names[:3]} ..., the data's are {context.class_names[:3]} ..."
        )
    train, validation = (context.cache.latents(split) for split in ("train", "validation"))
    _, probed = context.probe(context.place)
    config, seed = context.settings.linear, context.settings.seed
    _, raw = linear_probe(train.numpy(), context.train_labels, validation.numpy(), context.labels, config, seed)
    with torch.no_grad():
        batches, network = validation.split(context.settings.batch_size), denoiser.network
        own = torch.cat([network(batch.to(network.device), 0).logits.argmax(dim=1).cpu() for batch in batches]).numpy()
    own, probed, raw = (found == context.labels for found in (own, probed, raw))
    rows = [
        [name, int((side & probed).sum()), int((side & ~probed).sum())]
        for name, side in (("right", own), ("wrong", ~own))
    ]
    return SuiteResult(
        num_samples=len(context.labels),
        metrics={
            "energy's own classifier, clean latents at timestep 0": context.accuracy(own),
            f"linear probe at {context.place}": context.accuracy(probed),
            "probe less classifier": context.accuracy(probed.astype(float) - own),  # of pairs: the same images
            "linear probe of the clean latents": context.accuracy(raw),
        },
        tables=[Table("Images by who is right", ["classifier", "probe right", "probe wrong"], rows)],
        notes=[CHOICE_NOTE, "The difference's interval resamples images, which both sides share."],
    )
