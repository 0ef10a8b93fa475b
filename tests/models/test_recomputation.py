"""Activation checkpointing: exact in every order that it offers, and frugal. The training step's parity with float64 is
in test_gradient_parity.py."""

import pytest
import torch
from tiny import TINY_BACKBONES, tiny_transformer
from torch import nn

from latent_egc import EGCObjective
from latent_egc.measuring.timing import peak_memory_of
from latent_egc.models.potentials import input_gradient
from latent_egc.models.recomputation import recomputed


class Block(nn.Module):
    """Two inputs, one of which may be None, and a parameter that is used twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, hidden, condition=None):
        hidden = (hidden @ self.weight).tanh()
        return hidden @ self.weight.T if condition is None else hidden * condition.exp()


def derivatives(run, block, hidden, condition):
    """First derivatives by inputs and parameter, and the second ones of a function of all of them."""
    leaves = [leaf for leaf in (hidden, condition, block.weight) if leaf is not None]
    output = run(hidden, condition)
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first) + output.sum(), leaves)
    return [*first, *second]


@pytest.mark.parametrize("with_condition", [True, False])
def test_all_first_and_second_derivatives(with_condition):
    block, hidden = Block(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(4, 3, dtype=torch.float64, requires_grad=True) if with_condition else None

    def frugal(*inputs):
        return recomputed(block, (block.weight,), inputs)

    expected = derivatives(block, block, hidden, condition)
    for found, value in zip(derivatives(frugal, block, hidden, condition), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_third_derivative_is_refused():
    block, hidden = Block(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    output = recomputed(block, (block.weight,), (hidden,))
    (first,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_gradients_that_are_asked_for_outside_of_epsilon(backbone):
    """Parameters' gradients of a recorded pass are left out where epsilon takes the input gradient, and only there."""
    model = TINY_BACKBONES[backbone]().double()
    latents = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = tuple(model.parameters())

    def penalty():
        energy = model(latents, 300).energy.sum()
        gradients = torch.autograd.grad(energy, (latents, *parameters), create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in gradients if g is not None)
        return torch.autograd.grad(penalty, (latents, *parameters), allow_unused=True)

    expected = penalty()
    model.enable_gradient_checkpointing()
    for before in (lambda: None, lambda: model.epsilon(latents, 300), failing_epsilon):
        before()
        for found, value in zip(penalty(), expected, strict=True):
            torch.testing.assert_close(found, value)


def failing_epsilon():
    """An input gradient that ends with an error, in its backward pass."""

    def potential(latents, timesteps):
        return latents.detach().sum(dim=(1, 2, 3)), []

    with pytest.raises(RuntimeError, match="does not require grad"):
        input_gradient(potential, torch.zeros(1, 2, 4, 4), 300)


def test_memory_of_a_training_step():
    torch.manual_seed(0)
    model = tiny_transformer(width=32, num_layers=8, sample_size=16)
    objective, latents, labels = EGCObjective(model), torch.randn(4, 2, 16, 16), torch.tensor([0, 1, 2, 0])

    def step():
        return torch.autograd.grad(objective(latents, labels, latents).loss, tuple(model.parameters()))

    plain = peak_memory_of(step, torch.device("cpu"))
    model.enable_gradient_checkpointing()
    assert peak_memory_of(step, torch.device("cpu")) < 0.5 * plain


def test_only_training_recomputes(monkeypatch):
    model = tiny_transformer()
    model.enable_gradient_checkpointing()
    monkeypatch.setattr("latent_egc.models.energy.recomputed", None)
    latents = torch.randn(2, 2, 4, 4)
    with pytest.raises(TypeError):
        model.epsilon(latents, 5)
    with torch.no_grad():
        model(latents, 5)
    model.eval().epsilon(latents, 5)
