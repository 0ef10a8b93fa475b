"""AND, OR and NOT: their values are the formulas, they are bounded where they say so, and they share a forward pass."""

import math

import pytest
import torch
from tiny import TINY_BACKBONES, tiny_unet

from latent_egc.methods.composition import NEGATION_FLOOR, all_classes, any_class, either_of, no_class
from latent_egc.models import energy_potential, input_gradient


def inputs():
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return latents, torch.tensor([10, 400, 990])


@pytest.fixture(params=[{}, {"class_embedding": True, "head": "inner"}], ids=str)
def model(request):
    return tiny_unet(num_classes=4, **request.param).double()


def test_values_are_the_formulas(model):
    latents, timesteps = inputs()
    output, (_, sigma) = model(latents, timesteps), model.noise_levels(timesteps)
    p = output.logits.softmax(dim=1)
    joint = p * (-output.energy / sigma).exp()[:, None]
    d = NEGATION_FLOOR
    expected = {
        # The OR at scale 1 is the log of the summed joint, exactly.
        energy_potential(model) + any_class(model, [0, 2], 1.0): -sigma * joint[:, [0, 2]].sum(dim=1).log(),
        all_classes(model, [0, 2], 3.0): -3 * sigma * (p[:, 0] * p[:, 2]).log(),
        any_class(model, [1, 2, 2], 3.0): -3 * sigma * (p[:, 1] + p[:, 2]).log(),
        no_class(model, [0, 3], 2.0): -2 * sigma * ((1 - d) * (1 - p[:, 0] - p[:, 3]) + d).log(),
        # A mixture, so exact at every noise level: the joint summed over the other classes, and a little of all.
        energy_potential(model) + no_class(model, [0, 3], 1.0): -sigma
        * ((1 - d) * joint[:, [1, 2]].sum(dim=1) + d * joint.sum(dim=1)).log(),
    }
    for potential, values in expected.items():
        torch.testing.assert_close(potential(latents, timesteps)[0], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_not_is_bounded_and_its_gradient_is_too(dtype):
    """However sure the classifier is: the value ends at the floor, where log(1 - p) and negated guidance do not."""
    model = tiny_unet().to(dtype)
    sharpness = torch.tensor([-500.0, -3.0, 0.0, 5.0, 80.0, 500.0], dtype=dtype, requires_grad=True)
    logits = torch.stack([sharpness, torch.zeros_like(sharpness), torch.zeros_like(sharpness)], dim=1)
    output = type(model(torch.zeros(1, 2, 4, 4, dtype=dtype), 0))(energy=sharpness, logits=logits)
    sigma = torch.full((6,), 0.5, dtype=dtype)
    value = no_class(model, [0], 2.0).value(lambda *reading: output, sigma)
    assert (value >= -1e-12).all()
    assert (value <= 2 * 0.5 * math.log(1 / NEGATION_FLOOR) * (1 + 1e-6)).all()
    assert (value.diff() >= 0).all()  # the surer of the class, the higher
    (gradient,) = torch.autograd.grad(value.sum(), sharpness)
    assert gradient.isfinite().all()
    assert (gradient.abs() <= 2 * 0.5).all()
    assert gradient[3] > 0.9  # at p = 0.987 it still pushes


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
@pytest.mark.parametrize("class_embedding", [False, True])
def test_all_terms_of_a_network_are_one_forward_pass(backbone, class_embedding, monkeypatch):
    model, rows = TINY_BACKBONES[backbone](class_embedding=class_embedding), []
    latents, timesteps = (tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs())
    potential = energy_potential(model) + all_classes(model, [0, 1], 2.0)
    potential = potential + any_class(model, [1, 2], 1.0) + no_class(model, [2], 1.0)
    network = model.network
    monkeypatch.setattr(model, "network", lambda latents, *rest: rows.append(len(latents)) or network(latents, *rest))
    with torch.no_grad():
        input_gradient(potential, latents, timesteps)
    assert rows == [3]


def test_either_of_two_networks_is_their_weighted_mixture(monkeypatch):
    first, second = tiny_unet().double(), tiny_unet(head="inner").double()
    latents, timesteps = inputs()
    _, sigma = first.noise_levels(timesteps)
    one, other = (energy_potential(model) for model in (first, second))
    densities = [(-potential(latents, timesteps)[0] / sigma).exp() for potential in (one, other)]
    for weight, factor in ((0.7, math.exp(0.7)), (lambda sigma: 2 * sigma, (2 * sigma).exp())):
        mixture = either_of(one, other, weight)
        expected = -sigma * (densities[0] + factor * densities[1]).log()
        torch.testing.assert_close(mixture(latents, timesteps)[0], expected)
    share = densities[0] / (densities[0] + factor * densities[1])
    epsilons = [model.epsilon(latents, timesteps) for model in (first, second)]
    expected = share[:, None, None, None] * epsilons[0] + (1 - share)[:, None, None, None] * epsilons[1]
    torch.testing.assert_close(input_gradient(mixture, latents, timesteps)[0], expected)
    nested = either_of(one + any_class(first, [0], 1.0), other, 0.0)
    assert nested(latents, timesteps)[0].shape == (3,)


@pytest.mark.parametrize("term", [all_classes, any_class, no_class])
def test_classes_that_there_are_not_are_refused(term):
    for wrong in ([], [0, 1, 2], [3], [-1, 0]):
        with pytest.raises(ValueError, match="class_ids must be some, but not all, of 0 to 2"):
            term(tiny_unet(), wrong, 1.0)
    with pytest.raises(ValueError, match="class_ids must be some"):
        term(tiny_unet(num_classes=None, energy_channels=3), [0], 1.0)
