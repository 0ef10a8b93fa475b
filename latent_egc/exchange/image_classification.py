"""An exported folder as transformers sees it: an image classifier, and a backbone that gives features.

The weights are the pipeline's own, read from its component folders: the energy network's and, of the autoencoder's,
those of its encoder. This file travels to the Hub beside them, so it imports torch, diffusers, transformers and the
standard library only; where latent_egc is installed, importing it registers its classes with transformers' Auto
classes, and no code from a folder is run.
"""

import json
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.models.embeddings import PatchEmbed
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BatchFeature,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, cached_file

from latent_egc.models.feature_maps import block_map, named_blocks
from latent_egc.models.heads import EnergyOutput
from latent_egc.models.noise_schedule import add_noise
from latent_egc.models.transformer import EGCTransformer
from latent_egc.models.unet import EGCUNet
from latent_egc.models.weights import align_weights, check_loaded
from latent_egc.pipelines.code_files import code_file
from latent_egc.pipelines.images import preprocess_images
from latent_egc.pipelines.latents import latent_channels, latent_moments, scale_latents
from latent_egc.pipelines.named_autoencoder import named_autoencoder

CODE_FILE = "image_classification.py"
AUTO_MAP = {
    "AutoConfig": "image_classification.EGCConfig",
    "AutoModel": "image_classification.EGCModel",
    "AutoModelForImageClassification": "image_classification.EGCForImageClassification",
    "AutoImageProcessor": "image_classification.EGCImageProcessor",
}
LINEAR_FILE = "linear.safetensors"  # of a folder with component folders, its linear head's weights
COMPONENT_WEIGHTS = "diffusion_pytorch_model.safetensors"
DECODER_PARTS = ("decoder", "post_quant_conv")
# What says where on the Hub, and how, files are found.
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


class EGCConfig(PretrainedConfig):
    """What an energy network is as an image classifier.

    Args:
        energy_model: the energy network's configuration, as diffusers saves it.
        vae: likewise the autoencoder's; None in pixel space.
        classifier: "energy" reads the energy network's own logits at clean latents and timestep 0; "linear" is a linear
            layer on the pooled features below.
        block: whose features are read, see `models/feature_maps.py`; None: the last one's.
        timestep: to which the latents are noised for it, in [0, T).
        pooling: p, its map is averaged to p x p.
        noise_seed: of the one draw of noise, the same for every image.
        weights_in_components: whether the folder's weights are those in its component folders, not model.safetensors.
        autoencoder: Hub id or folder of the autoencoder's weights, where the component folders have none.
        **options: transformers' own, such as `id2label`.
    """

    model_type = "egc"
    keys_to_ignore_at_inference = ["energy"]  # a Trainer's predictions are the logits

    def __init__(
        self,
        energy_model: Mapping[str, Any] | None = None,
        vae: Mapping[str, Any] | None = None,
        classifier: str = "energy",
        block: str | None = None,
        timestep: int = 0,
        pooling: int = 1,
        noise_seed: int = 0,
        weights_in_components: bool = False,
        autoencoder: str | None = None,
        **options: Any,
    ) -> None:
        self.energy_model, self.vae = dict(energy_model or {}), None if vae is None else dict(vae)
        self.classifier, self.block, self.timestep, self.pooling = classifier, block, timestep, pooling
        self.noise_seed, self.weights_in_components = noise_seed, weights_in_components
        self.autoencoder = autoencoder
        options.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**options)

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """See `PretrainedConfig.save_pretrained`; saving a model calls it. Adds this file."""
        super().save_pretrained(save_directory, **options)
        (Path(save_directory) / CODE_FILE).write_text(code_file(__name__))


class EGCImageProcessor(BaseImageProcessor):
    """Images of any size to pixel values, exactly as `EGCPipeline.classify` prepares them.

    Args:
        image_size: height and width of the network's images, in pixels.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.image_size = image_size

    def preprocess(self, images: PipelineImageInput, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """See `preprocess_images`: `images` as there, `pixel_values` (N, 3, image_size, image_size) in [-1, 1].

        Raises ValueError as there, and on options, of which there are none.
        """
        if options:
            raise ValueError(f"EGCImageProcessor takes images and return_tensors, got {', '.join(options)}")
        return BatchFeature({"pixel_values": preprocess_images(images, self.image_size)}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What is saved, without the class: config.json names it, and by a name that stands here transformers would
        look for a video processor too, and ask whether it may run its code.
        """
        return {k: v for k, v in super().to_dict().items() if k not in ("image_processor_type", "auto_map")}


@dataclass
class EGCClassifierOutput(ModelOutput):
    """What the classifier says of N images.

    Args:
        loss: the mean cross-entropy, where labels were given.
        logits: (N, K).
        energy: (N,) of the latents that were read, low = likely: clean ones at timestep 0, as `classify`, or for a
            linear head noised ones at its timestep.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    energy: torch.Tensor | None = None


class EGCPreTrainedModel(PreTrainedModel):
    """The energy network and the autoencoder's encoder, which is frozen, and how their weights are found.

    Raises ValueError for a configuration that does not fit them, by name.
    """

    config_class = EGCConfig
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = ["^linear[.]"]  # features of a classifier

    def __init__(self, config: EGCConfig) -> None:
        super().__init__(config)
        self.config.weights_in_components, self.config.autoencoder = False, None  # in memory, and saved as one file
        networks = {"EGCUNet": EGCUNet, "EGCTransformer": EGCTransformer}
        self.energy_model = networks[config.energy_model["_class_name"]].from_config(config.energy_model)
        self.vae = None
        if config.vae is not None:
            self.vae = getattr(diffusers, config.vae["_class_name"]).from_config(config.vae)
            for part in DECODER_PARTS:
                if hasattr(self.vae, part):
                    setattr(self.vae, part, nn.Identity())
            self.vae.eval().requires_grad_(False)
        # Skip connections join layers that are far apart: a network stays whole on one device.
        self._no_split_modules = [type(network).__name__ for network in self.children()]
        blocks = named_blocks(self.energy_model)
        self.block = [*blocks][-1] if config.block is None else config.block
        if self.block not in blocks:
            raise ValueError(f"block must be one of {', '.join(blocks)}, got {config.block!r}")
        num_timesteps = self.energy_model.config.num_train_timesteps
        if not 0 <= config.timestep < num_timesteps:
            raise ValueError(f"timestep must be in [0, {num_timesteps}), got {config.timestep}")
        if config.pooling < 1:
            raise ValueError(f"pooling must be at least 1, got {config.pooling}")

    @property
    def feature_width(self) -> int:
        """D p^2 of the pooled features."""
        network = self.energy_model.config
        with torch.device("meta"):
            twin = type(self.energy_model).from_config(network)
            latents = torch.empty(1, network.in_channels, network.sample_size, network.sample_size)
        with torch.no_grad():
            features, _ = block_map(twin, self.block, latents, torch.zeros(1, dtype=torch.long, device="meta"))
        return features.shape[1] * self._pooled_size(features) ** 2

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1] to scaled latents (N, C, h, w), by the posterior mean. Differentiable."""
        if self.vae is None:
            return pixel_values
        mean = latent_moments(self.vae, pixel_values)[:, : latent_channels(self.vae)]
        return scale_latents(self.vae, mean)

    def features(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, EnergyOutput]:
        """The block's map (N, D, h', w') of noised latents, its pooled features (N, D p^2), and the pass's energy.

        Where the map is smaller than p x p it is as it is. Source: Mukhopadhyay et al., arXiv 2307.08702.
        """
        timestep = torch.tensor([self.config.timestep])
        levels = [level.to(latents.device) for level in self.energy_model.noise_levels(timestep)]
        generator = torch.Generator().manual_seed(self.config.noise_seed)
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents)
        noisy_latents = add_noise(latents, noise.expand_as(latents), levels)
        features, output = block_map(self.energy_model, self.block, noisy_latents, self.config.timestep)
        pooled = F.adaptive_avg_pool2d(features, self._pooled_size(features)).flatten(1)
        return features, pooled, output

    def _pooled_size(self, features: torch.Tensor) -> int:
        return min(self.config.pooling, features.shape[-1])

    def _init_weights(self, module: nn.Module) -> None:
        """What no file holds: positions, which follow from the configuration, and a new linear head. The networks have
        initialised themselves.
        """
        if isinstance(module, PatchEmbed):
            size, patch_size = self.energy_model.config.sample_size, self.energy_model.config.patch_size
            fresh = PatchEmbed(size, size, patch_size, 1, self.energy_model.config.width)
            module.pos_embed.copy_(fresh.pos_embed)
        elif module is getattr(self, "linear", None):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *arguments: Any,
        config: EGCConfig | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """See `PreTrainedModel.from_pretrained`. Reads an exported folder's component folders, or a saved model.

        Raises:
            ValueError: naming the tensors that are missing, unexpected, NaN or infinite, or a named autoencoder that
                cannot be loaded. A linear head may be missing, and is then a new one.
        """
        source: str | os.PathLike | None = pretrained_model_name_or_path
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        if not isinstance(config, PretrainedConfig):
            config = EGCConfig.from_pretrained(config or source, subfolder=options.get("subfolder", ""), **hub)
            own = [name for name in options if name in config.to_dict() and name not in ("dtype", "torch_dtype")]
            config.update({name: options.pop(name) for name in own})
        if config.weights_in_components:
            options["state_dict"] = cls._read_components(source, config, options.pop("subfolder", ""), hub)
            source = None
        model, report = super().from_pretrained(source, *arguments, config=config, output_loading_info=True, **options)
        missing = [name for name in report["missing_keys"] if not name.startswith("linear.")]
        check_loaded(model, dict(report, missing_keys=missing, mismatched_keys=[]))  # transformers looks at shapes
        if model.vae is not None:
            model.vae.requires_grad_(False)  # loading makes parameters of its own
        align_weights(model)
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model, report) if output_loading_info else model

    @classmethod
    def _read_components(
        cls, source: str | os.PathLike, config: EGCConfig, subfolder: str, hub: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The weights that lie in the component folders, or where an autoencoder is named, by their names here."""
        files = {"energy_model": (posixpath.join(subfolder, "energy_model"), COMPONENT_WEIGHTS)}
        if config.vae is not None and config.autoencoder is None:
            files["vae"] = (posixpath.join(subfolder, "vae"), COMPONENT_WEIGHTS)
        if config.classifier == "linear":
            files["linear"] = (subfolder, LINEAR_FILE)
        found = {}
        for part, (folder, file) in files.items():
            weights = _read_weights(source, file, folder, hub, may_be_missing=part == "linear")
            found |= {f"{part}.{name}": tensor for name, tensor in weights.items()}
        if config.autoencoder is not None:
            hub = {name: value for name, value in hub.items() if name != "revision"}  # that is of another repository
            weights = named_autoencoder(config.autoencoder, **hub).state_dict()
            found |= {f"vae.{name}": tensor for name, tensor in weights.items() if _is_read(name)}
        return found


class EGCModel(EGCPreTrainedModel):
    """Features of the energy network, at the configuration's block, timestep and pooling."""

    def __init__(self, config: EGCConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, **options: Any
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """pixel_values (N, 3, H, W) in [-1, 1] -> the block's map (N, D, h, w), its pooled features (N, D p^2)."""
        features, pooled, _ = self.features(self.encode(pixel_values))
        output = BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)
        return output.to_tuple() if return_dict is False else output


class EGCForImageClassification(EGCPreTrainedModel):
    """The energy network as an image classifier, by its own logits or by a linear layer on its features.

    Raises ValueError, by name, where the energy network's own classes are not those of the configuration.
    """

    def __init__(self, config: EGCConfig) -> None:
        super().__init__(config)
        if config.classifier == "linear":
            self.linear = nn.Linear(self.feature_width, config.num_labels)
        elif config.classifier != "energy":
            raise ValueError(f"classifier must be 'energy' or 'linear', got {config.classifier!r}")
        elif config.num_labels != self.energy_model.config.num_classes:
            raise ValueError(
                f"the energy network has {self.energy_model.config.num_classes or 'no'} classes, got num_labels="
                f"{config.num_labels}; classifier='linear' puts a new linear head for other classes on its features"
            )
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> EGCClassifierOutput | tuple[torch.Tensor, ...]:
        """Class logits, the energy, and a loss where there are labels.

        Args:
            pixel_values: (N, 3, H, W) in [-1, 1].
            labels: (N,) int64 in [0, K).
            return_dict: False returns a tuple.

        Returns:
            `EGCClassifierOutput`.
        """
        latents = self.encode(pixel_values)
        if self.config.classifier == "energy":
            output = self.energy_model(latents, 0)
            logits = output.logits
        else:
            _, pooled, output = self.features(latents)
            logits = self.linear(pooled)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        found = EGCClassifierOutput(loss=loss, logits=logits, energy=output.energy)
        return found.to_tuple() if return_dict is False else found


def _read_weights(
    source: str | os.PathLike, file: str, subfolder: str, hub: Mapping[str, Any], may_be_missing: bool
) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors, or those of the shards that its index names, without a decoder's; {} where the file
    is missing and may be.
    """

    def find(name: str, required: bool = True) -> str | None:
        return cached_file(source, name, subfolder=subfolder, _raise_exceptions_for_missing_entries=required, **hub)

    paths = [find(file, required=False)]
    if paths == [None]:
        index = find(f"{file}.index.json", required=not may_be_missing)
        shards = [] if index is None else set(json.loads(Path(index).read_text())["weight_map"].values())
        paths = [find(shard) for shard in sorted(shards)]
    tensors = {}
    for path in paths:
        with safe_open(path, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if _is_read(name)}  # noqa: SIM118
    return tensors


def _is_read(name: str) -> bool:
    """Whether a tensor of this name is one of a component without its decoder."""
    return name.split(".")[0] not in DECODER_PARTS


# Releases of transformers before 5 make no pipeline of a folder's code without it.
AutoImageProcessor.register(EGCConfig, slow_image_processor_class=EGCImageProcessor, exist_ok=True)
if __name__.split(".")[0] == "latent_egc":
    AutoConfig.register(EGCConfig.model_type, EGCConfig)
    AutoModel.register(EGCConfig, EGCModel)
    AutoModelForImageClassification.register(EGCConfig, EGCForImageClassification)
