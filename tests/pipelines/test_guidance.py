"""Guidance of the steps, and selection among candidates: what is sampled, what it costs, what is refused."""

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.guiders.guider_utils import rescale_noise_cfg
from tiny import generator, sample, tiny_pipeline, tiny_unet

from latent_egc.models.potentials import input_gradient
from latent_egc.pipelines.guidance import candidate_scores
from latent_egc.pipelines.schedulers import SOLVERS, solver

LABELS = torch.tensor([1, 2])
VARIANTS = [{}, {"class_embedding": True}]


def weaker_unet(**overrides):
    """Another network of the same latents and classes, narrower."""
    model = tiny_unet(**{"block_out_channels": (4, 8)} | overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    return model


def count_rows(monkeypatch, model):
    """The rows of every pass through a network, as they come; each is followed by a backward pass in a step."""
    rows, network = [], model.network
    monkeypatch.setattr(model, "network", lambda latents, *rest: rows.append(len(latents)) or network(latents, *rest))
    return rows


def assert_one_step(pipeline, epsilon_at, **arguments):
    """What a call of one step samples is the scheduler's step by an epsilon that a test made itself."""
    latents = torch.randn(2, 2, 4, 4, generator=generator())
    found = pipeline(LABELS, num_inference_steps=1, latents=latents, output_type="latent", **arguments).images
    pipeline.scheduler.set_timesteps(1)
    timestep = pipeline.scheduler.timesteps[0]
    expected = pipeline.scheduler.step(epsilon_at(latents, timestep), timestep, latents).prev_sample
    torch.testing.assert_close(found, expected.detach())
    assert found.dtype == latents.dtype


# --- schedule, rescale, autoguidance --------------------------------------------------------------------------------


def test_a_scale_may_be_a_function_of_the_noise_level():
    pipeline, used = tiny_pipeline(), []
    assert torch.equal(sample(pipeline, "cat", guidance_scale=lambda level: 2.0), sample(pipeline, "cat"))
    epsilon = pipeline.energy_model.epsilon
    pipeline.energy_model.epsilon = lambda *given, **scales: used.append(scales) or epsilon(*given, **scales)
    sample(pipeline, "cat", guidance_scale=lambda level: 1 + 2 * level, guidance_interval=(0.3, 1.0))
    assert [scales["guidance_scale"] for scales in used] == pytest.approx([1 + 2 * 0.666, 1 + 2 * 0.333, 0.0])
    for wrong in (lambda level: -level, lambda level: float("nan")):
        with pytest.raises(ValueError, match="guidance_scale must be finite and not negative"):
            sample(pipeline, "cat", guidance_scale=wrong)
    with pytest.raises(ValueError, match="guidance_scale=0 would ignore class_labels"):
        sample(pipeline, "cat", guidance_scale=lambda level: 0.0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rescale_brings_the_deviation_to_the_unguided_one_for_another_pass(variant, monkeypatch):
    pipeline = tiny_pipeline(**variant)
    model = pipeline.energy_model

    def rescaled(latents, timestep):
        guided = model.epsilon(latents, timestep, LABELS, guidance_scale=3.0)
        return rescale_noise_cfg(guided, model.epsilon(latents, timestep, LABELS, guidance_scale=0.0), 0.7)

    assert_one_step(pipeline, rescaled, guidance_scale=3.0, guidance_rescale=0.7)
    everything = {"guidance_scale": 3.0, "guidance_interval": (0.3, 1.0)}
    rows = count_rows(monkeypatch, model)
    sample(pipeline, "cat", guidance_rescale=1.0, **everything)
    assert rows == ([2, 1, 2, 1, 1] if variant else [1, 1, 1, 1, 1])  # outside the interval no second pass
    with pytest.raises(ValueError, match=r"guidance_rescale must be in \[0, 1\], got 1.5"):
        sample(pipeline, "cat", guidance_rescale=1.5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_autoguidance_leads_away_from_the_weaker_models_potential(variant, monkeypatch):
    """U_weak + s (U - U_weak), for one pass of each network; a pipeline stands for its network."""
    pipeline, weaker = tiny_pipeline(**variant), weaker_unet(**variant)
    model = pipeline.energy_model

    def led_away(latents, timestep):
        weak, strong = (m.epsilon(latents, timestep, LABELS, guidance_scale=1.5) for m in (weaker, model))
        return weak + 2.5 * (strong - weak)

    options = {"auto_guidance_model": weaker, "auto_guidance_scale": 2.5}
    assert_one_step(pipeline, led_away, guidance_scale=1.5, **options)
    other = tiny_pipeline(**variant)
    other.energy_model.load_state_dict(tiny_unet(**variant).state_dict())
    as_pipeline = sample(pipeline, "cat", auto_guidance_model=other, auto_guidance_scale=2.0)
    torch.testing.assert_close(
        as_pipeline, sample(pipeline, "cat", auto_guidance_model=other.energy_model, auto_guidance_scale=2.0)
    )
    own, weak = count_rows(monkeypatch, model), count_rows(monkeypatch, weaker)
    sample(pipeline, ["cat", "dog"], guidance_interval=(0.3, 0.6), **options)
    assert own == ([2, 4, 2] if variant else [2, 2, 2])
    assert weak == ([4] if variant else [2])


def test_the_potential_is_the_one_whose_gradient_is_sampled():
    """With every guidance but the rescale, which is no potential's."""
    pipeline, weaker = tiny_pipeline(class_embedding=True), weaker_unet(class_embedding=True)
    latents, timestep = torch.randn(2, 2, 4, 4, generator=generator()), torch.tensor(500)
    pipeline._guidance_scale = 2.0
    for interval in ((0.0, 1.0), (0.6, 1.0)):
        options = (1.5, interval, 0.0, weaker, 2.5)
        potential = pipeline._guidance(LABELS, *options).potential(timestep)
        gradient, outputs = input_gradient(potential, latents, timestep)
        expected = pipeline._guided_epsilon(LABELS, *options)(latents, timestep)
        torch.testing.assert_close(gradient, expected)
        assert len(outputs) == (4 if interval[0] == 0 else 1)  # label and null of two networks, or label of one


def test_weaker_models_that_do_not_fit_are_refused_by_name():
    pipeline = tiny_pipeline()
    for overrides, message in (
        ({"num_classes": 5}, "num_classes=5, the pipeline's network has 3"),
        ({"class_embedding": True}, "class_embedding=True"),
        ({"in_channels": 3}, "in_channels=3"),
        ({"sample_size": 8}, "sample_size=8"),
        ({"beta_end": 0.02}, "another noise schedule"),
    ):
        with pytest.raises(ValueError, match=f"auto_guidance_model has {message}"):
            sample(pipeline, "cat", auto_guidance_model=weaker_unet(**overrides), auto_guidance_scale=2.0)
    with pytest.raises(ValueError, match="auto_guidance_model must be an EnergyModel or an EGCPipeline, got Linear"):
        sample(pipeline, "cat", auto_guidance_model=torch.nn.Linear(1, 1), auto_guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"auto_guidance_scale=2\.0 needs auto_guidance_model"):
        sample(pipeline, "cat", auto_guidance_scale=2.0)
    with pytest.raises(ValueError, match="auto_guidance_scale=1 would ignore auto_guidance_model"):
        sample(pipeline, "cat", auto_guidance_model=weaker_unet())
    with pytest.raises(ValueError, match="auto_guidance_model is on meta, the pipeline's network on cpu"):
        sample(pipeline, "cat", auto_guidance_model=weaker_unet().to("meta"), auto_guidance_scale=2.0)
    with pytest.raises(ValueError, match="auto_guidance_scale must be finite"):
        sample(pipeline, "cat", auto_guidance_model=weaker_unet(), auto_guidance_scale=float("inf"))


# --- selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("select_by", "scheduler"), [("classifier", None), ("density", None), ("both", DDPMScheduler)])
def test_the_best_candidate_is_returned(select_by, scheduler):
    """Candidate j of an image is the one that its generator draws j-th, in whatever batches; the first as if alone."""
    pipeline, labels = tiny_pipeline(), [0, 1, 2, 1, 0]
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    common = {"output_type": "latent", "num_inference_steps": 2}
    one_by_one = [generator(i) for i in range(5)]
    candidates = torch.stack([sample(pipeline, labels, generator=one_by_one, **common) for _ in range(3)])
    with torch.no_grad():
        output = pipeline.energy_model(candidates.flatten(0, 1), 0)
    log_p_y = output.logits.log_softmax(1).gather(1, torch.tensor(labels * 3)[:, None])[:, 0]
    log_p_z = -output.energy / (1 - pipeline.energy_model.alphas_cumprod[0]).sqrt()
    scores = {"classifier": log_p_y, "density": log_p_z, "both": log_p_y + log_p_z}[select_by].view(3, 5)
    best = scores.argmax(dim=0)
    assert len(best.unique()) > 1
    options = {"num_candidates": 3, "select_by": select_by}
    for batch_size in (2, 5):
        one_by_one = [generator(i) for i in range(5)]
        found = sample(pipeline, labels, generator=one_by_one, batch_size=batch_size, **options, **common)
        torch.testing.assert_close(found, candidates[best, torch.arange(5)], atol=1e-4, rtol=0)


def test_candidates_cost_their_steps_and_a_forward_pass_each(monkeypatch):
    pipeline, gradients = tiny_pipeline(), []
    rows, epsilon = count_rows(monkeypatch, pipeline.energy_model), pipeline.energy_model.epsilon
    pipeline.energy_model.epsilon = lambda *given, **scales: gradients.append(1) or epsilon(*given, **scales)
    images = sample(pipeline, ["cat", "dog"], num_candidates=4)
    assert images.shape == (2, 3, 8, 8)
    assert rows == [2] * (4 * 3 + 4)
    assert len(gradients) == 4 * 3
    assert len(sample(pipeline, num_images_per_label=2, num_candidates=2, select_by="density")) == 2


def test_one_image_of_one_generator():
    pipeline = tiny_pipeline()
    first = sample(pipeline, "cat", output_type="latent")
    many = sample(pipeline, "cat", num_candidates=6, output_type="latent")
    scores = [candidate_scores(pipeline.energy_model, z, torch.tensor([0]), "classifier") for z in (first, many)]
    assert scores[1] > scores[0]


def test_an_interrupted_selection_returns_what_is_finished():
    pipeline, seen = tiny_pipeline(), []

    def stop_in_the_third(call, step, timestep, values):
        seen.append(step)
        call._interrupt = len(seen) == 7

    found = sample(pipeline, "cat", num_candidates=5, callback_on_step_end=stop_in_the_third, output_type="latent")
    torch.testing.assert_close(found, sample(pipeline, "cat", num_candidates=2, output_type="latent"))


def test_selections_that_cannot_be_made_are_refused_by_name():
    pipeline = tiny_pipeline()
    for options, message in (
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"select_by": "luck"}, "select_by must be 'classifier', 'density' or 'both', got 'luck'"),
        ({"num_candidates": 2, "latents": torch.zeros(1, 2, 4, 4)}, "num_candidates=2 draws starting noise of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(pipeline, "cat", **options)
    with pytest.raises(ValueError, match="select_by='both' needs class_labels, got None"):
        sample(pipeline, num_candidates=2, select_by="both")


# --- all of it where only diffusers is ------------------------------------------------------------------------------


def test_an_exported_pipeline_guides_and_selects_alike(tmp_path):
    pipeline, weaker = tiny_pipeline(), weaker_unet()
    pipeline.save_pretrained(tmp_path)
    exported = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    exported.set_progress_bar_config(disable=True)
    assert not type(exported).__module__.startswith("latent_egc")
    for options in (
        {"guidance_scale": lambda level: 1 + level, "guidance_rescale": 0.5},
        {"auto_guidance_model": weaker, "auto_guidance_scale": 2.0},
        {"num_candidates": 3, "select_by": "both"},
    ):
        assert torch.equal(sample(exported, ["cat", "dog"], **options), sample(pipeline, ["cat", "dog"], **options))


# --- solvers --------------------------------------------------------------------------------------------------------


def test_solvers_by_name_start_at_the_last_timestep():
    pipeline = tiny_pipeline()
    for name in SOLVERS:
        scheduler = solver(name, pipeline.scheduler)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 999
        pipeline.scheduler = scheduler
        assert sample(pipeline, "cat").isfinite().all()
    with pytest.raises(ValueError, match=r"there is no solver 'RK4', only DDIM, DPM-Solver\+\+\(2M\), UniPC, Heun"):
        solver("RK4", pipeline.scheduler)
