"""Attention that can be differentiated twice, or that is fused: by what the caller asks for.

Training an energy differentiates twice, and fused kernels have no second derivative; sampling and classification
differentiate at most once, and want the fused kernels. The choice is an argument, so that it is still there when a
forward pass is recomputed, and nothing process-wide changes.
"""

import torch
import torch.nn.functional as F
from torch import nn


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, twice_differentiable: bool
) -> torch.Tensor:
    """Scaled dot-product attention, softmax(query key^T / sqrt(d)) value.

    Args:
        query: (N, heads, T, d).
        key, value: (N, heads, S, d).
        twice_differentiable: True runs matrix products and a softmax, each with derivatives of every order; False runs
            torch's fused kernel, which has only the first.

    Returns:
        (N, heads, T, d).
    """
    if not twice_differentiable:
        return F.scaled_dot_product_attention(query, key, value)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (N, heads, T, S)
    return scores.softmax(dim=-1).to(value.dtype) @ value


class MultiHeadAttention(nn.Module):
    """Multi-head attention of tokens to a context; without a context, to themselves.

    Args:
        width: channels of the tokens, in and out.
        num_heads: heads; must divide `width`.
        context_width: channels of the context's tokens; None: `width`.
    """

    def __init__(self, width: int, num_heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        context_width = width if context_width is None else context_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(
        self, tokens: torch.Tensor, context: torch.Tensor | None = None, *, twice_differentiable: bool
    ) -> torch.Tensor:
        """tokens (N, T, width), context (N, S, context_width) or None -> (N, T, width)."""
        context = tokens if context is None else context
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T or S, d)
            for projected in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        attended = attention(query, key, value, twice_differentiable=twice_differentiable)
        return self.to_out(attended.transpose(1, 2).flatten(2))
