"""A frozen denoiser to take features from: an energy network, or a U-Net or transformer of diffusers.

Features are read by forward hooks on the network's blocks, one mechanism for all of them, and the only one by which
DifFeed can add to a block's output. Blocks are called as in `models/feature_maps.py`.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import AutoModel, DDPMScheduler, DiffusionPipeline, DiTTransformer2DModel, ModelMixin, UNet2DModel
from torch import nn

from latent_egc.config import ConfigError
from latent_egc.data.autoencoders import encode_moments, fingerprint, latents_from_moments
from latent_egc.models import EnergyModel
from latent_egc.models.feature_maps import as_map, levelled_blocks, named_blocks, numbered_blocks
from latent_egc.models.noise_schedule import add_noise
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.latents import latent_channels, vae_scale_factor
from latent_egc.training.checkpoints import resolve_pipeline

# A block's feature map (N, D, h, w) -> what takes its place.
Edit = Callable[[torch.Tensor], torch.Tensor]


class Denoiser:
    """A frozen network that sees noisy latents (or pixels) and a timestep, and the way from images to latents.

    Args:
        network: an `EnergyModel`, a `UNet2DModel` or a `DiTTransformer2DModel`.
        vae: the autoencoder whose latents it was trained on; None: pixels in [-1, 1].
        alphas_cumprod: (T,) abar_t of its noise schedule.
        class_names: of the energy network's classifier; empty for others.
        source: where it came from, for messages.

    Raises:
        ConfigError: another kind of network, or one that cannot be used without labels.
    """

    def __init__(
        self,
        network: ModelMixin,
        vae: ModelMixin | None,
        alphas_cumprod: torch.Tensor,
        class_names: list[str] | None = None,
        source: str = "",
    ) -> None:
        self.network, self.vae = network.eval().requires_grad_(False), vae
        self.class_names, self.source = class_names or [], source
        self.blocks = _blocks(network)
        self.alphas_cumprod = alphas_cumprod.float().to(network.device)
        size, self.channels = network.config.sample_size, network.config.in_channels
        if not isinstance(size, int):
            raise ConfigError(f"{source}: {type(network).__name__} needs a square sample_size, got {size!r}")
        expected = latent_channels(vae)
        if self.channels != expected:
            what = "pixels, as there is no autoencoder," if vae is None else f"latents of {type(vae).__name__}"
            raise ConfigError(f"{source}: the network takes {self.channels} channels, {what} have {expected}")
        if vae is not None:
            vae.eval().requires_grad_(False)
        self.sample_size = size
        self.image_size = size * vae_scale_factor(vae)

    @property
    def fingerprint(self) -> str:
        """Another value means other weights, another autoencoder or another noise schedule."""
        schedule = f"T={len(self.alphas_cumprod)}, abar_T={self.alphas_cumprod[-1].item():.4g}"
        return f"{fingerprint(self.network)} with {fingerprint(self.vae)}, {schedule}"

    @property
    def feedback_pairs(self) -> list[tuple[str, str]]:
        """(later, earlier) blocks that DifFeed joins: each level's last on the way up and last on the way down.

        A transformer, which has no levels, joins its second half's blocks to the first half's, mirrored.
        """
        if layers := [name for name in self.blocks if name.startswith("block.")]:
            return [(layers[-1 - i], layers[i]) for i in range(len(layers) // 2)]
        last: dict[str, dict[str, str]] = {"up": {}, "down": {}}
        for name in self.blocks:
            side, *place = name.split(".")
            if side in last:
                last[side][place[0]] = name
        return [(last["up"][level], last["down"][level]) for level in last["up"]]

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w) by the posterior's mean."""
        return latents_from_moments(self.vae, encode_moments(self.vae, pixel_values))

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Latents (N, C, h, w) brought to a timestep's noise level."""
        abar = self.alphas_cumprod[timestep]
        return add_noise(latents, noise, (abar.sqrt(), (1 - abar).sqrt()))

    def features(
        self, noisy_latents: torch.Tensor, timestep: int, edits: Mapping[str, Edit] | None = None
    ) -> dict[str, torch.Tensor]:
        """Every block's output map, without a label (the null one, where the network was trained with one).

        Args:
            noisy_latents: (N, C, h, w) at `timestep`.
            timestep: in [0, T).
            edits: block -> what to do with its map before the network goes on; the features are the edited ones.

        Returns:
            Block -> (N, D, h', w'), in the order of the forward pass.
        """
        maps: dict[str, torch.Tensor] = {}

        def hook(name: str) -> Callable:
            def read(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
                is_tokens = output.ndim == 3
                output = as_map(output)
                if edits is None or name not in edits:
                    maps[name] = output
                    return None
                maps[name] = output = edits[name](output)
                return output.flatten(2).transpose(1, 2) if is_tokens else output

            return read

        handles = [module.register_forward_hook(hook(name)) for name, module in self.blocks.items()]
        try:
            self._run(noisy_latents.to(self.network.dtype), timestep)
        finally:
            for handle in handles:
                handle.remove()
        return maps

    def _run(self, noisy_latents: torch.Tensor, timestep: int) -> None:
        network = self.network
        if isinstance(network, EnergyModel):
            network(noisy_latents, timestep)
            return
        timesteps = torch.full((len(noisy_latents),), timestep, device=noisy_latents.device)
        labels = None
        if isinstance(network, DiTTransformer2DModel):  # the null label is the row behind the classes'
            labels = torch.full_like(timesteps, network.config.num_embeds_ada_norm)
        network(noisy_latents, timesteps, class_labels=labels)


def _blocks(network: ModelMixin) -> dict[str, nn.Module]:
    """Name -> the module whose output is the block's. Raises ConfigError for a network that is not supported."""
    if isinstance(network, EnergyModel):
        return named_blocks(network)
    if isinstance(network, DiTTransformer2DModel):
        return numbered_blocks(network.pos_embed, network.transformer_blocks)
    if not isinstance(network, UNet2DModel):
        raise ConfigError(
            f"a {type(network).__name__} cannot be probed; the denoiser must be an EGCUNet, an EGCTransformer, a "
            "UNet2DModel or a DiTTransformer2DModel"
        )
    if network.class_embedding is not None:
        raise ConfigError("a UNet2DModel with class embedding has no null label; it cannot be probed without labels")
    # Of a level's layers an attention's output, where one follows the ResNet block.
    down, up = (
        [list(getattr(level, "attentions", None) or level.resnets) for level in levels]
        for levels in (network.down_blocks, network.up_blocks)
    )
    mid = [] if network.mid_block is None else [network.mid_block]
    return levelled_blocks(network.conv_in, down, mid, up)


def load_denoiser(source: str, device: str | torch.device = "cpu") -> Denoiser:
    """A denoiser by what holds it.

    Args:
        source: a run's folder, a folder or Hub id of a pipeline (`EGCPipeline`, or one of diffusers with a `unet` or
            `transformer`), or of a bare `UNet2DModel` or `DiTTransformer2DModel`, whose noise schedule is then taken to
            be DDPM's (`DDPMScheduler()`).
        device: where it shall run.

    Raises:
        ConfigError: nothing there that can be loaded, or no denoiser that can be probed.
    """
    folder, components = Path(source).expanduser(), None
    # A pipeline's folder may have a config.json too, transformers'.
    is_network = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    try:
        place = str(folder if is_network else resolve_pipeline(source))
        if not is_network:
            with suppress(OSError):  # else it is a Hub repository of one network
                components = DiffusionPipeline.load_config(place)
        if components is None:
            network = AutoModel.from_pretrained(place).to(device)
            return Denoiser(network, None, DDPMScheduler().alphas_cumprod, source=source)
        if "energy_model" in components:
            pipeline = EGCPipeline.from_pretrained(place).to(device)
            network, names = pipeline.energy_model, [name for _, name in sorted(pipeline.id2label.items())]
            return Denoiser(network, pipeline.vae, network.alphas_cumprod, names, place)
        pipeline = DiffusionPipeline.from_pretrained(place).to(device)
    except Exception as error:  # diffusers has no common error for a folder with a damaged file
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source} cannot be loaded: {error}") from error
    parts = pipeline.components
    network = parts.get("unet") or parts.get("transformer")
    if network is None:
        raise ConfigError(f"{source}: {type(pipeline).__name__} has neither a unet nor a transformer")
    schedule = getattr(pipeline.scheduler, "alphas_cumprod", None)
    if schedule is None:
        raise ConfigError(f"{source}: {type(pipeline.scheduler).__name__} has no alphas_cumprod, the noise is unknown")
    return Denoiser(network, parts.get("vae") or parts.get("vqvae"), schedule, source=source)
