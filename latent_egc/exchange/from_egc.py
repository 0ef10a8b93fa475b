"""The U-Net of the published EGC implementation as a pipeline (Guo et al., ICCV 2023, github.com/GuoQiushan/EGC).

Its modules bear latent diffusion's names. The architecture is inferred from names and shapes; then every tensor must
find its place in an `EGCUNet` and every place its tensor, or nothing is written.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from latent_egc.atomic import CheckpointError, check_unoccupied
from latent_egc.config import AutoencoderConfig
from latent_egc.exchange.conversion import refuse_tensors, write_pipeline
from latent_egc.models import EGCUNet

# Stable Diffusion's autoencoder with a better decoder; the encoder, which makes the latents, is the same.
DEFAULT_AUTOENCODER = "stabilityai/sd-vae-ft-mse"
# The classifier's weight with which the published samples were drawn, over 100 DDIM steps.
EGC_GUIDANCE_SCALE = 6.0

# Names inside a block, ours -> the published implementation's.
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TRANSFORMER_NAMES = {name: name for name in ("norm", "proj_in", "proj_out")}
TRANSFORMER_NAMES |= {
    name: f"transformer_blocks.0.{name}" for name in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")
}
TRANSFORMER_NAMES |= {
    f"attn{number}.{own}": f"transformer_blocks.0.attn{number}.{their}"
    for number in (1, 2)
    for own, their in {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}.items()
}


def from_egc(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    autoencoder: str | None = DEFAULT_AUTOENCODER,
    sample_size: int = 32,
    num_attention_heads: int = 4,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    id2label: Mapping[int, str] | None = None,
) -> Path:
    """Writes a checkpoint of the published EGC implementation as a pipeline folder, its weights in float32.

    What a checkpoint does not say is an argument, with the value of the published ImageNet-256 model as the default; a
    wrong one gives a pipeline that runs and is wrong.

    Args:
        checkpoint: a .safetensors file, or a .pt file of tensors (read with `weights_only=True`).
        folder: the pipeline's folder to write; must not exist, or be empty.
        autoencoder: whose latents the network was trained on: a Hub id or a folder; None: pixel space.
        sample_size: height and width of the latents.
        num_attention_heads: heads of every transformer.
        beta_start, beta_end: of the 1,000 linear betas.
        id2label: class id -> name; None: the ids are the names. For a network without a class embedding, giving it says
            that the channels of the output map are classes; otherwise such a network is an unlabelled one.

    Returns:
        `folder`.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: the checkpoint cannot be read or is not such a U-Net (the tensors that are missing, unexpected
            or of the wrong shape are named), or writing failed; nothing half-written stays.
        ConfigError: `folder` holds something, or the autoencoder cannot be used or makes other latents.
        ValueError: an argument does not fit the network.
    """
    folder = Path(folder)
    check_unoccupied(folder)
    unet = egc_unet(
        read_tensors(Path(checkpoint)),
        sample_size=sample_size,
        num_attention_heads=num_attention_heads,
        beta_start=beta_start,
        beta_end=beta_end,
        has_classes=id2label is not None,
    )
    guidance_scale = EGC_GUIDANCE_SCALE if unet.config.num_classes else 1.0
    return write_pipeline(folder, unet, AutoencoderConfig(path=autoencoder), id2label, guidance_scale)


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a .safetensors or .pt file, out of the usual wrappers and without DDP's "module.".

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is damaged, holds Python objects, or is not a dict of tensors.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no such checkpoint: {checkpoint}")
    try:
        if checkpoint.suffix == ".safetensors":
            tensors = load_file(checkpoint)
        else:
            tensors = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors have no common error
        raise CheckpointError(
            f"{checkpoint} is damaged or not a file of tensors (pickled objects are refused, they could run code)"
        ) from error
    for wrapper in ("ema", "state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
            break
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{checkpoint} holds no state dict, a dict of names and tensors")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def egc_unet(
    tensors: Mapping[str, torch.Tensor], *, num_attention_heads: int = 4, has_classes: bool = False, **options: Any
) -> EGCUNet:
    """The published implementation's U-Net as an `EGCUNet`, in eval mode, which holds the given tensors as float32.

    Args:
        tensors: by the published names; tensors on the meta device give a network there.
        num_attention_heads: as in `from_egc`.
        has_classes: whether the output map's channels are classes; with a class embedding they always are.
        options: other arguments of `EGCUNet` that names and shapes do not show: sample_size, beta_start, beta_end.

    Raises:
        CheckpointError: the tensors are not those of such a U-Net.
        ValueError: an argument does not fit the network.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    architecture = _egc_architecture(shapes, has_classes)
    width = shapes["middle_block.1.proj_in.weight"][0]  # of every transformer
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"num_attention_heads must divide the transformers' width {width}, got {num_attention_heads}")
    heads = {"num_attention_heads": num_attention_heads, "attention_head_dim": width // num_attention_heads}
    with torch.device("meta"):  # names and shapes only: the weights are those of the checkpoint
        unet = EGCUNet(gaussian_part=False, **architecture, **heads, **options)
    names = egc_names(unet)
    expected = {names[name]: tuple(place.shape) for name, place in unet.state_dict().items()}
    misshapen = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrong shape": [f"{name} {shapes[name]} instead of {expected[name]}" for name in misshapen],
    }
    refuse_tensors("the U-Net that its names imply", faults)
    unet.load_state_dict({name: tensors[names[name]].float() for name in names}, assign=True)
    return unet.eval()


def egc_names(unet: EGCUNet) -> dict[str, str]:
    """Parameter names of `unet` -> the published implementation's names of the same parameters."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_tokens": "label_emb",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }

    def add_block(block: str, resnet: str, attention: str) -> None:
        modules.update({f"{block}.resnet.{own}": f"{resnet}.{their}" for own, their in RESNET_NAMES.items()})
        modules.update({f"{block}.attention.{own}": f"{attention}.{their}" for own, their in TRANSFORMER_NAMES.items()})

    number = 1  # theirs count blocks and resampling of all levels in one sequence
    for level, blocks in enumerate(unet.down_blocks):
        for layer in range(len(blocks)):
            theirs = f"input_blocks.{number}"
            add_block(f"down_blocks.{level}.{layer}", f"{theirs}.0", f"{theirs}.1")
            number += 1
        modules[f"downsamplers.{level}.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    add_block("mid_blocks.0", "middle_block.0", "middle_block.1")
    add_block("mid_blocks.1", "middle_block.2", "")  # without a transformer
    number = 0
    for step, blocks in enumerate(unet.up_blocks):
        for layer, block in enumerate(blocks):
            theirs = f"output_blocks.{number}"
            add_block(f"up_blocks.{step}.{layer}", f"{theirs}.0", f"{theirs}.1")
            # Theirs upsample inside a level's last block, behind its transformer if it has one.
            modules[f"upsamplers.{step}.conv"] = f"{theirs}.{1 if block.attention is None else 2}.conv"
            number += 1

    parts = (name.rpartition(".") for name in unet.state_dict())
    return {f"{module}.{parameter}": f"{modules[module]}.{parameter}" for module, _, parameter in parts}


def _egc_architecture(shapes: Mapping[str, tuple[int, ...]], has_classes: bool) -> dict[str, Any]:
    """The arguments of `EGCUNet` that names and shapes show, except the transformers' width and heads."""

    def size(name: str, dimension: int) -> int:
        if len(shapes.get(name, ())) <= dimension:
            raise CheckpointError(f"the checkpoint is no EGC U-Net: {name} is missing or misshapen")
        return shapes[name][dimension]

    members = {tuple(name.split(".")[:4]) for name in shapes}
    levels: list[list[int]] = [[]]  # the numbers of each level's ResNet blocks
    for number in itertools.count(1):
        if ("input_blocks", str(number), "0", "op") in members:
            levels.append([])
        elif ("input_blocks", str(number), "0", "in_layers") in members:
            levels[-1].append(number)
        else:
            break
    if not all(levels):
        raise CheckpointError(f"the checkpoint is no EGC U-Net: input_blocks.{number}.0.in_layers is missing")
    size("middle_block.1.proj_in.weight", 0)
    num_outputs, class_embedding = size("out.2.weight", 0), "label_emb.weight" in shapes
    has_classes = has_classes or class_embedding
    return {
        "in_channels": size("input_blocks.0.0.weight", 1),
        "num_classes": num_outputs if has_classes else None,
        "energy_channels": None if has_classes else num_outputs,
        "class_embedding": class_embedding,
        "class_embedding_dim": size("label_emb.weight", 1) if class_embedding else None,
        "block_out_channels": tuple(size(f"input_blocks.{blocks[0]}.0.in_layers.2.weight", 0) for blocks in levels),
        "layers_per_block": len(levels[0]),
        "attention_levels": tuple(
            level for level, blocks in enumerate(levels) if ("input_blocks", str(blocks[0]), "1", "norm") in members
        ),
    }
