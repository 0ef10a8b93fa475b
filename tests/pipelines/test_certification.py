"""The pipeline's smoothed classifier: units, spaces, cost, and what a linear network's margin says."""

import math

import pytest
import torch
from tiny import generator, gradient_image, tiny_pipeline

from latent_egc.methods.denoised_classification import denoised_log_probabilities
from latent_egc.models import EnergyOutput, energy_potential


def linear_pipeline(margin):
    """Reads pixels; of classes 0 and 1 on each side of a plane at an l2 distance of `margin` from mid-grey, in [0, 1].

    The network undoes alpha_t of the timestep that it is given, so that another timestep would be another margin.
    """
    pipeline = tiny_pipeline(vae=False, in_channels=3)
    normal = torch.randn(3, 4, 4, generator=generator())
    normal /= normal.norm()
    model = pipeline.energy_model

    def forward(noisy, timestep):
        alpha, _ = model.noise_levels(torch.tensor(timestep))
        pixels = (noisy / alpha + 1) / 2
        side = ((pixels - 0.5) * normal).sum(dim=(1, 2, 3)) + margin
        return EnergyOutput(side, torch.stack([side, -side, torch.full_like(side, -1e9)], dim=1))

    model.forward = forward
    return pipeline


def counted_rows(monkeypatch, model):
    """(timestep, rows) of each forward pass of a network."""
    passes, read_at = [], model.read_at

    def counting(latents, timesteps, labels_seen):
        passes.append((float(torch.as_tensor(timesteps).flatten()[0]), len(latents)))
        return read_at(latents, timesteps, labels_seen)

    monkeypatch.setattr(model, "read_at", counting)
    return passes


def test_radius_is_the_margin_in_units_of_pixels_from_0_to_1():
    output = linear_pipeline(0.3).certify(torch.full((3, 4, 4), 0.5), 0.25, n=20_000, generator=generator())
    assert (output.label_ids.tolist(), output.labels, output.space) == ([0], ["cat"], "pixels")
    assert 0.28 < float(output.radius) < 0.3
    assert output.votes.sum() == 20_000
    assert output.radius.dtype == torch.float64


def test_at_most_alpha_of_the_certificates_exceed_the_margin():
    images = torch.full((200, 3, 4, 4), 0.5)
    output = linear_pipeline(0.1).certify(images, 0.25, n0=10, n=60, alpha=0.2, generator=generator())
    assert 0.05 < (output.radius > 0.1).double().mean() < 0.26
    assert output.labels.count(None) == (output.label_ids == -1).sum() > 0


@pytest.mark.parametrize(
    ("vae", "noise", "ratio"), [(False, "pixels", 0.5), (True, "pixels", None), (True, "latents", 0.25)]
)
def test_one_pass_a_vote_at_the_noise_own_timestep(monkeypatch, vae, noise, ratio):
    pipeline = tiny_pipeline(vae=vae, **({} if vae else {"in_channels": 3}))
    passes = counted_rows(monkeypatch, pipeline.energy_model)
    output = pipeline.certify([gradient_image()] * 2, 0.25, n0=5, n=11, noise=noise, batch_size=4)
    assert [rows for _, rows in passes] == 2 * [4, 1, 4, 4, 3]
    (timestep,) = {timestep for timestep, _ in passes}
    if ratio is None:
        assert timestep == 0
    else:
        alpha, sigma = pipeline.energy_model.noise_levels(torch.tensor(timestep))
        assert float(sigma / alpha) == pytest.approx(ratio, rel=1e-4)
    assert output.space == noise
    assert output.votes.sum(dim=1).tolist() == [11, 11]


def test_what_the_network_sees(monkeypatch):
    """By hand: noised pixels times alpha, noised pixels encoded, noised latents times alpha."""
    image = torch.rand(1, 3, 8, 8)
    for vae, noise in ((False, "pixels"), (True, "pixels"), (True, "latents")):
        pipeline = tiny_pipeline(vae=vae, **({} if vae else {"in_channels": 3, "sample_size": 8}))
        seen, read_at = [], pipeline.energy_model.read_at
        reading = lambda z, *rest, r=read_at, s=seen: s.append(z) or r(z, *rest)  # noqa: E731
        monkeypatch.setattr(pipeline.energy_model, "read_at", reading)
        pipeline.certify(image, 0.2, n0=2, n=1, noise=noise, generator=generator())
        clean = 2 * image - 1
        if noise == "latents":
            clean = pipeline.encode(clean)
        draws = torch.randn(2, *clean.shape[1:], generator=generator())
        ratio = 0.2 if noise == "latents" else 0.4
        expected = clean + ratio * draws
        expected = pipeline.encode(expected) if vae and noise == "pixels" else expected / math.hypot(1, ratio)
        torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("method", ["certify", "classify"])
def test_an_image_with_its_own_generator_does_not_depend_on_the_others(method):
    images, pipeline = torch.rand(3, 3, 8, 8), tiny_pipeline()

    def found(numbers, **options):
        own = [generator(number) for number in numbers]
        if method == "certify":
            return pipeline.certify(images[numbers], 0.5, n0=4, n=20, generator=own, **options).votes.double()
        options |= {"num_noise_samples": 2, "timesteps": [100, 400], "generator": own}
        return pipeline.classify(images[numbers], **options).logits

    together = found([0, 1, 2])
    for number in range(3):
        torch.testing.assert_close(found([number])[0], together[number], rtol=1e-4, atol=1e-5)
    assert found([2, 0]).shape == (2, 3)
    if method == "classify":
        torch.testing.assert_close(found([0, 1, 2], batch_size=1), together, rtol=1e-4, atol=1e-5)


def test_denoised_classification_is_the_mean_over_draws_and_timesteps(monkeypatch):
    image, pipeline = torch.rand(1, 3, 8, 8), tiny_pipeline()
    model, latents = pipeline.energy_model, pipeline.encode(2 * image - 1)
    stream, shape = generator(), (1, 1, 2, 4, 4)
    probabilities = [
        denoised_log_probabilities(energy_potential(model), model, latents, torch.randn(shape, generator=stream), t)
        for t in (100, 100, 100, 400, 400, 400)
    ]
    passes = counted_rows(monkeypatch, model)
    output = pipeline.classify(image, num_noise_samples=3, timesteps=[100, 400], generator=generator())
    # One for the energy, and for each noised copy one to denoise it and one to classify it.
    assert [t for t, _ in passes] == [0, *[100, 0] * 3, *[400, 0] * 3]
    expected = torch.stack(probabilities).exp().mean(dim=0)
    torch.testing.assert_close(output.probabilities, expected)
    torch.testing.assert_close(output.logits.exp(), expected)
    torch.testing.assert_close(output.energy, pipeline.classify(image).energy)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_precision_is_kept(monkeypatch):
    pipeline = tiny_pipeline(vae=False, in_channels=3)
    pipeline.energy_model.double()
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    assert pipeline.classify(image, timesteps=100, generator=generator()).logits.dtype == torch.float64
    seen, read_at = [], pipeline.energy_model.read_at
    monkeypatch.setattr(pipeline.energy_model, "read_at", lambda z, *rest: seen.append(z.dtype) or read_at(z, *rest))
    pipeline.certify(image, 0.5, n0=2, n=2, generator=generator())
    assert set(seen) == {torch.float64}
    half = tiny_pipeline().to(torch.bfloat16)
    output = half.certify(gradient_image(), 0.5, n0=2, n=2, noise="latents", generator=generator())
    assert output.votes.sum() == 2


def test_progress_counts_votes(capsys):
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=False)
    pipeline.certify([gradient_image()] * 2, 0.5, n0=3, n=5)
    assert "16/16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0.0}, r"sigma must be positive and finite, got 0\.0"),
        ({"sigma": float("nan")}, "sigma must be positive"),
        ({"sigma": 0.001, "noise": "latents"}, r"sigma must be in \[0\.0292, 25\.15\], .* got 0\.001"),
        ({"sigma": 1e4, "noise": "latents"}, "sigma must be in .* got 10000"),
        ({"n0": 0}, "n0 must be an integer of at least 1, got 0"),
        ({"n": 1.5}, r"n must be an integer of at least 1, got 1\.5"),
        ({"alpha": 1}, r"alpha must be in \(0, 1\), got 1"),
        ({"noise": "pixel"}, "noise must be 'pixels' or 'latents', got 'pixel'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"generator": [generator()]}, "generator must be one or a list of 2, got a list of 1"),
        ({"images": []}, "images must hold at least one image"),
    ],
)
def test_bad_certificates_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline().certify(**{"images": [gradient_image()] * 2, "sigma": 0.25} | arguments)


def test_bad_noise_of_a_classification_names_the_argument():
    for arguments, message in (
        ({"timesteps": 1000}, r"timesteps must be integers in \[0, 1000\), got 1000"),
        ({"timesteps": []}, r"timesteps must be integers in \[0, 1000\), got \[\]"),
        ({"num_noise_samples": 0, "timesteps": 1}, "num_noise_samples must be an integer of at least 1, got 0"),
        ({"num_noise_samples": 2}, "num_noise_samples=2 needs timesteps"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_pipeline().classify(gradient_image(), **arguments)


def test_spaces_and_classes_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="noise='latents' needs an autoencoder"):
        tiny_pipeline(vae=False, in_channels=3).certify(gradient_image(), 0.25, noise="latents")
    with pytest.raises(ValueError, match="vae=None, but the energy network's latents have 2 channels"):
        tiny_pipeline(vae=False).certify(gradient_image(), 0.25)
    with pytest.raises(ValueError, match=r"sigma must be in \[0\.0146, 12\.57\]"):
        tiny_pipeline(vae=False, in_channels=3).certify(gradient_image(), 0.001)
    with pytest.raises(ValueError, match="trained without classes"):
        tiny_pipeline(num_classes=None, energy_channels=3).certify(gradient_image(), 0.25)
