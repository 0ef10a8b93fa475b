"""Export: a run's pipeline as one self-contained folder, with a model card.

Saving a pipeline puts the code files of the energy network and the pipeline beside the weights (they import torch,
diffusers and the standard library only); the card is `model_card.py`'s. `EGCPipeline.from_pretrained(FOLDER)` uses
the installed classes; `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` the code beside the weights.
For transformers the folder also says how its weights are read as an image classifier's, see `image_classification.py`.
"""

import inspect
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi
from safetensors.torch import save_file

from latent_egc.atomic import check_unoccupied, replace_folder
from latent_egc.config import ConfigError
from latent_egc.exchange.image_classification import LINEAR_FILE, EGCConfig, EGCImageProcessor
from latent_egc.exchange.model_card import write_card
from latent_egc.models.weights import check_weights
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.named_autoencoder import named_autoencoder
from latent_egc.training.checkpoints import resolve_pipeline


def export(
    run: str | Path,
    folder: str | Path,
    push_to_hub: str | None = None,
    autoencoder: str | None = None,
    dtype: torch.dtype = torch.float32,
    license: str | None = None,
    training_data: str | None = None,
) -> Path:
    """Writes a run's pipeline as a folder for the Hub.

    Args:
        run: a run's folder; its last pipeline is taken, or its best checkpoint's where training has not ended.
        folder: what to write; must not exist, or be empty.
        push_to_hub: a repository such as "user/name" to upload the folder to; created where it does not exist.
        autoencoder: Hub id or folder that the pipeline names in place of its autoencoder's weights. What lies there is
            compared with the pipeline's own; a Hub id that cannot be loaded is believed, with a warning.
        dtype: in which the weights are stored: float32, or float16. They are loaded as float32 either way.
        license: of the weights, for the card's metadata, such as "mit".
        training_data: for the card, what the network was trained on and on which terms, in Markdown.

    Returns:
        `folder`.

    Raises:
        FileNotFoundError: no pipeline in `run`.
        ConfigError: the pipeline cannot be loaded, `folder` holds something, `autoencoder` is not the pipeline's, or
            another `dtype`.
        ValueError: weights that are too large for `dtype`, by name.
        CheckpointError: writing failed; nothing half-written stays.
    """
    if dtype not in (torch.float32, torch.float16):
        raise ConfigError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
    run, folder = Path(run), Path(folder)
    source = resolve_pipeline(run)
    check_unoccupied(folder)
    try:
        pipeline = EGCPipeline.from_pretrained(source)
    except Exception as error:  # diffusers has no common error for a folder with a damaged file
        raise ConfigError(f"the pipeline {source} cannot be loaded: {error}") from error
    if autoencoder is not None:
        _check_named(pipeline, autoencoder)
        pipeline = EGCPipeline(**(pipeline.components | {"autoencoder": autoencoder}))
    if dtype == torch.float16:
        for network in filter(None, (pipeline.energy_model, pipeline.vae)):
            check_weights(network.half())  # a large one may be infinite now

    def write(unfinished: Path) -> None:
        pipeline.save_pretrained(unfinished)
        add_transformers_files(unfinished, pipeline)
        name = push_to_hub or (folder.name if folder.is_absolute() else folder.as_posix())
        write_card(unfinished, pipeline, run, source, name, license, training_data)

    replace_folder(folder, write)
    if push_to_hub is not None:
        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=folder, commit_message="Export from latent-egc")
    return folder


def _check_named(pipeline: EGCPipeline, autoencoder: str) -> None:
    """Compares what an autoencoder's name means with the pipeline's own; a Hub id that cannot be loaded is believed.

    Raises ConfigError where it is another one, where nothing can be loaded, and in pixel space.
    """
    if pipeline.vae is None:
        raise ConfigError(f"autoencoder={autoencoder!r}: the pipeline is in pixel space, it has no autoencoder to name")
    try:
        named = named_autoencoder(autoencoder)
    except ValueError as error:
        if Path(autoencoder).expanduser().exists() or not isinstance(error.__cause__, OSError):
            raise ConfigError(str(error)) from error
        warnings.warn(f"not compared with the pipeline's own autoencoder: {error}", stacklevel=2)
        return
    there, here = _constructor_arguments(named), _constructor_arguments(pipeline.vae)
    differing = [name for name in here | there if here.get(name) != there.get(name)]
    weights = named.state_dict()
    differing += [
        name
        for name, tensor in pipeline.vae.state_dict().items()
        # Of half floats here or there: the same autoencoder is stored as either.
        if name not in weights or not torch.equal(tensor.half(), weights[name].half())
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"autoencoder={autoencoder!r} is not the one whose latents the network was trained on, it differs in "
            f"{', '.join(differing[:5])}{more}"
        )


@dataclass(frozen=True)
class LinearHead:
    """A linear layer on pooled features, which makes classes of them.

    Args:
        weight, bias: (K, D p^2) and (K,) of the features as they come, not standardised.
        names: of the K classes.
        block, timestep, pooling: where the features are taken, see `EGCConfig`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    names: list[str]
    block: str
    timestep: int
    pooling: int


def add_transformers_files(folder: Path, pipeline: EGCPipeline, head: LinearHead | None = None) -> None:
    """Makes a saved pipeline's folder also a model of transformers, whose weights are those that lie there already.

    Args:
        folder: where the pipeline was saved.
        pipeline: what was saved.
        head: what classifies; None: the energy network itself.
    """
    names, place = pipeline.id2label, {}
    if head is not None:
        save_file({"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}, folder / LINEAR_FILE)
        names = dict(enumerate(head.names))
        place = {"block": head.block, "timestep": head.timestep, "pooling": head.pooling}
    config = EGCConfig(
        energy_model=_constructor_arguments(pipeline.energy_model),
        vae=None if pipeline.vae is None else _constructor_arguments(pipeline.vae),
        autoencoder=pipeline.config.autoencoder,
        classifier="energy" if head is None else "linear",
        id2label=names,
        label2id={name: i for i, name in names.items()},
        weights_in_components=True,
        architectures=["EGCForImageClassification"],
        dtype="float32",  # also of stored half floats: diffusers loads them so, transformers would leave them halves
        **place,
    )
    config.save_pretrained(folder)
    EGCImageProcessor(pipeline.image_size).save_pretrained(folder)


def _constructor_arguments(network: ModelMixin) -> dict[str, Any]:
    """What its class and its configuration are, without what its constructor adds to the latter."""
    wanted = inspect.signature(type(network)).parameters
    config = json.loads(network.to_json_string())
    return {"_class_name": type(network).__name__} | {k: v for k, v in config.items() if k in wanted}
