"""What the converters share: the refusal of tensors that do not fit, and the pipeline that they write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_egc.atomic import CheckpointError, replace_folder
from latent_egc.config import AutoencoderConfig, ConfigError
from latent_egc.data.autoencoders import load_autoencoder
from latent_egc.models import EnergyModel
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.latents import latent_channels
from latent_egc.pipelines.schedulers import default_scheduler


def write_pipeline(
    folder: Path,
    model: EnergyModel,
    autoencoder: AutoencoderConfig,
    id2label: Mapping[Any, str] | None,
    guidance_scale: float,
) -> Path:
    """Joins a converted network with its autoencoder and writes them whole, or nothing; returns `folder`.

    Raises:
        ConfigError: the autoencoder cannot be used or makes other latents.
        CheckpointError: writing failed.
    """
    vae = load_autoencoder(autoencoder)
    channels = latent_channels(vae)
    if channels != model.config.in_channels:
        raise ConfigError(
            f"autoencoder={autoencoder.path!r} makes latents of {channels} channels, the network takes "
            f"{model.config.in_channels}"
        )
    pipeline = EGCPipeline(model, vae, default_scheduler(model), id2label, guidance_scale)
    replace_folder(folder, pipeline.save_pretrained)
    return folder


def refuse_tensors(network: str, offending: Mapping[str, list[str]]) -> None:
    """Raises CheckpointError, which names them, where any fault ("missing", ...) has names of tensors."""
    parts = []
    for fault, names in offending.items():
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            parts.append(f"{fault}: {', '.join(names[:20])}{more}")
    if parts:
        raise CheckpointError(f"the checkpoint does not fit {network}; " + "; ".join(parts))
