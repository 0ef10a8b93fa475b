"""EGCUNet: a diffusion U-Net whose output is read as an energy.

The layout is the latent-diffusion U-Net's, which the published EGC uses: ResNet blocks that see the timestep, a spatial
transformer behind each of them at the attended levels and in the middle, and, for a model with a class embedding, one
class token that the transformers attend to. ResNet blocks, resampling and feed-forward layers are diffusers'.
"""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin  # noqa: F401  (diffusers' remote loading looks for this name)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from .attention import MultiHeadAttention
from .energy import EnergyModel
from .numerics import without_autocast


class SpatialTransformer(nn.Module):
    """One transformer block over a map's positions: self-attention, attention to the class token, feed-forward.

    Args:
        channels: of the map, in and out.
        width: inside the block; divisible by `num_heads`, independent of `channels`.
        num_heads: attention heads.
        context_width: channels of the class token; None: no attention to one.
        norm_num_groups: of the group norm at the entry.
    """

    def __init__(
        self, channels: int, width: int, num_heads: int, context_width: int | None, norm_num_groups: int
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, width, kernel_size=1)
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = MultiHeadAttention(width, num_heads)
        if context_width is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = MultiHeadAttention(width, num_heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, activation_fn="geglu")
        self.proj_out = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, hidden: torch.Tensor, class_token: torch.Tensor | None) -> torch.Tensor:
        """hidden (N, channels, h, w), class_token (N, 1, context_width) or None -> (N, channels, h, w)."""
        projected = self.proj_in(self.norm(hidden))  # (N, width, h, w)
        tokens = projected.flatten(2).transpose(1, 2)  # (N, h*w, width)
        tokens = tokens + self.attn1(self.norm1(tokens))
        if class_token is not None:
            tokens = tokens + self.attn2(self.norm2(tokens), class_token)
        tokens = tokens + self.ff(self.norm3(tokens))
        return hidden + self.proj_out(tokens.transpose(1, 2).unflatten(2, hidden.shape[-2:]))  # (N, channels, h, w)


class UNetBlock(nn.Module):
    """A ResNet block and, at an attended level, a spatial transformer."""

    def __init__(self, resnet: ResnetBlock2D, attention: SpatialTransformer | None) -> None:
        super().__init__()
        self.resnet = resnet
        self.attention = attention

    def forward(
        self, hidden: torch.Tensor, time_embedding: torch.Tensor, class_token: torch.Tensor | None
    ) -> torch.Tensor:
        """hidden (N, D_in, h, w), time_embedding (N, D_time) -> (N, D_out, h, w)."""
        hidden = self.resnet(hidden, time_embedding)  # (N, D_out, h, w)
        return hidden if self.attention is None else self.attention(hidden, class_token)


class EGCUNet(EnergyModel):
    """A U-Net energy network over latents (or pixels): energy, class logits and, by its input gradient, noise.

    Args:
        sample_size: height and width of the latents it is made for; others work where `size_divisor` divides them.
        in_channels: C, channels of the latents.
        num_classes: K; None for unlabelled data.
        head: "map" (energy is minus the sum over positions of the logsumexp over an output map's channels, logits are
            the map's attention pool) or "inner" (energy is <z, h(z)> / 2 - sigma_t logsumexp(logits)).
        energy_channels: E, channels of the map head's output; None: `num_classes`. Must be set without classes.
        energy_pooling: "logsumexp" over the map's channels, or inner's logits; or "logmeanexp", less the logarithm of
            their number, with which a fresh network's energies of all noise levels are one density's.
        gaussian_part: adds sigma_t |z|^2 / 2 and weighs the network's share by alpha_t, so that the network's gradient
            learns v (eps = sigma_t z + alpha_t v).
        class_embedding: whether the energy can see a label, as a class token that the transformers attend to.
        num_train_timesteps, beta_start, beta_end, beta_schedule: the noise schedule, in diffusers' terms.
        block_out_channels: width of each level, finest first.
        layers_per_block: ResNet blocks a level on the way down (one more on the way up).
        attention_levels: levels with spatial transformers, 0 is the finest; the middle always has one. None: the two
            deepest, but not the finest, whose many positions cost more time and memory than all other levels.
        num_attention_heads: heads of every transformer.
        attention_head_dim: width of a head, the same at every level; None: the level's width / num_attention_heads.
        class_embedding_dim: width of the class token; None: the timestep embedding's, 4 * block_out_channels[0].
        norm_num_groups: groups of the group norms; must divide every width.

    Raises:
        ValueError: fields that contradict each other, by name.

    Source: EGC (ICCV 2023); latent-diffusion U-Net of Rombach et al. (CVPR 2022, arXiv 2112.10752).
    """

    _no_split_modules = ["UNetBlock"]
    _repeated_blocks = ["UNetBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        num_classes: int | None = 1000,
        head: str = "map",
        energy_channels: int | None = None,
        energy_pooling: str = "logsumexp",
        gaussian_part: bool = True,
        class_embedding: bool = False,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        block_out_channels: tuple[int, ...] = (128, 256, 512),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] | None = None,
        num_attention_heads: int = 4,
        attention_head_dim: int | None = None,
        class_embedding_dim: int | None = None,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        energy_channels = self.check_energy_config()
        attention_levels = self._check_unet_config()
        time_width = 4 * block_out_channels[0]
        context_width = (class_embedding_dim or time_width) if class_embedding else None

        def make_block(channels_in: int, channels_out: int, attended: bool) -> UNetBlock:
            resnet = ResnetBlock2D(
                in_channels=channels_in,
                out_channels=channels_out,
                temb_channels=time_width,
                groups=norm_num_groups,
                eps=1e-5,
            )
            if not attended:
                return UNetBlock(resnet, None)
            head_width = attention_head_dim or channels_out // num_attention_heads
            width = head_width * num_attention_heads
            transformer = SpatialTransformer(channels_out, width, num_attention_heads, context_width, norm_num_groups)
            return UNetBlock(resnet, transformer)

        self.time_frequencies = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], time_width)
        if class_embedding:
            self.class_tokens = nn.Embedding(num_classes + 1, context_width)  # the last row is the null label

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        channels, skip_channels = block_out_channels[0], [block_out_channels[0]]
        for level, width in enumerate(block_out_channels):
            blocks = nn.ModuleList()
            for _ in range(layers_per_block):
                blocks.append(make_block(channels, width, level in attention_levels))
                channels = width
                skip_channels.append(channels)
            self.down_blocks.append(blocks)
            if level < len(block_out_channels) - 1:
                # The name leaves diffusers' historical alias Conv2d_0 out of the checkpoint.
                self.downsamplers.append(Downsample2D(channels, use_conv=True, name="op"))
                skip_channels.append(channels)

        self.mid_blocks = nn.ModuleList([make_block(channels, channels, True), make_block(channels, channels, False)])

        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(block_out_channels))):
            blocks = nn.ModuleList()
            for _ in range(layers_per_block + 1):
                blocks.append(make_block(channels + skip_channels.pop(), width, level in attention_levels))
                channels = width
            self.up_blocks.append(blocks)
            if level > 0:
                self.upsamplers.append(Upsample2D(channels, use_conv=True))

        self.norm_out = nn.GroupNorm(norm_num_groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, energy_channels or in_channels, kernel_size=3, padding=1)
        if head == "inner" and num_classes is not None:
            self.class_out = nn.Linear(channels, num_classes)
        self._init_weights()

    def _check_unet_config(self) -> Sequence[int]:
        """Raises ValueError as the constructor; returns the attended levels."""
        c = self.config
        num_levels = len(c.block_out_channels)
        counts = ("sample_size", "in_channels", "layers_per_block", "num_attention_heads", "norm_num_groups")
        for name in counts:
            if c[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {c[name]}")
        if num_levels < 1 or min(c.block_out_channels) < 1:
            raise ValueError(f"block_out_channels must hold positive widths, got {c.block_out_channels}")
        for width in c.block_out_channels:
            if width % c.norm_num_groups:
                raise ValueError(f"norm_num_groups={c.norm_num_groups} must divide every width, got {width}")
            if c.attention_head_dim is None and width % c.num_attention_heads:
                raise ValueError(f"num_attention_heads={c.num_attention_heads} must divide every width, got {width}")
        attended = range(max(1, num_levels - 2), num_levels) if c.attention_levels is None else c.attention_levels
        for level in attended:
            if not 0 <= level < num_levels:
                raise ValueError(f"attention_levels must be in [0, {num_levels}), got {level}")
        if c.sample_size % self.size_divisor:
            raise ValueError(f"sample_size must be divisible by {self.size_divisor}, got {c.sample_size}")
        return attended

    @property
    def size_divisor(self) -> int:
        """What the height and width of the latents must be divisible by."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def _init_weights(self) -> None:
        for module in self.modules():
            # Every residual branch starts at zero, so that the network starts as its skip connections.
            if isinstance(module, ResnetBlock2D):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
            elif isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        # A flat energy at the start: epsilon is then 0, or the Gaussian part's sigma_t z. Without classes nothing but
        # the initial values could tell the map's channels apart (a logsumexp treats them alike), so these are tiny.
        if self.config.num_classes is None and self.config.head == "map":
            nn.init.normal_(self.conv_out.weight, std=1e-3)
        else:
            nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        if hasattr(self, "class_out"):
            nn.init.zeros_(self.class_out.weight)
            nn.init.zeros_(self.class_out.bias)

    def network(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `EnergyModel.network`."""
        hidden = self._trunk(noisy_latents, timesteps, embedded_labels)  # (N, D_0, h, w)
        # The output layers run in the weights' precision also under autocast: energies are sums over all positions.
        with without_autocast(hidden):
            hidden = nn.functional.silu(self.norm_out(hidden.to(self.norm_out.weight.dtype)))
            output = self.conv_out(hidden)  # (N, E or C, h, w)
            logits = self.class_out(hidden.mean(dim=(2, 3))) if hasattr(self, "class_out") else None  # (N, K)
        return output, logits

    def _trunk(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The network up to its output layers; D_l is the width of level l, of size h / 2^l."""
        time_embedding = self.time_embedding(self.time_frequencies(timesteps).to(self.dtype))  # (N, 4 D_0)
        class_token = None
        if embedded_labels is not None:
            rows = torch.where(embedded_labels < 0, self.config.num_classes, embedded_labels)  # the last row is null
            class_token = self.class_tokens(rows)[:, None]  # (N, 1, D_class)

        hidden = self.conv_in(noisy_latents.to(self.dtype))  # (N, D_0, h, w)
        skips = [hidden]
        for level, blocks in enumerate(self.down_blocks):
            for block in blocks:
                hidden = self.run_block(block, hidden, time_embedding, class_token)  # (N, D_l, h_l, w_l)
                skips.append(hidden)
            if level < len(self.downsamplers):
                hidden = self.downsamplers[level](hidden)  # (N, D_l, h_l / 2, w_l / 2)
                skips.append(hidden)
        for block in self.mid_blocks:
            hidden = self.run_block(block, hidden, time_embedding, class_token)  # (N, D_L, h_L, w_L)
        for step, blocks in enumerate(self.up_blocks):
            for block in blocks:
                hidden = torch.cat([hidden, skips.pop()], dim=1)  # (N, D_(l+1) or D_l, and the skip's, h_l, w_l)
                hidden = self.run_block(block, hidden, time_embedding, class_token)  # (N, D_l, h_l, w_l)
            if step < len(self.upsamplers):
                hidden = self.upsamplers[step](hidden)  # (N, D_l, 2 h_l, 2 w_l)
        return hidden  # (N, D_0, h, w)
