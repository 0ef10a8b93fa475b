"""Attention that can be differentiated twice, or that is fused: by what the running pass needs, see numerics.py.

Over many tokens the twice differentiable kernel works on one chunk of queries after the other and recomputes the
attention weights in every pass, so that its memory grows linearly with the number of tokens. In the formulas, for the
queries q of a chunk and all keys k and values v, with s = 1 / sqrt(d):

    P = softmax(s q k^T)          o = P v                                                                   forward
    A = do v^T,  m = rowsum(P A),  R = P (A - m)                    dq = s R k,  dk = s R^T q,  dv = P^T do     backward

and for cotangents a, b, c of dq, dk, dv (double backward), with W = s (a k^T + q b^T), n = rowsum(P W), U = P (W - n):

    X = W (A - m) - n A + do c^T,   Y = P (X - rowsum(P X))         (cotangents of P and of the scores)
    q += s (R b + Y k),   k += s (R^T a + Y^T q),   v += U^T do,   do += P c + U v
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from .numerics import at_least_float32, is_twice_differentiable, without_autocast

# From this many scores a query row on, the twice differentiable kernel is the chunked one: see `latent-egc benchmark`.
CHUNKED_FROM_TOKENS = 1024
# Queries worked on at once. The chunk's scores are the only thing in memory that is larger than the tokens themselves.
QUERIES_PER_CHUNK = 128


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention, softmax(query key^T / sqrt(d)) value.

    Within `twice_differentiable(True)` it runs a kernel with second derivatives, `chunked_attention` over many tokens
    and `math_attention` over few; elsewhere the kernel that diffusers' `attention_backend` names, by default torch's
    fused one, which has only the first.

    Args:
        query: (N, heads, T, d).
        key, value: (N, heads, S, d).

    Returns:
        (N, heads, T, d).
    """
    if not is_twice_differentiable():
        return dispatch_attention_fn(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    if min(query.shape[-2], key.shape[-2]) >= CHUNKED_FROM_TOKENS:
        return chunked_attention(query, key, value)
    return math_attention(query, key, value)


def math_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`attention` as matrix products and a softmax: derivatives of every order, memory quadratic in the tokens."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (N, heads, T, S)
    return scores.softmax(dim=-1).to(value.dtype) @ value


def chunked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`attention` whose first and second derivatives need memory linear in the tokens (a third: quadratic)."""
    return _Attention.apply(query, key, value)


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors' next queries, (N, heads, T', d) each."""
    return zip(*(tensor.split(QUERIES_PER_CHUNK, dim=-2) for tensor in tensors), strict=True)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right^T, at least float32."""
    return at_least_float32(left @ right.transpose(-2, -1))


def _weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """P of a chunk, at least float32: (N, heads, T', S)."""
    return (_product(query, key) * query.shape[-1] ** -0.5).softmax(dim=-1)


def _row_sum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.sum(dim=-1, keepdim=True)


class _Attention(torch.autograd.Function):
    """(q, k, v) -> o."""

    @staticmethod
    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with without_autocast(query):
            return torch.cat([_weights(q, key).to(value.dtype) @ value for (q,) in _chunks(query)], dim=-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _AttentionBackward.apply(*ctx.saved_tensors, grad_output)


class _AttentionBackward(torch.autograd.Function):
    """(q, k, v, do) -> (dq, dk, dv), itself differentiable."""

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, dtype = query.shape[-1] ** -0.5, query.dtype
        grad_query, grad_key, grad_value = [], 0.0, 0.0
        with without_autocast(query):
            for q, do in _chunks(query, grad_output):
                P, A = _weights(q, key), _product(do, value)
                R = (P * (A - _row_sum(P * A))).to(dtype)
                grad_query.append(scale * (R @ key))
                grad_key = grad_key + scale * at_least_float32(R.transpose(-2, -1) @ q)
                grad_value = grad_value + at_least_float32(P.to(dtype).transpose(-2, -1) @ do)
            return torch.cat(grad_query, dim=-2), grad_key.to(dtype), grad_value.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, grad_output = ctx.saved_tensors
        scale, dtype = query.shape[-1] ** -0.5, query.dtype
        grad_query, grad_key, grad_value, grad_grad_output = [], 0.0, 0.0, []
        with without_autocast(query):
            for q, do, a_chunk in _chunks(query, grad_output, a):
                P, A = _weights(q, key), _product(do, value)
                W = scale * (_product(a_chunk, key) + _product(q, b))
                centred, n = A - _row_sum(P * A), _row_sum(P * W)
                X = W * centred - n * A + _product(do, c)
                U, Y = (P * (W - n)).to(dtype), (P * (X - _row_sum(P * X))).to(dtype)
                P, R = P.to(dtype), (P * centred).to(dtype)
                grad_query.append(scale * (R @ b + Y @ key))
                from_this = scale * (R.transpose(-2, -1) @ a_chunk + Y.transpose(-2, -1) @ q)
                grad_key = grad_key + at_least_float32(from_this)
                grad_value = grad_value + at_least_float32(U.transpose(-2, -1) @ do)
                grad_grad_output.append(P @ c + U @ value)
            return (
                torch.cat(grad_query, dim=-2),
                grad_key.to(dtype),
                grad_value.to(dtype),
                torch.cat(grad_grad_output, dim=-2),
            )


class MultiHeadAttention(nn.Module):
    """Multi-head attention of tokens to a context; without a context, to themselves.

    Args:
        width: channels of the tokens, in and out.
        num_heads: heads; must divide `width`.
        context_width: channels of the context's tokens; None: `width`.
        bias: whether queries, keys and values have biases.
        qk_norm: RMS norm of every head's queries and keys, which bounds the scores (Dehghani et al., 2023).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        context_width: int | None = None,
        *,
        bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        context_width = width if context_width is None else context_width
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.norm_q = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else None
        self.to_out = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """tokens (N, T, width), context (N, S, context_width) or None -> (N, T, width)."""
        context = tokens if context is None else context
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T or S, d)
            for projected in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        if self.norm_q is not None:
            # In the weights' precision also under autocast; the products that follow are in the values'.
            query = self.norm_q(query.to(self.norm_q.weight.dtype)).to(value.dtype)
            key = self.norm_k(key.to(self.norm_k.weight.dtype)).to(value.dtype)
        return self.to_out(attention(query, key, value).transpose(1, 2).flatten(2))
