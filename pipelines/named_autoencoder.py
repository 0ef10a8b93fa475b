"""An autoencoder by where it lies, a folder or a Hub id; a pipeline may name it so, in place of holding its weights.

It is of one of diffusers' own classes, so that no code from there is run.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin

from latent_egc.models.weights import check_loaded


def read_autoencoder(source: str, subfolder: str | None = None, **options: Any) -> ModelMixin:
    """Any of diffusers' autoencoders that `latents.py` can scale, in eval mode.

    Args:
        source: a folder or a Hub id.
        subfolder: where in it.
        **options: of `ModelMixin.from_pretrained`.

    Raises:
        ValueError: another network, an autoencoder that is not supported, or weights that do not fit it, by name. What
            diffusers raises where nothing can be read is as various as what may be wrong.
    """
    hub = {name: value for name, value in options.items() if name != "use_safetensors"}
    class_name = AutoencoderKL.load_config(source, subfolder=subfolder, **hub).get("_class_name")
    kind = getattr(diffusers, class_name or "", None)
    if not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise ValueError(f"it is a {class_name}, not an autoencoder")
    vae, report = kind.from_pretrained(source, subfolder=subfolder, output_loading_info=True, **options)
    check_loaded(vae, report)
    for needed in (("latent_channels", "z_dim"), ("scaling_factor", "latents_std")):
        if all(vae.config.get(field) is None for field in needed):
            raise ValueError(f"{class_name} has neither {' nor '.join(needed)}, it is not supported")
    return vae


def named_autoencoder(name: str, **hub_options: Any) -> ModelMixin:
    """The autoencoder that a pipeline names, in float32, from safetensors alone.

    Args:
        name: a folder or a Hub id, of the autoencoder by itself or of a pipeline, whose `vae` is meant.
        **hub_options: how files are found on the Hub, such as `cache_dir` and `token`.

    Raises:
        ValueError: it cannot be loaded; says what to do.
    """
    folder = Path(name).expanduser()
    source, subfolder = str(folder) if folder.is_dir() else name, None
    try:
        if not folder.is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            raise ValueError("there is no such folder")  # and it is no Hub id
        with suppress(OSError):  # else it is no pipeline
            DiffusionPipeline.load_config(source, **hub_options)
            subfolder = "vae"
        return read_autoencoder(source, subfolder, use_safetensors=True, **hub_options)
    except Exception as error:  # diffusers has no common error for what cannot be reached or is damaged
        raise ValueError(
            f"autoencoder={name!r} cannot be loaded: {error}; say where it is by "
            "autoencoder=..., or give the pipeline the autoencoder itself by vae=..."
        ) from error
