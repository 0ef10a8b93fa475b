"""Training that starts from a trained network's weights: fine-tuning, or going on from a converted checkpoint."""

import json
import warnings
from pathlib import Path

from latent_egc.config import ConfigError
from latent_egc.models import EnergyModel
from latent_egc.training.checkpoints import resolve_pipeline

MAY_DIFFER = ("num_classes", "energy_channels", "sample_size")


def load_initial_weights(model: EnergyModel, source: str) -> None:
    """Copies the weights of another network of the same configuration into `model`.

    The latents' size may differ, and the classes: what depends on their number (the layer that gives the logits, or the
    output map; the class embedding) then stays as freshly initialised, and a warning names it.

    Args:
        model: freshly built.
        source: an energy network's folder, or a pipeline as `resolve_pipeline` finds it.

    Raises:
        ConfigError: nothing there that can be loaded, another backbone, or a network that differs otherwise; by name.
    """
    try:
        place, subfolder = Path(source).expanduser(), None
        # An exported pipeline has a config.json too, transformers'.
        if (place / "model_index.json").is_file() or not (place / "config.json").is_file():
            place, subfolder = resolve_pipeline(source), "energy_model"
        other = type(model).from_pretrained(place, subfolder=subfolder)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model.init_from={source!r} cannot be loaded: {error}") from error
    ours, theirs = (json.loads(network.to_json_string()) for network in (model, other))
    differences = [
        f"{key} is {theirs[key]!r} there, {ours[key]!r} here"
        for key in ours
        if not key.startswith("_") and key not in MAY_DIFFER and theirs[key] != ours[key]
    ]
    if differences:
        raise ConfigError(
            f"model.init_from={source!r} is another network, only {', '.join(MAY_DIFFER)} may differ: "
            + "; ".join(differences)
        )
    places, tensors = model.state_dict(), other.state_dict()
    # With one configuration, shapes differ only where they depend on the classes.
    fitting = {name: t for name, t in tensors.items() if name in places and places[name].shape == t.shape}
    fresh = sorted(places.keys() - fitting.keys())
    if fresh:
        warnings.warn(f"model.init_from: other classes, freshly initialised are {', '.join(fresh)}", stacklevel=2)
    model.load_state_dict(fitting, strict=False)
