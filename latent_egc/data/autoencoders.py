"""The pretrained autoencoder: load it, encode images, know it again. Frozen; its own factors scale the latents.

Encoding keeps the moments (mean and log variance of the posterior, or plain latents for an autoencoder without a
posterior), so that a cache can be sampled anew each time it is read. Pixel space is `None`: pixels are the latents.
"""

import hashlib
import json
from importlib import resources
from pathlib import Path

import torch
from diffusers import ModelMixin

from latent_egc.config import AutoencoderConfig, ConfigError
from latent_egc.pipelines.latents import latent_channels, latent_moments, scale_latents, vae_scale_factor
from latent_egc.pipelines.named_autoencoder import read_autoencoder


def load_autoencoder(config: AutoencoderConfig, device: str | torch.device = "cpu") -> ModelMixin | None:
    """The autoencoder in eval mode, its parameters frozen; None for pixel space. Raises ConfigError, naming the key."""
    if config.path is None:
        return None
    path = Path(config.path).expanduser()
    if config.path == "digits_vae":
        path = Path(str(resources.files("latent_egc") / "assets" / "digits_vae"))
    if config.subfolder is not None and path.is_dir() and not (path / config.subfolder).is_dir():
        raise ConfigError(f"autoencoder.subfolder={config.subfolder!r}: no such folder in {path}")
    source = str(path) if path.is_dir() else config.path
    try:
        vae = read_autoencoder(source, config.subfolder)
    except Exception as error:  # diffusers has no common error for a folder with a damaged file
        raise ConfigError(f"autoencoder.path={config.path!r} cannot be loaded: {error}") from error
    if config.slicing:
        vae.enable_slicing()
    return vae.to(device).eval().requires_grad_(False)


def latent_shape(vae: ModelMixin | None, image_size: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images. Raises ConfigError where `image_size` does not fit."""
    if vae is None:
        return 3, image_size, image_size
    factor = vae_scale_factor(vae)
    if image_size % factor:
        raise ConfigError(f"data.image_size must be divisible by the autoencoder's factor {factor}, got {image_size}")
    return latent_channels(vae), image_size // factor, image_size // factor


def has_posterior(vae: ModelMixin | None) -> bool:
    """Whether its moments are a mean and a log variance, which can be sampled; else they are the latents."""
    if vae is None:
        return False
    size = 2 * vae_scale_factor(vae)
    return encode_moments(vae, torch.zeros(1, 3, size, size)).shape[1] == 2 * latent_channels(vae)


@torch.no_grad()
def encode_moments(vae: ModelMixin | None, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [-1, 1] -> unscaled moments (N, 2C, h, w), or latents (N, C, h, w) without a posterior."""
    if vae is None:
        return pixel_values
    return latent_moments(vae, pixel_values.to(vae.device))


def latents_from_moments(
    vae: ModelMixin | None, moments: torch.Tensor, posterior_noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Scaled latents (N, C, h, w) from what `encode_moments` returned.

    Args:
        vae: the autoencoder that encoded.
        moments: (N, 2C, h, w) or (N, C, h, w).
        posterior_noise: (N, C, h, w) standard normal draws the posterior sample; None takes its mean. Without effect
            where there is no posterior.
    """
    if vae is None:
        return moments
    mean = moments
    if moments.shape[1] == 2 * latent_channels(vae):
        mean, log_variance = moments.chunk(2, dim=1)
        if posterior_noise is not None:
            # The bounds are those of diffusers' DiagonalGaussianDistribution.
            mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * posterior_noise
    return scale_latents(vae, mean)


def fingerprint(vae: ModelMixin | None) -> str:
    """Class and a digest of weights and configuration: another value means another autoencoder."""
    if vae is None:
        return "pixels"
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    settings = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return f"{type(vae).__name__}-{digest.hexdigest()[:16]}"


def store_channels_last(vae: ModelMixin) -> None:
    """Stores an autoencoder's 2D convolutions channels last, which is faster; docs/decisions.md has the error."""
    for parameter in vae.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
