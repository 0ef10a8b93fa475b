"""Attention: the fused and the twice-differentiable kernel agree, and the right one runs."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_unet

from latent_egc.models import attention as attention_module
from latent_egc.models.attention import MultiHeadAttention, attention, chunked_attention, math_attention
from latent_egc.models.numerics import twice_differentiable


def test_kernels_agree():
    query, key, value = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64).unbind()
    fused = attention(query, key, value)
    with twice_differentiable(True):
        torch.testing.assert_close(attention(query, key, value), fused)


def test_second_derivative_is_exact():
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with twice_differentiable(True):
        assert torch.autograd.gradgradcheck(attention, (query, key, value))


@pytest.fixture
def tiny_chunks(monkeypatch):
    monkeypatch.setattr(attention_module, "QUERIES_PER_CHUNK", 2)


@pytest.mark.usefixtures("tiny_chunks")
def test_chunked_kernel_has_exact_derivatives():
    """Of first, second and third order; the last chunk is a short one, and there are more queries than keys."""
    query = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(chunked_attention(query, key, value), math_attention(query, key, value))
    assert torch.autograd.gradcheck(chunked_attention, (query, key, value))
    assert torch.autograd.gradgradcheck(chunked_attention, (query, key, value))

    def second(kernel):
        first = torch.autograd.grad(kernel(query, key, value).square().sum(), query, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (query, key, value), create_graph=True)

    for own, expected in zip(second(chunked_attention), second(math_attention), strict=True):
        torch.testing.assert_close(own, expected)
        for a, b in zip(
            torch.autograd.grad(own.square().sum(), (query, key, value), retain_graph=True),
            torch.autograd.grad(expected.square().sum(), (query, key, value), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_kernel_keeps_the_type(dtype):
    tensors = torch.randn(3, 1, 2, 5, 4).to(dtype).requires_grad_()
    output = chunked_attention(*tensors)
    (first,) = torch.autograd.grad(output.sum(), tensors, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), tensors)
    assert output.dtype == first.dtype == second.dtype == dtype


def peak_bytes(kernel, num_tokens):
    """Largest sum of live allocations in forward, input gradient and second backward pass."""
    tensors = [torch.randn(1, 1, num_tokens, 4, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients = torch.autograd.grad(kernel(*tensors).sum(), tensors, create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_chunked_kernels_memory_is_linear(monkeypatch):
    monkeypatch.setattr(attention_module, "QUERIES_PER_CHUNK", 16)
    assert peak_bytes(chunked_attention, 1024) < 2.2 * peak_bytes(chunked_attention, 512)
    assert peak_bytes(math_attention, 1024) > 3.5 * peak_bytes(math_attention, 512)
    assert peak_bytes(chunked_attention, 1024) < 0.1 * peak_bytes(math_attention, 1024)


def test_many_tokens_take_the_chunked_kernel(monkeypatch):
    monkeypatch.setattr(attention_module, "CHUNKED_FROM_TOKENS", 6)
    calls = []
    monkeypatch.setattr(
        attention_module, "chunked_attention", lambda q, k, v: calls.append(1) or math_attention(q, k, v)
    )
    many, few = torch.randn(2, 1, 6, 4), torch.randn(2, 1, 5, 4)
    with twice_differentiable(True):
        attention(many, few, few)
    attention(many, many, many)
    assert not calls
    with twice_differentiable(True):
        attention(many, many, many)
    assert calls


def test_qk_norm_bounds_the_scores():
    layer = MultiHeadAttention(8, num_heads=2, qk_norm=True)
    tokens = torch.randn(2, 3, 8)
    output = layer(tokens)
    layer.to_q.weight.data *= 100
    layer.to_k.weight.data *= 100
    torch.testing.assert_close(layer(tokens), output, rtol=1e-3, atol=1e-4)


def test_context_of_another_width():
    layer = MultiHeadAttention(8, num_heads=2, context_width=5)
    assert layer(torch.randn(3, 6, 8), torch.randn(3, 1, 5)).shape == (3, 6, 8)


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
