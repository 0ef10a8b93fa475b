"""A class-conditional diffusion transformer (DiT, Peebles and Xie, ICCV 2023), as diffusers stores it, as a pipeline.

The noise predictor becomes an energy network to go on training from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel

from latent_egc.atomic import CheckpointError, check_unoccupied
from latent_egc.config import AutoencoderConfig
from latent_egc.exchange.conversion import refuse_tensors, write_pipeline
from latent_egc.models import EGCTransformer

# Modules of an EGCTransformer -> diffusers' DiT; the embeddings are those of its first block, which all blocks share.
DIT_NAMES = {
    "patch_embedding.proj": "pos_embed.proj",
    "time_embedding.linear_1": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
    "time_embedding.linear_2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
    "label_embedding": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table",
    "modulation_out": "proj_out_1",
    "proj_out": "proj_out_2",
}
DIT_BLOCK_NAMES = {
    "modulation": "norm1.linear",
    "attn.to_q": "attn1.to_q",
    "attn.to_k": "attn1.to_k",
    "attn.to_v": "attn1.to_v",
    "attn.to_out": "attn1.to_out.0",
    "ff.net.0.proj": "ff.net.0.proj",
    "ff.net.2": "ff.net.2",
}
# What an EGCTransformer always is, in the words of the DiT's and its scheduler's configurations.
DIT_OPTIONS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
DIT_SCHEDULER_OPTIONS = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}
SCHEDULE_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


def from_dit(source: str | Path, folder: str | Path, *, autoencoder: str | None = None) -> Path:
    """Writes a diffusers DiT as a pipeline folder: an `EGCTransformer` of head "inner" to go on training from.

    The energy is <z, h> / 2 - sigma_t * logsumexp(logits), with the DiT's noise output as the field h. What is kept:
    `network(...)[0]`, h itself, is the DiT's output for every label and for the null label. What is not: epsilon, the
    energy's gradient, equals h only where h is linear and symmetric in z; and the logits, which a DiT has not, start
    uniform. So train it before it samples or classifies: `model.init_from: FOLDER` in a run's configuration.

    Learned-variance channels are dropped. The noise schedule is the repository's scheduler's.

    Args:
        source: a Hub id such as "facebook/DiT-XL-2-256", or a local folder of that layout: model_index.json (with the
            names of the classes, id2label), transformer/, scheduler/ and vae/.
        folder: the pipeline's folder to write; must not exist, or be empty.
        autoencoder: a Hub id or a folder to use in the place of the repository's own; None: the latter.

    Returns:
        `folder`.

    Raises:
        OSError: `source` is no such repository or folder, or lacks a part.
        CheckpointError: the network cannot be read, or uses what an `EGCTransformer` has not (named), or its blocks'
            embeddings differ, or writing failed; nothing half-written stays.
        ConfigError: `folder` holds something, or the autoencoder cannot be used or makes other latents.
        ValueError: a size or schedule that `EGCTransformer` refuses.
    """
    source, folder = str(source), Path(folder)
    check_unoccupied(folder)
    id2label = DiffusionPipeline.load_config(source).get("id2label")
    scheduler = DDIMScheduler.load_config(source, subfolder="scheduler")  # the values only, of whatever class they are
    absent = [field for field in SCHEDULE_FIELDS if field not in scheduler]
    if absent:
        raise CheckpointError(f"the scheduler in {source} says nothing of {', '.join(absent)}")
    _check_options("scheduler", scheduler, DIT_SCHEDULER_OPTIONS)
    transformer = dit_transformer(_read_dit(source), **{field: scheduler[field] for field in SCHEDULE_FIELDS})
    vae = AutoencoderConfig(path=source, subfolder="vae")
    if autoencoder is not None:
        vae = AutoencoderConfig(path=autoencoder)
    return write_pipeline(folder, transformer, vae, id2label, guidance_scale=1.0)


def _read_dit(source: str) -> DiTTransformer2DModel:
    """The network in a repository's folder transformer/, in float32; older repositories name its class otherwise."""
    config = DiTTransformer2DModel.load_config(source, subfolder="transformer")
    name, norm = config.get("_class_name"), config.get("norm_type")
    if name not in ("DiTTransformer2DModel", "Transformer2DModel") or norm != "ada_norm_zero":
        raise CheckpointError(f"the network in {source} is no DiT: it is a {name} with norm_type={norm!r}")
    try:
        dit, report = DiTTransformer2DModel.from_pretrained(source, subfolder="transformer", output_loading_info=True)
    except (ValueError, RuntimeError) as error:  # a tensor of the wrong shape among others, which the error names
        raise CheckpointError(f"the network in {source} cannot be read: {error}") from error
    faults = {"missing": sorted(report["missing_keys"]), "unexpected": sorted(report["unexpected_keys"])}
    refuse_tensors("the DiT that its configuration describes", faults)
    return dit


def dit_transformer(dit: DiTTransformer2DModel, **schedule: Any) -> EGCTransformer:
    """A DiT as an `EGCTransformer` of head "inner", in eval mode, its field h the DiT's noise output; see `from_dit`.

    Args:
        dit: class-conditional; its weights are shared, not copied.
        **schedule: num_train_timesteps, beta_start, beta_end, beta_schedule.

    Raises:
        CheckpointError: an option that `EGCTransformer` has not, or blocks with embeddings of their own.
        ValueError: a size or schedule that `EGCTransformer` refuses.
    """
    config, channels = dit.config, dit.config.in_channels
    _check_options("DiT", config, DIT_OPTIONS)
    if dit.out_channels not in (channels, 2 * channels):
        raise CheckpointError(
            f"the DiT has out_channels={dit.out_channels}, neither in_channels={channels} nor, with learned variances, "
            f"{2 * channels}"
        )
    _check_shared_embeddings(dit)
    transformer = EGCTransformer(
        sample_size=config.sample_size,
        in_channels=channels,
        num_classes=config.num_embeds_ada_norm,
        head="inner",
        gaussian_part=False,
        class_embedding=True,
        patch_size=config.patch_size,
        width=config.num_attention_heads * config.attention_head_dim,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        qk_norm=False,
        **schedule,
    )
    modules = DIT_NAMES | {
        f"blocks.{layer}.{own}": f"transformer_blocks.{layer}.{their}"
        for layer in range(config.num_layers)
        for own, their in DIT_BLOCK_NAMES.items()
    }
    theirs, tensors = dit.state_dict(), transformer.state_dict()
    for name in tensors:
        module, _, parameter = name.rpartition(".")
        if module != "class_out":  # a DiT does not classify; this layer stays at zero
            tensors[name] = theirs[f"{modules[module]}.{parameter}"]
    for name in ("proj_out.weight", "proj_out.bias"):
        # Rows are ordered (row, column, channel) within the patch, and the variances' channels come second.
        tensors[name] = tensors[name].unflatten(0, (-1, dit.out_channels))[:, :channels].flatten(0, 1)
    transformer.load_state_dict(tensors, assign=True)
    return transformer.eval()


def _check_options(owner: str, config: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Raises CheckpointError, which names them, where options are given otherwise than needed."""
    others = [f"{name}={config[name]!r}" for name, value in needed.items() if config.get(name, value) != value]
    if others:
        allowed = ", ".join(f"{name}={value!r}" for name, value in needed.items())
        raise CheckpointError(f"the {owner} has {', '.join(others)}; an EGCTransformer can only take over {allowed}")


def _check_shared_embeddings(dit: DiTTransformer2DModel) -> None:
    """Diffusers keeps a timestep and label embedding in every block; raises CheckpointError where they differ."""
    first, *others = (block.norm1.emb.state_dict() for block in dit.transformer_blocks)
    different = [
        f"transformer_blocks.{layer}"
        for layer, embeddings in enumerate(others, start=1)
        if any(not torch.equal(embeddings[name], tensor) for name, tensor in first.items())
    ]
    if different:
        raise CheckpointError(
            "an EGCTransformer has one timestep and label embedding for all blocks; those of "
            f"{', '.join(different)} differ from transformer_blocks.0's"
        )
