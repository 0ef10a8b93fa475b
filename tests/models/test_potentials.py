"""Potentials: their values and gradients are those of the formulas, and they take the passes that they promise."""

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_BACKBONES

from latent_egc.models.potentials import (
    classifier_free_potential,
    classifier_potential,
    energy_potential,
    input_gradient,
)


@pytest.fixture(params=TINY_BACKBONES)
def tiny(request):
    """Makes a tiny energy network of each backbone."""
    return TINY_BACKBONES[request.param]


def inputs(dtype=torch.float64):
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    return latents, torch.tensor([10, 400, 990]), torch.tensor([2, 0, 1]), torch.tensor([0, 1, 2])


def units(monkeypatch, models, run):
    """Forward and backward passes of N rows through the networks while `run` is called, as they are really made."""
    counted = 0

    def counting(network):
        def counted_network(noisy_latents, *arguments):
            nonlocal counted
            counted += len(noisy_latents)

            def backward(gradient):
                nonlocal counted
                counted += len(gradient)

            output = network(noisy_latents, *arguments)
            if output[0].requires_grad:
                output[0].register_hook(backward)
            return output

        return counted_network

    for model in models:
        monkeypatch.setattr(model, "network", counting(model.network))
    run()
    return counted / 3


# What is differentiated -> its units without and with a class embedding.
POTENTIALS = {
    "plain": (lambda model, y, other: energy_potential(model), 2, 2),
    "label": (lambda model, y, other: energy_potential(model, y), 2, 2),
    "guided": (lambda model, y, other: energy_potential(model) + classifier_potential(model, y, 2.0), 2, 2),
    "guided at a label": (
        lambda model, y, other: energy_potential(model, y) + classifier_potential(model, y, 2.0),
        2,
        4,
    ),
    "two classes": (
        lambda model, y, other: (
            energy_potential(model) + classifier_potential(model, y, 2.0) + classifier_potential(model, other, 1.0)
        ),
        2,
        2,
    ),
    "two labels": (lambda model, y, other: energy_potential(model, y) + energy_potential(model, other), 2, 4),
    "classifier-free": (lambda model, y, other: classifier_free_potential(model, y, 3.0), 2, 4),
    "classifier-free and guided": (
        lambda model, y, other: classifier_free_potential(model, y, 3.0) + classifier_potential(model, other, 2.0),
        2,
        4,
    ),
}


@pytest.mark.parametrize("name", POTENTIALS)
@pytest.mark.parametrize("class_embedding", [False, True])
def test_passes_are_counted(tiny, name, class_embedding, monkeypatch):
    model = tiny(class_embedding=class_embedding)
    latents, timesteps, labels, other = inputs(torch.float32)
    make, *expected = POTENTIALS[name]
    with torch.no_grad():
        found = units(monkeypatch, [model], lambda: input_gradient(make(model, labels, other), latents, timesteps))
    assert found == expected[class_embedding]


@pytest.mark.parametrize("head", ["map", "inner"])
def test_values_are_the_formulas(tiny, head):
    model = tiny(head=head, class_embedding=True).double()
    latents, timesteps, labels, other = inputs()
    null, at_label = model(latents, timesteps), model(latents, timesteps, labels)
    _, sigma = model.noise_levels(timesteps)
    log_p = F.log_softmax(null.logits, dim=1)[torch.arange(3), other]
    expected = {
        energy_potential(model): null.energy,
        energy_potential(model, labels): at_label.energy,
        classifier_free_potential(model, labels, 3.0): 3 * at_label.energy - 2 * null.energy,
        classifier_potential(model, other, 2.0): -2 * sigma * log_p,
        energy_potential(model, labels) + 0.5 * energy_potential(model): at_label.energy + null.energy / 2,
    }
    for potential, values in expected.items():
        torch.testing.assert_close(potential(latents, timesteps)[0], values)


def test_outputs_are_those_of_the_readings(tiny):
    model = tiny(class_embedding=True).double()
    latents, timesteps, labels, _ = inputs()
    potential = energy_potential(model, labels) + classifier_potential(model, labels, 1.0)
    for outputs in (potential(latents, timesteps)[1], input_gradient(potential, latents, timesteps)[1]):
        at_label, at_null = outputs
        torch.testing.assert_close(at_label.energy, model(latents, timesteps, labels).energy)
        torch.testing.assert_close(at_null.logits, model(latents, timesteps).logits)
        assert not torch.allclose(at_label.logits, at_null.logits)


def test_two_networks_add_up(tiny, monkeypatch):
    first, second = tiny().double(), tiny(head="inner").double()
    latents, timesteps, _, _ = inputs()
    together = energy_potential(first) + 0.5 * energy_potential(second)
    expected = first.epsilon(latents, timesteps) + second.epsilon(latents, timesteps) / 2
    torch.testing.assert_close(input_gradient(together, latents, timesteps)[0], expected)
    with torch.no_grad():
        assert units(monkeypatch, [first, second], lambda: input_gradient(together, latents, timesteps)) == 4


def test_label_count_and_range_are_checked(tiny):
    model = tiny()
    latents, timesteps, labels, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"guidance_labels must be \(3,\) int64, got \(2,\)"):
        classifier_potential(model, labels[:2], 1.0)(latents, timesteps)
    with pytest.raises(ValueError, match=r"guidance_labels must be in \[0, 3\), got 0 to 3"):
        classifier_potential(model, torch.tensor([0, 3, 1]), 1.0)(latents, timesteps)
