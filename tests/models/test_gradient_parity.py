"""Every fast path of the training step against plain float64: gradients of the loss, all parameters together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tiny import TINY_BACKBONES, bf16_convolution_is_right

from latent_egc import EGCObjective
from latent_egc.models import attention as attention_module
from latent_egc.objective import CompiledForward
from latent_egc.training.gradient_check import GradientError, check_gradients

MODELS = [(backbone, head) for backbone in TINY_BACKBONES for head in ("map", "inner")]
ONE_EACH = [("unet", "map"), ("transformer", "inner")]
# The compiler takes minutes for what the other tests use.
SHALLOW = {
    "unet": {"block_out_channels": (8,), "attention_levels": ()},
    "transformer": {"num_layers": 1, "class_embedding": False},
}


def make_model(backbone, head, **overrides):
    """Random weights everywhere, so that every path has a gradient; with a class embedding for head "inner"."""
    overrides = {"class_embedding": head == "inner"} | overrides
    return TINY_BACKBONES[backbone](head=head, sample_size=8, **overrides)


def gradient(model, prepare=lambda objective: None, autocast=False):
    """d loss / d parameters of one fixed batch, flat and in float64; both losses active, one row unlabelled."""
    generator = torch.Generator().manual_seed(5)
    latents, clean, noise = torch.randn(3, 4, 2, 8, 8, generator=generator, dtype=torch.float64).to(model.dtype)
    objective = EGCObjective(model, classification_weight=0.5, label_smoothing=0.1)
    prepare(objective)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = objective(
            latents,
            torch.tensor([2, 0, -1, 1]),
            clean,
            noise=noise,
            timesteps=torch.tensor([3, 300, 600, 980]),
            label_dropped=torch.tensor([False, True, False, False]),
        )
    assert all(loss.dtype == torch.promote_types(model.dtype, torch.float32) for loss in losses)
    losses.loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def assert_parity(found, expected, tolerance=1e-5):
    """The norm of the difference, relative to the gradient's own."""
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"gradients are {error:.1e} of their norm off, allowed are {tolerance:.0e}"


@pytest.fixture(params=MODELS, ids="-".join)
def model_and_reference(request):
    """A float32 model and the gradient of its float64 copy, computed eagerly with math attention."""
    model = make_model(*request.param)
    return model, gradient(copy.deepcopy(model).double())


def test_float32(model_and_reference):
    model, reference = model_and_reference
    assert_parity(gradient(model), reference)


@pytest.mark.parametrize("name", MODELS, ids="-".join)
def test_compiled_without_the_code_generator(name):
    """aot_eager traces the whole step, input gradient and second backward pass, and runs the traced operations."""
    model = make_model(*name, **SHALLOW[name[0]])
    reference = gradient(copy.deepcopy(model).double())

    def prepare(objective):
        objective.forward = CompiledForward(objective, backend="aot_eager")

    assert_parity(gradient(model, prepare), reference)


@pytest.mark.full_compiler
@pytest.mark.parametrize("name", ONE_EACH, ids="-".join)
def test_compiled(name):
    model = make_model(*name, **SHALLOW[name[0]])
    reference = gradient(copy.deepcopy(model).double())

    def prepare(objective):
        objective.forward = CompiledForward(objective)

    assert_parity(gradient(model, prepare), reference)


def test_chunked_attention(model_and_reference, monkeypatch):
    model, reference = model_and_reference
    monkeypatch.setattr(attention_module, "CHUNKED_FROM_TOKENS", 1)
    monkeypatch.setattr(attention_module, "QUERIES_PER_CHUNK", 5)
    monkeypatch.delattr(attention_module, "math_attention")
    assert_parity(gradient(model), reference)


def test_activation_checkpointing(model_and_reference):
    model, reference = model_and_reference
    model.enable_gradient_checkpointing()
    assert_parity(gradient(model), reference)


def test_bf16_autocast(model_and_reference):
    model, reference = model_and_reference
    if "UNet" in type(model).__name__ and not bf16_convolution_is_right():
        generator = torch.Generator().manual_seed(5)
        latents, clean_latents, noise = torch.randn(3, 8, 2, 8, 8, generator=generator)  # 8 rows: where it is wrong
        rows = {"latents": latents, "clean_latents": clean_latents, "noise": noise, "class_labels": torch.arange(8) % 3}
        rows["timesteps"] = torch.linspace(3, 980, 8).long()
        with pytest.raises(GradientError, match="of their norm off plain float32"):
            check_gradients(EGCObjective(model, 0.5, 0.1), rows, Accelerator(cpu=True, mixed_precision="bf16"))
        return
    found = gradient(model, autocast=True)
    assert_parity(found, reference, tolerance=5e-2)
    assert F.cosine_similarity(found, reference, dim=0) >= 0.999


class FirstOrderAttention(torch.autograd.Function):
    """What the parity check must catch: exact values and first derivatives, and a backward pass without its own."""

    @staticmethod
    def forward(query, key, value):
        return attention_module.chunked_attention(query, key, value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        with torch.no_grad():
            detached = [tensor.detach() for tensor in (*ctx.saved_tensors, grad_output)]
            return attention_module._AttentionBackward.forward(*detached)


@pytest.mark.parametrize("name", ONE_EACH, ids="-".join)
def test_a_kernel_without_second_derivative_is_caught(name, monkeypatch):
    model = make_model(*name)
    reference_model = copy.deepcopy(model).double()
    reference = gradient(reference_model)
    latents = torch.randn(2, 2, 8, 8)
    epsilon = model.epsilon(latents, 400)
    monkeypatch.setattr(attention_module, "math_attention", FirstOrderAttention.apply)
    torch.testing.assert_close(model.epsilon(latents, 400), epsilon)  # the first derivative shows nothing
    with pytest.raises(AssertionError, match="of their norm off"):
        assert_parity(gradient(model), reference)
