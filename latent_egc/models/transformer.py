"""EGCTransformer: a diffusion transformer whose output is read as an energy.

Patches of the latents are tokens; every block sees the timestep (and the label, for a model with a class embedding)
through adaptive layer norms that start as the identity, as in DiT (Peebles and Xie, ICCV 2023, arXiv 2212.09748).
Optional are QK-norm (Dehghani et al., ICML 2023, arXiv 2302.05442) and long skips from the first half of the blocks to
the second (U-ViT, Bao et al., CVPR 2023, arXiv 2209.12152). Embeddings and feed-forward layers are diffusers'.
"""

import torch
from diffusers import ModelMixin  # noqa: F401  (diffusers' remote loading looks for this name)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from torch import nn

from .attention import MultiHeadAttention
from .energy import EnergyModel
from .numerics import without_autocast

TIME_FREQUENCIES = 256  # channels of the sinusoidal timestep embedding, DiT's number


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, each shifted, scaled and gated by the conditioning.

    Args:
        width: channels of the tokens.
        num_heads: attention heads; must divide `width`.
        qk_norm: see `MultiHeadAttention`.
        skip: whether an earlier block's output is joined in at the entry.
    """

    def __init__(self, width: int, num_heads: int, qk_norm: bool, skip: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if skip else None
        # The two eps are those of diffusers' DiT, whose weights can be loaded here.
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = MultiHeadAttention(width, num_heads, bias=True, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)
        self.ff = FeedForward(width, activation_fn="gelu-approximate")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, hidden: torch.Tensor, conditioning: torch.Tensor, skipped: torch.Tensor | None) -> torch.Tensor:
        """hidden (N, T, D), conditioning (N, D), skipped (N, T, D) or None -> (N, T, D)."""
        if self.skip is not None:
            hidden = self.skip(torch.cat([hidden, skipped], dim=-1))  # (N, T, D)
        modulation = self.modulation(conditioning)[:, None]  # (N, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (N, 1, D) each
        hidden = hidden + gate1 * self.attn(self.norm1(hidden) * (1 + scale1) + shift1)  # (N, T, D)
        return hidden + gate2 * self.ff(self.norm2(hidden) * (1 + scale2) + shift2)  # (N, T, D)


class EGCTransformer(EnergyModel):
    """A transformer energy network over latents (or pixels): energy, class logits and, by its input gradient, noise.

    Args:
        sample_size: height and width of the latents it is made for; others work where `patch_size` divides them (the
            positions are then interpolated).
        in_channels: C, channels of the latents.
        num_classes: K; None for unlabelled data.
        head, energy_channels, energy_pooling, gaussian_part: as in `EGCUNet`.
        class_embedding: whether the energy can see a label, added to the timestep's embedding.
        num_train_timesteps, beta_start, beta_end, beta_schedule: the noise schedule, in diffusers' terms.
        patch_size: height and width of a token's patch.
        width: D, channels of the tokens.
        num_layers: blocks.
        num_attention_heads: heads of every block.
        qk_norm: RMS norm of queries and keys, for stability.
        long_skips: joins the output of each block of the first half into its counterpart of the second.

    Raises:
        ValueError: fields that contradict each other, by name.

    Source: EGC (ICCV 2023); DiT (ICCV 2023, arXiv 2212.09748).
    """

    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]

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
        patch_size: int = 2,
        width: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        qk_norm: bool = True,
        long_skips: bool = False,
    ) -> None:
        super().__init__()
        energy_channels = self.check_energy_config()
        self._check_transformer_config()

        self.patch_embedding = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width)
        self.time_frequencies = Timesteps(TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(TIME_FREQUENCIES, width)
        if class_embedding:
            self.label_embedding = nn.Embedding(num_classes + 1, width)  # the last row is the null label
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_attention_heads, qk_norm, skip=long_skips and layer >= (num_layers + 1) // 2)
            for layer in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        out_channels = energy_channels if head == "map" else in_channels
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        if head == "inner" and num_classes is not None:
            self.class_out = nn.Linear(width, num_classes)
        self._init_weights()

    def _check_transformer_config(self) -> None:
        c = self.config
        for name in ("sample_size", "in_channels", "patch_size", "width", "num_layers", "num_attention_heads"):
            if c[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {c[name]}")
        if c.width % c.num_attention_heads:
            raise ValueError(f"num_attention_heads={c.num_attention_heads} must divide width, got width={c.width}")
        if c.width % 4:
            raise ValueError(f"width must be divisible by 4 (sines and cosines of two coordinates), got {c.width}")
        if c.sample_size % c.patch_size:
            raise ValueError(f"sample_size must be divisible by patch_size={c.patch_size}, got {c.sample_size}")

    @property
    def size_divisor(self) -> int:
        """What the height and width of the latents must be divisible by."""
        return self.config.patch_size

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer too, once a patch is seen as one vector.
        nn.init.xavier_uniform_(self.patch_embedding.proj.weight.view(self.config.width, -1))
        nn.init.zeros_(self.patch_embedding.proj.bias)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        if self.config.class_embedding:
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        for block in self.blocks:
            # Every gate starts at zero, so that a block starts as the identity.
            nn.init.zeros_(block.modulation.weight)
            if block.skip is not None:  # ... and a skip starts shut
                with torch.no_grad():
                    block.skip.weight.copy_(torch.eye(*block.skip.weight.shape))
        nn.init.zeros_(self.modulation_out.weight)
        # A flat energy at the start, see EGCUNet.
        if self.config.num_classes is None and self.config.head == "map":
            nn.init.normal_(self.proj_out.weight, std=1e-3)
        else:
            nn.init.zeros_(self.proj_out.weight)
        if hasattr(self, "class_out"):
            nn.init.zeros_(self.class_out.weight)

    def network(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `EnergyModel.network`."""
        hidden, conditioning = self._trunk(noisy_latents, timesteps, embedded_labels)  # (N, T, D), (N, D)
        # The output layers run in the weights' precision also under autocast: energies are sums over all positions.
        with without_autocast(hidden):
            dtype = self.proj_out.weight.dtype
            shift, scale = self.modulation_out(conditioning.to(dtype))[:, None].chunk(2, dim=-1)  # (N, 1, D) each
            hidden = self.norm_out(hidden.to(dtype)) * (1 + scale) + shift  # (N, T, D)
            output = self._unpatchify(self.proj_out(hidden), noisy_latents.shape[-2:])  # (N, E or C, h, w)
            logits = self.class_out(hidden.mean(dim=1)) if hasattr(self, "class_out") else None  # (N, K)
        return output, logits

    def _trunk(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, T, D) before the output layers, T = h w / patch_size^2, and the conditioning (N, D)."""
        conditioning = self.time_embedding(self.time_frequencies(timesteps).to(self.dtype))  # (N, D)
        if embedded_labels is not None:
            rows = torch.where(embedded_labels < 0, self.config.num_classes, embedded_labels)  # the last row is null
            conditioning = conditioning + self.label_embedding(rows)  # (N, D)
        conditioning = nn.functional.silu(conditioning)

        hidden = self.patch_embedding(noisy_latents.to(self.dtype))  # (N, T, D)
        skips: list[torch.Tensor] = []
        for layer, block in enumerate(self.blocks):
            skipped = skips.pop() if block.skip is not None else None
            hidden = self.run_block(block, hidden, conditioning, skipped)  # (N, T, D)
            if layer < len(self.blocks) // 2:
                skips.append(hidden)
        return hidden, conditioning

    def _unpatchify(self, tokens: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """(N, T, p * p * E) -> (N, E, h, w)."""
        patch_size, (height, width) = self.config.patch_size, size
        grid = tokens.unflatten(1, (height // patch_size, width // patch_size))
        grid = grid.unflatten(3, (patch_size, patch_size, -1))  # (N, h', w', p, p, E)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height, width)
