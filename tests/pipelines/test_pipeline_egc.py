"""EGCPipeline: sampling and classification with tiny real components."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import (
    ROOT,
    generator,
    gradient_image,
    sample,
    tiny_dc,
    tiny_kl,
    tiny_pipeline,
    tiny_qwen,
    tiny_taesd,
    tiny_unet,
)

from latent_egc import EGCPipeline, EGCUNet
from latent_egc.pipelines import energy_pipeline
from latent_egc.pipelines.images import preprocess_images
from latent_egc.pipelines.schedulers import default_scheduler

# --- sampling ------------------------------------------------------------------------------------------------------


def test_ids_names_and_tensors_mean_the_same():
    pipeline = tiny_pipeline()
    expected = sample(pipeline, [2, 0])
    assert expected.shape == (2, 3, 8, 8)
    assert 0 <= expected.min() <= expected.max() <= 1
    assert torch.equal(expected, sample(pipeline, ["cow", "cat"]))
    assert torch.equal(expected, sample(pipeline, torch.tensor([2, 0])))
    assert torch.equal(sample(pipeline, 1), sample(pipeline, "dog"))


def test_ids_and_names_of_more_than_ten_classes(tmp_path):
    """As strings, which a saved configuration has, 10 stands before 2."""
    names = tuple("abcdefghijkl")
    tiny_pipeline(names=names, num_classes=12).save_pretrained(tmp_path)
    pipeline = EGCPipeline.from_pretrained(tmp_path)
    assert pipeline.id2label == dict(enumerate(names))
    assert pipeline.label_ids(["c", "k", 11]).tolist() == [2, 10, 11]
    output = pipeline.classify(gradient_image(), top_k=12)
    assert output.labels == [[names[i] for i in output.logits[0].argsort(descending=True)]]


def test_images_come_label_by_label():
    pipeline = tiny_pipeline()
    images = sample(pipeline, ["cat", "dog"], num_images_per_label=2, generator=[generator(i) for i in range(4)])
    assert len(images) == 4
    torch.testing.assert_close(images[2:3], sample(pipeline, "dog", generator=generator(2)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("vae", [True, False])
@pytest.mark.parametrize("variant", [{}, {"head": "inner", "class_embedding": True}], ids=str)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_a_batch_equals_its_images_one_by_one(vae, variant, scheduler):
    channels = {} if vae else {"in_channels": 3}
    pipeline = tiny_pipeline(vae, **variant, **channels)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    labels = ["cat", "dog", "cow"]
    together = sample(pipeline, labels, generator=[generator(i) for i in range(3)])
    for i, label in enumerate(labels):
        alone = sample(pipeline, label, generator=[generator(i)])
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_other_schedulers_by_from_config(scheduler):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    images = sample(pipeline, "cat", num_inference_steps=4)
    assert images.isfinite().all()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_solvers_agree_on_white_gaussian_data(scheduler):
    """For z_0 ~ N(0, I) the probability flow moves nothing: every solver must return its starting noise."""
    model = tiny_unet(randomise=False)
    pipeline = EGCPipeline(model, None, default_scheduler(model))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 2, 4, 4, generator=generator())
    result = pipeline(num_images_per_label=2, num_inference_steps=40, latents=latents, output_type="latent").images
    torch.testing.assert_close(result, latents, atol=0.15, rtol=0)


def test_ddim_by_hand():
    pipeline = tiny_pipeline()
    model, latents = pipeline.energy_model, torch.randn(1, 2, 4, 4, generator=generator())
    result = pipeline("dog", num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="latent").images
    abar, z = model.alphas_cumprod, latents
    for timestep, following in ((500, abar[0]), (0, torch.tensor(1.0))):
        epsilon = model.epsilon(z, timestep, torch.tensor([1]), guidance_scale=3.0).detach()
        clean = (z - (1 - abar[timestep]).sqrt() * epsilon) / abar[timestep].sqrt()
        z = following.sqrt() * clean + (1 - following).sqrt() * epsilon
    torch.testing.assert_close(result, z, rtol=1e-4, atol=1e-4)


def test_default_guidance_and_no_guidance():
    pipeline = tiny_pipeline()
    assert torch.equal(sample(pipeline, "cat"), sample(pipeline, "cat", guidance_scale=2.0))
    assert not torch.equal(sample(pipeline, "cat"), sample(pipeline, "cat", guidance_scale=1.0))
    assert not torch.equal(sample(pipeline, "cat"), sample(pipeline))
    assert sample(pipeline, num_images_per_label=3).shape == (3, 3, 8, 8)
    conditional = tiny_pipeline(class_embedding=True)
    assert sample(conditional, "cat", guidance_scale=0.0).shape == (1, 3, 8, 8)


def test_label_conditioning_classifier_and_classifier_free_guidance_are_separate_scales():
    """What the call samples is epsilon with the same scales, one pass a step; the published procedure is among them."""
    pipeline = tiny_pipeline(class_embedding=True)
    model, latents, labels = pipeline.energy_model, torch.randn(2, 2, 4, 4), torch.tensor([1, 2])
    found = []
    for scales in (
        {"guidance_scale": 0.0},
        {"guidance_scale": 6.0},  # the published procedure
        {"guidance_scale": 0.0, "classifier_free_scale": 3.0},
        {"guidance_scale": 6.0, "classifier_free_scale": 0.0},
    ):
        result = pipeline(labels, num_inference_steps=1, latents=latents, output_type="latent", **scales).images
        pipeline.scheduler.set_timesteps(1)
        timestep = pipeline.scheduler.timesteps[0]
        with torch.no_grad():
            epsilon = model.epsilon(latents, timestep, labels, **scales)
        expected = pipeline.scheduler.step(epsilon, timestep, latents).prev_sample
        torch.testing.assert_close(result, expected)
        found.append(result)
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])
    with pytest.raises(ValueError, match="guidance_scale=0 with classifier_free_scale=0 would ignore class_labels"):
        pipeline(labels, guidance_scale=0.0, classifier_free_scale=0.0)


def test_classifier_free_guidance():
    pipeline = tiny_pipeline(class_embedding=True)
    images = sample(pipeline, "cat", guidance_scale=0.0, classifier_free_scale=3.0)
    assert not torch.equal(images, sample(pipeline, "cat", guidance_scale=0.0))
    # Without the labels' energy what remains is the classifier's gradient on the null label's energy.
    mixed = sample(pipeline, "cat", classifier_free_scale=0.0, output_type="latent")
    assert not torch.allclose(mixed, sample(pipeline, "cat", output_type="latent"))
    with pytest.raises(ValueError, match=r"classifier_free_scale=2\.0 needs class_labels"):
        sample(tiny_pipeline(), "cat", classifier_free_scale=2.0)
    with pytest.raises(ValueError, match="classifier_free_scale must be finite"):
        sample(pipeline, "cat", classifier_free_scale=float("nan"))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_guided_step_is_one_forward_pass(monkeypatch, scale):
    rows = []
    pipeline = tiny_pipeline(class_embedding=True)
    network = pipeline.energy_model.network

    def counted(latents, *arguments, **options):
        rows.append(len(latents))
        return network(latents, *arguments, **options)

    monkeypatch.setattr(pipeline.energy_model, "network", counted)
    sample(pipeline, ["cat", "dog"], guidance_scale=scale, classifier_free_scale=1.5)
    assert rows == [4, 4, 4]  # 2N rows in each of the three steps


@pytest.mark.parametrize("scales", [{"guidance_scale": 2.0}, {"guidance_scale": 0.0, "classifier_free_scale": 1.5}])
def test_outside_the_interval_a_step_is_unguided_and_half_as_large(monkeypatch, scales):
    pipeline, calls = tiny_pipeline(class_embedding=True), []
    epsilon = pipeline.energy_model.epsilon

    def counted(latents, timestep, labels, **used):
        calls.append((int(timestep), used))
        return epsilon(latents, timestep, labels, **used)

    monkeypatch.setattr(pipeline.energy_model, "epsilon", counted)
    everywhere = sample(pipeline, ["cat", "dog"], **scales)
    assert torch.equal(sample(pipeline, ["cat", "dog"], guidance_interval=(0, 1), **scales), everywhere)
    calls.clear()
    network, rows = pipeline.energy_model.network, []
    monkeypatch.setattr(
        pipeline.energy_model, "network", lambda latents, *rest: rows.append(len(latents)) or network(latents, *rest)
    )
    assert not torch.equal(sample(pipeline, ["cat", "dog"], guidance_interval=(0.3, 0.6), **scales), everywhere)
    unguided, full = {"guidance_scale": 0.0, "classifier_free_scale": 1.0}, {"classifier_free_scale": 1.0} | scales
    assert calls == [(666, unguided), (333, full), (0, unguided)]
    assert rows == [2, 4, 2]


def test_outside_the_interval_a_network_without_class_embedding_sees_no_label():
    pipeline = tiny_pipeline()
    never = sample(pipeline, "cat", guidance_interval=(1.0, 1.0))
    torch.testing.assert_close(never, sample(pipeline))
    for wrong in ((0.6, 0.3), (-0.1, 1.0), (0.0, 1.1), (0.5,)):
        with pytest.raises(ValueError, match="guidance_interval must be two shares"):
            sample(pipeline, "cat", guidance_interval=wrong)


def test_images_are_decoded_in_slices(monkeypatch):
    pipeline, sizes = tiny_pipeline(), []
    whole = sample(pipeline, "cat", num_images_per_label=5)
    decode = pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    monkeypatch.setattr(energy_pipeline, "PIXELS_AT_ONCE", 2 * 8 * 8)
    torch.testing.assert_close(sample(pipeline, "cat", num_images_per_label=5), whole)
    assert sizes == [2, 2, 1]


def test_compiled_epsilon_samples_the_same():
    """As the README says to compile it; without graph breaks, traced operations only, for speed of this test."""
    pipeline = tiny_pipeline()
    expected = sample(pipeline, ["cat", "dog"])
    pipeline.energy_model.epsilon = torch.compile(pipeline.energy_model.epsilon, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(sample(pipeline, ["cat", "dog"]), expected, atol=1e-4, rtol=0)


def test_channels_last_samples_the_same():
    pipeline = tiny_pipeline()
    expected = sample(pipeline, ["cat", "dog"])
    pipeline.energy_model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(sample(pipeline, ["cat", "dog"]), expected, atol=1e-4, rtol=0)


def test_output_types():
    pipeline = tiny_pipeline()
    (image,) = sample(pipeline, "cat", output_type="pil")
    assert image.size == (8, 8)
    assert sample(pipeline, "cat", output_type="np").shape == (1, 8, 8, 3)
    assert sample(pipeline, "cat", output_type="latent").shape == (1, 2, 4, 4)
    assert isinstance(pipeline("cat", num_inference_steps=1, return_dict=False), tuple)


def test_callback_sees_and_may_replace_the_latents():
    seen = []

    def callback(pipeline, step, timestep, values):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else {}

    latents = sample(tiny_pipeline(), "cat", callback_on_step_end=callback, output_type="latent")
    assert seen == [(0, 666), (1, 333), (2, 0)]
    assert latents.abs().sum() == 0


def test_unlabelled_model_samples():
    pipeline = tiny_pipeline(num_classes=None, energy_channels=4)
    assert sample(pipeline, num_images_per_label=2).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="without classes"):
        pipeline("cat")
    with pytest.raises(ValueError, match="without classes"):
        pipeline.classify(gradient_image())


def test_half_precision_pipeline():
    pipeline = tiny_pipeline()
    expected = sample(pipeline, "cat")
    pipeline.to(dtype=torch.bfloat16)
    images = sample(pipeline, "cat")
    assert (images - expected).abs().mean() < 0.1
    assert pipeline.classify(gradient_image()).logits.dtype == torch.float32


# --- classification ------------------------------------------------------------------------------------------------


def test_classification_is_one_forward_pass_at_timestep_zero():
    pipeline = tiny_pipeline()
    pixel_values = preprocess_images(gradient_image(), 8)
    output = pipeline.classify(gradient_image(), top_k=3)
    with torch.no_grad():
        mean = pipeline.vae.encode(pixel_values).latent_dist.mode() * pipeline.vae.config.scaling_factor
        expected = pipeline.energy_model(mean, 0)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.energy, expected.energy)
    torch.testing.assert_close(output.probabilities, expected.logits.softmax(dim=1))
    names = pipeline.id2label
    assert output.labels == [[names[i] for i in expected.logits[0].argsort(descending=True).tolist()]]


def test_image_types_mean_the_same():
    image = gradient_image(8, 8)
    array = np.asarray(image)
    tensor = torch.from_numpy(array / 255.0).float().permute(2, 0, 1)
    expected = preprocess_images(image, 8)
    assert expected.shape == (1, 3, 8, 8)
    for same in (
        array,
        array / 255.0,
        array[None],
        [array],
        tensor,
        tensor[None],
        [tensor],
        [image],
        image.convert("RGBA"),
    ):
        torch.testing.assert_close(preprocess_images(same, 8).float(), expected, atol=1e-6, rtol=0)


def test_larger_images_are_resized_and_cropped_alike():
    image = gradient_image(64, 40)
    from_pil = preprocess_images(image, 8)
    from_array = preprocess_images(np.asarray(image), 8)
    assert (from_pil - from_array).abs().max() < 0.25  # two libraries' filters and roundings of the crop
    assert preprocess_images([gradient_image(20, 12), gradient_image(9, 30)], 8).shape == (2, 3, 8, 8)


def test_tensors_stay_differentiable():
    pixels = torch.rand(1, 3, 10, 12, requires_grad=True)
    pipeline = tiny_pipeline()
    logits = pipeline.energy_model(pipeline.encode(preprocess_images(pixels, 8)), 0).logits
    assert torch.autograd.grad(logits[0, 0], pixels)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 1, 8, 8), "3 channels"),
        (np.zeros((8, 8)), "3 channels"),
        (torch.full((3, 8, 8), 2.0), r"\[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), r"\[0, 1\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8 or floats"),
        ([], "at least one"),
        (["cat.png"], "got str"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline().classify(images)


def test_bad_top_k():
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=r"top_k must be in \[1, 3\]"):
            tiny_pipeline().classify(gradient_image(), top_k=top_k)


# --- construction, saving and loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", [tiny_kl, tiny_taesd, tiny_dc, tiny_qwen, lambda: None])
def test_save_and_load_in_a_new_process(tmp_path, vae):
    vae = vae()
    model = tiny_unet(in_channels=2 if vae is not None else 3).eval()
    pipeline = EGCPipeline(model, vae, default_scheduler(model), {0: "cat", 1: "dog", 2: "cow"}, 1.5)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "pipeline")
    output = pipeline.classify(gradient_image())
    expected = {"images": sample(pipeline, ["cat", "cow"]), "logits": output.logits, "energy": output.energy}
    script = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from tiny import gradient_image, sample
from latent_egc import EGCPipeline, EGCUNet
pipeline = EGCPipeline.from_pretrained(sys.argv[1] + "/pipeline")
assert type(pipeline.energy_model) is EGCUNet and pipeline.config.default_guidance_scale == 1.5
assert pipeline.id2label == {0: "cat", 1: "dog", 2: "cow"}
output = pipeline.classify(gradient_image())
values = {"images": sample(pipeline, ["cat", "cow"]), "logits": output.logits, "energy": output.energy}
torch.save(values, sys.argv[1] + "/values.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(ROOT / "tests")], check=True)
    loaded = torch.load(tmp_path / "values.pt")
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name


def test_truncated_weights_are_an_error(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "energy_model" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)safetensors|header|weights|load"):
        EGCPipeline.from_pretrained(tmp_path)


def test_schedulers_on_another_noise_schedule_are_refused():
    model = tiny_unet()
    for scheduler in (
        DDIMScheduler(),
        DDIMScheduler.from_config(default_scheduler(model).config, prediction_type="v_prediction"),
        DDIMScheduler.from_config(default_scheduler(model).config, num_train_timesteps=100),
        FlowMatchEulerDiscreteScheduler(),
    ):
        with pytest.raises(ValueError, match=r"noise schedule|prediction_type|flow matching"):
            EGCPipeline(model, None, scheduler)
    pipeline = tiny_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has another noise schedule"):
        pipeline("cat", num_inference_steps=1)


def test_default_scheduler_ends_on_clean_latents():
    config = default_scheduler(tiny_unet()).config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, True, 0)


def test_bad_names_and_scale():
    model = tiny_unet()
    with pytest.raises(ValueError, match="id2label"):
        EGCPipeline(model, None, default_scheduler(model), {0: "cat"})
    with pytest.raises(ValueError, match="default_guidance_scale"):
        EGCPipeline(model, None, default_scheduler(model), default_guidance_scale=0.5)
    with pytest.raises(ValueError, match="default_num_inference_steps must be at least 1, got 0"):
        EGCPipeline(model, None, default_scheduler(model), default_num_inference_steps=0)
    assert EGCPipeline(model, None, default_scheduler(model)).id2label == {0: "0", 1: "1", 2: "2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": ["zebra"]}, "unknown class name 'zebra' in class_labels; the names are cat, dog, cow"),
        ({"class_labels": "dogg"}, "did you mean 'dog'"),
        ({"class_labels": [3]}, r"ids in \[0, 3\), got 3"),
        ({"class_labels": [-1]}, r"ids in \[0, 3\), got -1"),
        ({"class_labels": []}, "empty"),
        ({"num_inference_steps": -5}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 2000}, r"\[1, 1000\], got 2000"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
        ({"guidance_scale": 0.0}, "would ignore class_labels"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"class_labels": None, "guidance_scale": 2.0}, "needs class_labels"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "generator"),
        ({"latents": torch.full((1, 2, 4, 4), float("nan"))}, "latents must be finite"),
        ({"latents": torch.zeros(2, 2, 4, 4)}, r"latents must be \(1, C, h, w\)"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"\(N, 2, h, w\)"),
        ({"output_type": "jpeg"}, "output_type"),
    ],
)
def test_bad_calls_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**({"class_labels": "cat", "num_inference_steps": 1} | arguments))


def test_model_class_is_found_by_name():
    assert EGCPipeline._optional_components == ["vae"]
    assert issubclass(type(tiny_pipeline().energy_model), EGCUNet)


def test_weights_at_odd_addresses_are_moved_to_even_ones():
    """As a file is mapped: where a weight begins decides which kernel runs, and so how sums are rounded."""
    pipeline = tiny_pipeline()
    for module in (pipeline.energy_model, pipeline.vae):
        for parameter in module.parameters():
            storage = torch.empty(parameter.numel() + 32)
            first = next(i for i in range(1, 17) if (storage.data_ptr() + 4 * i) % 64 == 4)
            parameter.data = storage[first : first + parameter.numel()].view_as(parameter).copy_(parameter.data)
    expected = {name: weight.clone() for name, weight in pipeline.energy_model.state_dict().items()}
    loaded = EGCPipeline(**pipeline.components)
    for module in (loaded.energy_model, loaded.vae):
        assert all(parameter.data_ptr() % 64 == 0 for parameter in module.parameters())
    for name, weight in loaded.energy_model.state_dict().items():
        assert torch.equal(weight, expected[name])
