"""The pipeline samples compositions and corrects between its steps: as by hand, image by image, at the right level."""

import sys
import types
from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from tiny import generator, sample, tiny_pipeline, tiny_unet

from latent_egc import EGCPipeline
from latent_egc.methods.composition import either_of
from latent_egc.methods.correctors import Corrector
from latent_egc.models import input_gradient
from latent_egc.pipelines.code_files import bundle
from latent_egc.pipelines.schedulers import default_scheduler


def compose(pipeline, **arguments):
    arguments = {"num_inference_steps": 3, "generator": generator(), "output_type": "pt"} | arguments
    return pipeline.compose(**arguments)


def test_composition_with_a_corrector_by_hand():
    pipeline = tiny_pipeline()
    model, latents = pipeline.energy_model, torch.randn(2, 2, 4, 4, generator=generator())
    corrector = Corrector("mala", num_steps=2, step_size=0.3)
    asked = {"all_of": ["cat", 1], "none_of": "cow", "guidance_scale": 3.0}
    output = pipeline.compose(
        **asked,
        num_images=2,
        num_inference_steps=2,
        latents=latents,
        corrector=corrector,
        generator=generator(1),
        output_type="latent",
    )
    potential, abar, z, draws = pipeline.composed_potential(**asked), model.alphas_cumprod, latents, generator(1)
    for timestep, following in ((500, abar[0]), (0, torch.tensor(1.0))):
        epsilon = input_gradient(potential, z, torch.tensor(timestep))[0].detach()
        clean = (z - (1 - abar[timestep]).sqrt() * epsilon) / abar[timestep].sqrt()
        z = following.sqrt() * clean + (1 - following).sqrt() * epsilon
        if timestep == 500:
            z, rates = corrector(potential, z, torch.tensor(0), (1 - abar[0]).sqrt(), 0.3, draws)
    torch.testing.assert_close(output.images, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.acceptance_rates, rates[:, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("ula", DDIMScheduler),
        ("mala", DDPMScheduler),
        ("hmc", EulerDiscreteScheduler),
        ("mala", HeunDiscreteScheduler),
    ],
)
def test_an_image_does_not_depend_on_its_batch(kind, scheduler):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    options = {"any_of": ["cat", "dog"], "corrector": Corrector(kind, num_steps=1), "num_inference_steps": 3}
    options |= {"output_type": "latent"}
    together = compose(pipeline, num_images=3, generator=[generator(i) for i in range(3)], **options)
    in_batches = compose(pipeline, num_images=3, batch_size=2, generator=[generator(i) for i in range(3)], **options)
    alone = compose(pipeline, generator=[generator(2)], **options)
    for output in (in_batches, alone):
        rows = slice(-len(output.images), None)
        torch.testing.assert_close(output.images, together.images[rows], atol=1e-3, rtol=1e-3)
        rates, expected = output.acceptance_rates, together.acceptance_rates[rows]
        torch.testing.assert_close(rates, expected, atol=1e-3, rtol=0, equal_nan=True)


@dataclass(frozen=True)
class Recorder(Corrector):
    """Notes what it is given, and changes nothing."""

    seen: tuple = ()

    def __call__(self, potential, latents, timestep, sigma, step_sizes, generator=None):
        self.seen[0].append((float(timestep), float(sigma), float(latents.std())))
        return latents, torch.ones(len(latents))


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
)
def test_levels_are_those_of_the_next_step_in_the_networks_scale(scheduler):
    """About white Gaussian data latents have about unit variance at every level, whatever scale a scheduler has."""
    model, seen = tiny_unet(randomise=False), []
    pipeline = EGCPipeline(model, None, default_scheduler(model))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_images_per_label": 32, "num_inference_steps": 6, "output_type": "latent"}
    plain = pipeline(generator=generator(), **options).images
    output = pipeline(generator=generator(), corrector=Recorder(seen=(seen,)), **options)
    torch.testing.assert_close(output.images, plain)
    pipeline.scheduler.set_timesteps(6)
    levels = dict.fromkeys(float(timestep) for timestep in pipeline.scheduler.timesteps)
    assert [level for level, _, _ in seen] == list(levels)[1:]
    for level, sigma, deviation in seen:
        assert sigma == pytest.approx(float(model.noise_levels(torch.tensor(level))[1]))
        assert deviation == pytest.approx(1, abs=0.3)
    assert output.acceptance_rates.nansum() == 32 * len(seen)


def test_a_corrector_follows_what_the_call_samples(monkeypatch):
    """Labels, scales and interval: the level's potential is the one whose gradient the next step takes."""
    pipeline, found = tiny_pipeline(class_embedding=True), []
    corrector = Recorder(seen=([],))

    def noted(self, potential, latents, timestep, *rest):
        found.append((latents, timestep, input_gradient(potential, latents, timestep)[0]))
        return latents, torch.ones(len(latents))

    monkeypatch.setattr(Recorder, "__call__", noted)
    epsilon, taken = pipeline.energy_model.epsilon, []
    monkeypatch.setattr(
        pipeline.energy_model, "epsilon", lambda *given, **scales: taken.append(epsilon(*given, **scales)) or taken[-1]
    )
    scales = {"guidance_scale": 2.0, "classifier_free_scale": 1.5, "guidance_interval": (0.0, 0.3)}
    sample(pipeline, ["cat", "dog"], num_inference_steps=5, corrector=corrector, **scales)
    assert len(found) == 4
    for (_, _, followed), expected in zip(found, taken[1:], strict=True):
        torch.testing.assert_close(followed, expected)


def test_passes_are_counted(monkeypatch):
    """3 steps, and at 2 levels between them 1 + 2 gradients of MALA; a forward pass of N rows each."""
    pipeline, rows = tiny_pipeline(class_embedding=True), []
    network = pipeline.energy_model.network
    monkeypatch.setattr(
        pipeline.energy_model, "network", lambda latents, *rest: rows.append(len(latents)) or network(latents, *rest)
    )
    compose(pipeline, all_of=["cat", "dog"], none_of="cow", num_images=2, corrector=Corrector("mala", num_steps=2))
    assert rows == [2] * (3 + 2 * 3)


def test_a_step_asks_for_no_more_than_guidance_does():
    pipeline = tiny_pipeline()
    one_class = compose(pipeline, all_of="dog", guidance_scale=3.0).images
    torch.testing.assert_close(one_class, sample(pipeline, "dog", guidance_scale=3.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(compose(pipeline, all_of="dog").images, sample(pipeline, "dog"), atol=1e-4, rtol=0)
    everything = sample(pipeline, potential=pipeline.composed_potential())
    torch.testing.assert_close(everything, sample(pipeline), atol=1e-4, rtol=0)


def test_two_networks():
    pipeline, other = tiny_pipeline(), tiny_pipeline(head="inner", num_classes=None)
    both = pipeline.composed_potential(any_of=["cat", "dog"]) + other.composed_potential()
    either = either_of(pipeline.composed_potential(), other.composed_potential(), 0.5)
    first, second = (
        sample(pipeline, num_images_per_label=2, potential=potential, corrector="hmc") for potential in (both, either)
    )
    assert first.shape == (2, 3, 8, 8)
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match=r"potential: its networks need one latent space, got 3 and 2 channels"):
        sample(pipeline, potential=tiny_pipeline(False, in_channels=3).composed_potential())
    with pytest.raises(ValueError, match="has another noise schedule than the energy network"):
        sample(pipeline, potential=tiny_pipeline(beta_start=0.001).composed_potential())


def test_types_and_outputs():
    pipeline = tiny_pipeline().to(dtype=torch.bfloat16)
    output = compose(pipeline, all_of=["cat", "dog"], num_images=2, corrector="mala", output_type="latent")
    assert output.images.dtype == torch.float32
    assert output.images.isfinite().all()
    assert output.acceptance_rates.shape == (2, 2)
    _, rates = compose(pipeline, all_of="cat", corrector="ula", return_dict=False)
    assert torch.equal(rates, torch.ones(1, 2))
    assert len(compose(pipeline, all_of="cat", return_dict=False)) == 1
    (image,) = compose(pipeline, all_of="cat", output_type="pil").images
    assert image.size == (8, 8)


def test_the_code_beside_the_weights_composes_too(monkeypatch):
    """The file that travels to the Hub, with classes of its own."""
    module = types.ModuleType("travelled_pipeline")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(bundle("latent_egc.pipelines.pipeline_egc"), "travelled_pipeline.py", "exec"), module.__dict__)
    own = tiny_pipeline()
    theirs = module.EGCPipeline(own.energy_model, own.vae, own.scheduler, own.id2label, 2.0)
    theirs.set_progress_bar_config(disable=True)
    options = {"all_of": ["cat", "dog"], "num_images": 2}
    found, expected = (
        compose(pipeline, corrector=type(pipeline).Corrector("hmc", num_steps=1), **options)
        for pipeline in (theirs, own)
    )
    assert type(found) is not type(expected)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.acceptance_rates, expected.acceptance_rates)
    mixed = theirs.either_of(theirs.composed_potential(any_of="cat"), own.energy_model.potential(), 0.0)
    assert sample(theirs, potential=mixed).isfinite().all()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"all_of": "cta"}, "unknown class name 'cta' in all_of; did you mean 'cat'"),
        ({"none_of": [3]}, r"none_of must be names or ids in \[0, 3\), got 3"),
        ({"any_of": []}, "any_of is empty"),
        ({"any_of": [0, 1, 2]}, "any_of must leave out a class, got all 3"),
        ({"any_of": ["cat", "dog"], "none_of": "dog"}, r"none_of excludes classes of any_of: \['dog'\]"),
        ({"all_of": "cat", "guidance_scale": 0.0}, "guidance_scale must be finite and positive, got 0.0"),
        ({"guidance_scale": 2.0}, r"guidance_scale=2.0 needs classes in all_of, any_of or none_of"),
        ({"all_of": "cat", "class_labels": "dog"}, "potential and class_labels exclude each other"),
        ({"all_of": "cat", "guidance_interval": (0.0, 0.5)}, "potential and guidance_interval exclude each other"),
        ({"all_of": "cat", "corrector": "langevin"}, "corrector must be of kind 'ula', 'mala' or 'hmc'"),
    ],
)
def test_errors_name_the_argument(asked, message):
    with pytest.raises(ValueError, match=message):
        compose(tiny_pipeline(), **asked)


def test_what_cannot_be_composed_or_corrected_is_refused():
    with pytest.raises(ValueError, match="trained without classes, got all_of='cat'"):
        compose(tiny_pipeline(num_classes=None, energy_channels=3), all_of="cat")
    for scheduler in (UniPCMultistepScheduler, PNDMScheduler):
        pipeline = tiny_pipeline()
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        with pytest.raises(ValueError, match=f"corrector: {scheduler.__name__} steps from latents of its own memory"):
            sample(pipeline, "cat", corrector="mala")
