"""An autoencoder's latents: their channels, size and scale, which each kind of autoencoder says in words of its own."""

import torch
from diffusers import ModelMixin


def latent_channels(vae: ModelMixin | None) -> int:
    """C of the latents; the 3 of pixels without an autoencoder."""
    return 3 if vae is None else vae.config.get("latent_channels") or vae.config.z_dim


def vae_scale_factor(vae: ModelMixin | None) -> int:
    """Pixels per latent, in height and width; 1 in pixel space."""
    if vae is None:
        return 1
    ratio = getattr(vae, "spatial_compression_ratio", None)  # AutoencoderDC, Qwen's, Wan's, ...
    return 2 ** (len(vae.config.block_out_channels) - 1) if ratio is None else int(ratio)


def latent_moments(vae: ModelMixin, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images to unscaled moments, mean and log variance of the posterior, or to plain latents where there is none.

    Args:
        vae: the autoencoder.
        pixel_values: (N, 3, H, W) in [-1, 1].

    Returns:
        (N, 2C, h, w), or (N, C, h, w) without a posterior, at least float32. Differentiable.
    """
    encoded = vae.encode(_as_frames(vae, pixel_values.to(vae.dtype)))[0]
    moments = _as_images(vae, getattr(encoded, "parameters", encoded))  # a distribution has them
    return moments.to(torch.promote_types(moments.dtype, torch.float32))


def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (N, C, h, w) to images (N, 3, H, W), about in [-1, 1]. Differentiable."""
    latents = _as_frames(vae, unscale_latents(vae, latents).to(vae.dtype))
    return _as_images(vae, vae.decode(latents).sample)


def scale_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents (N, C, h, w) -> about unit variance, by its own numbers or those of its channels.

    Source: diffusers' pipelines, (z - shift_factor) scaling_factor, or (z - latents_mean) scaling_factor / latents_std.
    """
    shift, scale = _shift_and_scale(vae, latents)
    return (latents - shift) * scale


def unscale_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `scale_latents`."""
    shift, scale = _shift_and_scale(vae, latents)
    return latents / scale + shift


def _shift_and_scale(vae: ModelMixin, latents: torch.Tensor) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """A number, or (1, C, 1, 1) for an autoencoder that scales by channel, each."""
    config = vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None:
        shift = latents.new_tensor(config.latents_mean)[None, :, None, None]
    if config.get("latents_std") is not None:
        scale = scale / latents.new_tensor(config.latents_std)[None, :, None, None]
    return shift, scale


def _takes_frames(vae: ModelMixin) -> bool:
    """Whether it is a video autoencoder, as Qwen's and Wan's, for which an image is a video of one frame."""
    return vae.config.get("temperal_downsample") is not None


def _as_frames(vae: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    return images[:, :, None] if _takes_frames(vae) else images


def _as_images(vae: ModelMixin, frames: torch.Tensor) -> torch.Tensor:
    return frames[:, :, 0] if _takes_frames(vae) else frames
