"""Attention: the fused and the twice-differentiable kernel agree, and the right one runs."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_unet

from latent_egc.models.attention import MultiHeadAttention, attention


def test_kernels_agree():
    query, key, value = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64).unbind()
    fused = attention(query, key, value, twice_differentiable=False)
    torch.testing.assert_close(attention(query, key, value, twice_differentiable=True), fused)


def test_second_derivative_is_exact():
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: attention(q, k, v, twice_differentiable=True), (query, key, value)
    )


def test_context_of_another_width():
    layer = MultiHeadAttention(8, num_heads=2, context_width=5)
    assert layer(torch.randn(3, 6, 8), torch.randn(3, 1, 5), twice_differentiable=False).shape == (3, 6, 8)


def test_kernel_follows_what_is_asked_for(monkeypatch):
    """Fused where at most one derivative can be asked for, and only there."""
    calls = []
    fused = F.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(1)
        return fused(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    model, latents = tiny_unet(), torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        expected = model.epsilon(latents, 5)  # sampling
        assert calls
        model(latents, 5)  # classification
    calls.clear()
    epsilon = model.epsilon(latents, 5)  # training
    model(latents.requires_grad_(), 5)
    assert not calls
    torch.testing.assert_close(epsilon, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(model.epsilon(latents, 900), expected)
