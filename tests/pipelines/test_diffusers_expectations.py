"""What a diffusers user takes for granted of a pipeline and a model; after diffusers' own common tests (v0.40.0)."""

import copy
import threading

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from tiny import TINY_BACKBONES, generator, gradient_image, sample, tiny_kl, tiny_pipeline, tiny_transformer, tiny_unet

from latent_egc import EGCPipeline
from latent_egc.pipelines import energy_pipeline
from latent_egc.pipelines.schedulers import default_scheduler


def transformer_pipeline(**overrides):
    model = tiny_transformer(**overrides).eval()
    pipeline = EGCPipeline(model, tiny_kl(), default_scheduler(model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES = {"unet": tiny_pipeline, "transformer": transformer_pipeline}

# --- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_threads_sample_what_serial_calls_do_to_the_bit(scheduler):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    calls = [
        {"class_labels": "cat", "num_inference_steps": 6, "guidance_scale": 1.0},
        {"class_labels": "dog", "num_inference_steps": 9, "guidance_scale": 4.0},
    ]
    expected = [sample(pipeline, **call) for call in calls]
    found, barrier = [None, None], threading.Barrier(2)

    def run(i):
        def together(pipeline, step, timestep, values):
            if step < 6:  # each step of one beside one of the other
                barrier.wait(timeout=60)
            return {}

        found[i] = sample(pipeline, **calls[i], callback_on_step_end=together)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_call_leaves_the_scheduler_as_it_was():
    pipeline = tiny_pipeline()
    before = copy.deepcopy(vars(pipeline.scheduler))
    sample(pipeline, "cat", num_inference_steps=5)
    assert pipeline.num_timesteps == 5
    assert str(vars(pipeline.scheduler)) == str(before)


# --- batches -------------------------------------------------------------------------------------------------------


def rows_seen(pipeline, monkeypatch):
    """Collects how many rows each pass of the network has."""
    rows, network = [], pipeline.energy_model.network
    monkeypatch.setattr(
        pipeline.energy_model, "network", lambda latents, *rest: rows.append(len(latents)) or network(latents, *rest)
    )
    return rows


def test_classification_in_batches_is_the_same(monkeypatch):
    pipeline = tiny_pipeline()
    images = torch.rand(5, 3, 8, 8, generator=generator())
    whole = pipeline.classify(images, top_k=2)
    rows = rows_seen(pipeline, monkeypatch)
    for given in (images, list(images), [images[:3], images[3:]]):
        output = pipeline.classify(given, top_k=2, batch_size=2)
        assert output.labels == whole.labels
        torch.testing.assert_close(output.logits, whole.logits)
        torch.testing.assert_close(output.energy, whole.energy)
    assert rows == 3 * [2, 2, 1]
    rows.clear()
    monkeypatch.setattr(energy_pipeline, "LATENTS_AT_ONCE", 3 * 4 * 4)
    pipeline.classify(images)
    monkeypatch.setattr(energy_pipeline, "PIXELS_AT_ONCE", 2 * 8 * 8)
    pipeline.classify(images)
    assert rows == [3, 2, 2, 2, 1]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, UniPCMultistepScheduler, DDPMScheduler])
def test_sampling_in_batches_is_the_same(scheduler, monkeypatch):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    labels, generators = ["cat", "dog", "cow"], lambda: [generator(i) for i in range(3)]
    whole = sample(pipeline, labels, generator=generators())
    rows = rows_seen(pipeline, monkeypatch)
    found = sample(pipeline, labels, generator=generators(), batch_size=2)
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)
    monkeypatch.setattr(energy_pipeline, "LATENTS_AT_ONCE", 4 * 4)
    torch.testing.assert_close(sample(pipeline, labels, generator=generators()), whole, atol=1e-4, rtol=0)
    assert rows == 3 * [2] + 3 * [1] + 9 * [1]


def test_bad_batch_sizes_are_named():
    for batch_size in (0, -1, 1.5):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            sample(tiny_pipeline(), "cat", batch_size=batch_size)
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            tiny_pipeline().classify(gradient_image(), batch_size=batch_size)


# --- offloading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
@pytest.mark.parametrize("variant", [{}, {"head": "inner", "class_embedding": True}], ids=str)
def test_sequential_offload_samples_and_classifies_the_same(make, variant):
    pipeline, images = make(**variant), [gradient_image()]
    expected, output = sample(pipeline, 1), pipeline.classify(images)
    for module in (pipeline.energy_model, pipeline.vae):
        # As diffusers' enable_sequential_cpu_offload does it, which on a CPU asks accelerate for a device "cpu:0".
        cpu_offload(module, torch.device("cpu"))
    assert pipeline.energy_model.device.type == "meta"
    for _ in range(2):
        torch.testing.assert_close(sample(pipeline, 1), expected)
        torch.testing.assert_close(pipeline.classify(images).energy, output.energy)
    assert pipeline.energy_model.alphas_cumprod.device.type == "cpu"


def test_model_offload_samples_and_classifies_the_same():
    """On the CPU nothing moves; that sampling runs the hooks, which move the network elsewhere, is counted."""
    pipeline, images = tiny_pipeline(), [gradient_image()]
    expected, output = sample(pipeline, 1), pipeline.classify(images)
    pipeline.enable_model_cpu_offload(device="cpu")
    moved, hook = [], pipeline.energy_model._hf_hook
    before_forward = hook.pre_forward
    hook.pre_forward = lambda module, *rest, **options: moved.append(module) or before_forward(module, *rest, **options)
    torch.testing.assert_close(sample(pipeline, 1, num_inference_steps=3), expected)
    assert moved == 3 * [pipeline.energy_model]
    torch.testing.assert_close(pipeline.classify(images).logits, output.logits)


@pytest.mark.parametrize("make", TINY_BACKBONES.values(), ids=TINY_BACKBONES)
def test_what_would_move_or_cast_weights_too_early_is_refused_by_name(make):
    model = make()
    with pytest.raises(ValueError, match="does not support layerwise casting"):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="group offloading"):
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="no attention backend of its own, got 'flash'"):
        model.set_attention_backend("flash")


def test_the_attention_backend_of_a_context_is_used_where_a_pass_is_differentiated_once(monkeypatch):
    model, latents, calls = tiny_transformer().double(), torch.randn(2, 2, 4, 4, dtype=torch.float64), []
    math = AttentionBackendName._NATIVE_MATH
    kernel = _AttentionBackendRegistry._backends[math]
    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, lambda **kw: calls.append(1) or kernel(**kw))
    plain = model.epsilon(latents, 3).detach()
    with torch.no_grad(), attention_backend("_native_math"):
        named = model.epsilon(latents, 3)
    assert len(calls) == model.config.num_layers
    torch.testing.assert_close(named, plain, rtol=0, atol=1e-12)
    with attention_backend("_native_math"):
        model.epsilon(latents, 3)  # with a graph: twice differentiable
    assert len(calls) == model.config.num_layers


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TINY_BACKBONES.values(), ids=TINY_BACKBONES)
@pytest.mark.parametrize("variant", [{}, {"class_embedding": True}, {"num_classes": None, "head": "inner"}], ids=str)
def test_return_dict(make, variant):
    model, latents = make(**variant), torch.randn(2, 2, 4, 4)
    labels = torch.tensor([0, 1]) if variant.get("class_embedding") else None
    output, as_tuple = model(latents, 3, labels), model(latents, 3, labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == (1 if output.logits is None else 2)
    assert torch.equal(as_tuple[0], output.energy)


@pytest.mark.parametrize("make", TINY_BACKBONES.values(), ids=TINY_BACKBONES)
def test_what_adapters_placement_and_compilation_ask_a_model_for(make):
    model = make()
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) | set(model._repeated_blocks) <= classes
    with pytest.raises(ValueError, match=r"No adapter loaded|PEFT is not installed"):
        model.set_adapter("style")


def test_compiling_the_network_compiles_sampling():
    pipeline = tiny_pipeline()
    expected = sample(pipeline, ["cat", "dog"])
    passes = []

    def backend(graph, inputs):
        passes.append(graph)
        return graph.forward

    pipeline.energy_model.compile(backend=backend)
    torch.testing.assert_close(sample(pipeline, ["cat", "dog"]), expected, atol=1e-4, rtol=0)
    assert passes


# --- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [np.int64(2), np.array(2), np.array([2]), torch.tensor(2), [np.int32(2)], [[2]], [["cow"]], [torch.tensor(2)]],
)
def test_a_label_in_any_dress(labels):
    pipeline = tiny_pipeline()
    assert pipeline.label_ids(labels).tolist() == [2]
    assert torch.equal(sample(pipeline, labels), sample(pipeline, "cow"))


def test_label_lists():
    pipeline = tiny_pipeline()
    for labels in (np.array([2, 0]), [np.int64(2), "cat"], [[2], [0]], ("cow", 0), np.array(["cow", "cat"])):
        assert pipeline.label_ids(labels).tolist() == [2, 0]
    for labels in ([[0, 1], [2]], 1.0, np.array([0.5]), True, np.array([True]), np.array([]), [None]):
        with pytest.raises(ValueError, match="class_labels"):
            pipeline.label_ids(labels)


# --- arguments of the call -----------------------------------------------------------------------------------------


def test_timesteps_sigmas_and_eta_go_to_schedulers_that_take_them():
    pipeline = tiny_pipeline()
    quiet = sample(pipeline, "cat")
    assert not torch.equal(sample(pipeline, "cat", eta=1.0), quiet)
    with pytest.raises(ValueError, match="DDIMScheduler takes no timesteps"):
        sample(pipeline, "cat", timesteps=[900, 500, 10])
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    seen = []
    sample(pipeline, "cat", timesteps=[900, 500, 10], callback_on_step_end=lambda p, i, t, v: seen.append(int(t)))
    assert seen == [900, 500, 10]
    assert pipeline.num_timesteps == 3
    with pytest.raises(ValueError, match=r"DDPMScheduler takes no eta, got 0\.5"):
        sample(pipeline, "cat", eta=0.5)
    with pytest.raises(ValueError, match="timesteps and sigmas exclude each other"):
        sample(pipeline, "cat", timesteps=[900], sigmas=[1.0])
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    own = sample(pipeline, "cat", sigmas=[5.0, 1.0, 0.1, 0.0])
    assert pipeline.num_timesteps == 3
    assert not torch.equal(own, sample(pipeline, "cat"))


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_other_heights_and_widths(make):
    pipeline = make()
    assert sample(pipeline, 1, height=16, width=24).shape == (1, 3, 16, 24)
    assert sample(pipeline, 1, width=12, output_type="pil")[0].size == (12, 8)
    assert torch.equal(sample(pipeline, 1, height=8, width=8), sample(pipeline, 1))
    for size in (10, 0, 8.0):
        with pytest.raises(ValueError, match=f"height must be a positive multiple of 4, got {size}"):
            sample(pipeline, 1, height=size)
    with pytest.raises(ValueError, match="height and width belong to latents of"):
        sample(pipeline, 1, height=16, latents=torch.zeros(1, 2, 4, 4))


def test_callbacks_get_what_they_ask_for():
    pipeline = tiny_pipeline()
    seen = []
    arguments = {"callback_on_step_end": lambda p, i, t, values: seen.append(set(values))}
    sample(pipeline, "cat", **arguments, callback_on_step_end_tensor_inputs=[])
    sample(pipeline, "cat", **arguments, callback_on_step_end_tensor_inputs=pipeline._callback_tensor_inputs)
    assert seen == 3 * [set()] + 3 * [{"latents"}]
    with pytest.raises(ValueError, match=r"must be of \['latents'\], got \['prompt_embeds'\]"):
        sample(pipeline, "cat", **arguments, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_callback_changes_the_scale_and_stops_a_call():
    pipeline = tiny_pipeline()

    def raise_scale(pipeline, step, timestep, values):
        pipeline._guidance_scale += 1.0
        return values

    first = sample(pipeline, "cat", guidance_scale=1.0)
    assert (pipeline.guidance_scale, pipeline.num_timesteps, pipeline.interrupt) == (1.0, 3, False)
    assert not torch.equal(sample(pipeline, "cat", guidance_scale=1.0, callback_on_step_end=raise_scale), first)
    assert pipeline.guidance_scale == 1.0 + pipeline.num_timesteps
    assert torch.equal(sample(pipeline, "cat", guidance_scale=1.0), first)
    arguments = {"generator": [generator(0), generator(1)], "callback_on_step_end": raise_scale}
    together = sample(pipeline, ["cat", "dog"], **arguments)
    arguments["generator"] = [generator(0), generator(1)]
    torch.testing.assert_close(sample(pipeline, ["cat", "dog"], **arguments, batch_size=1), together, atol=1e-4, rtol=0)

    for of_the_call in (True, False):
        steps = []

        def stop(call, step, timestep, values, of_the_call=of_the_call, steps=steps):
            steps.append(step)
            (call if of_the_call else pipeline)._interrupt = step == 1

        sample(pipeline, ["cat", "dog"], num_inference_steps=5, batch_size=1, callback_on_step_end=stop)
        assert steps == [0, 1]


def test_official_callbacks():
    class Unguided(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            if step_index == self.config.cutoff_step_index:
                pipeline._guidance_scale = 0.0
            return callback_kwargs

    pipeline = tiny_pipeline()
    cutoff = Unguided(cutoff_step_ratio=None, cutoff_step_index=0)
    found = sample(pipeline, "cat", callback_on_step_end=MultiPipelineCallbacks([cutoff]))
    assert not torch.equal(found, sample(pipeline, "cat"))
    assert torch.equal(found, sample(pipeline, "cat", callback_on_step_end=cutoff))


# --- components ----------------------------------------------------------------------------------------------------


def test_pipelines_made_of_a_pipelines_parts_are_that_pipeline():
    pipeline = tiny_pipeline()
    expected = sample(pipeline, "cow")
    for other in (
        EGCPipeline.from_pipe(pipeline),
        EGCPipeline(**pipeline.components),
        EGCPipeline(**pipeline.components, **pipeline.parameters),
    ):
        other.set_progress_bar_config(disable=True)
        assert other.energy_model is pipeline.energy_model
        assert other.vae is pipeline.vae
        assert other.id2label == pipeline.id2label
        assert other.config.default_guidance_scale == 2.0
        assert torch.equal(sample(other, "cow"), expected)
    assert EGCPipeline.from_pipe(pipeline, default_guidance_scale=3.0).config.default_guidance_scale == 3.0


def test_a_loaded_pipeline_takes_parts_from_outside(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    other = EGCPipeline.from_pretrained(tmp_path, energy_model=pipeline.energy_model, vae=None)
    assert other.energy_model is pipeline.energy_model
    assert other.vae is None
    assert isinstance(other, DiffusionPipeline)


def test_a_pipeline_without_its_autoencoder_makes_and_takes_no_images():
    model = tiny_unet(num_classes=3, in_channels=4)
    pipeline = EGCPipeline(model, None, default_scheduler(model))
    pipeline.set_progress_bar_config(disable=True)
    for act in (lambda: sample(pipeline, 1), lambda: pipeline.classify(gradient_image())):
        with pytest.raises(ValueError, match="vae=None, but the energy network's latents have 4 channels"):
            act()
    assert sample(pipeline, 1, output_type="latent").shape == (1, 4, 4, 4)


# --- schedulers ----------------------------------------------------------------------------------------------------


def test_schedulers_are_refused_with_the_reason():
    model = tiny_unet()
    config = default_scheduler(model).config
    for scheduler, reason in (
        (FlowMatchEulerDiscreteScheduler(), "no alphas_cumprod: it is made for flow matching or EDM"),
        (EDMEulerScheduler(), "no alphas_cumprod: it is made for flow matching or EDM"),
        (DPMSolverMultistepScheduler.from_config(config, use_flow_sigmas=True), "use_flow_sigmas=True"),
        (
            DDIMScheduler.from_config(config, rescale_betas_zero_snr=True),
            "rescale_betas_zero_snr=True, the network",
        ),
        (DDIMScheduler.from_config(config, trained_betas=[0.1] * 1000), r"trained_betas=\[.*\], the network has None"),
        (DDIMScheduler.from_config(config, beta_end=0.02), r": beta_end=0\.02, the network has 0\.012; build"),
    ):
        with pytest.raises(ValueError, match=f"^{type(scheduler).__name__} has .*{reason}"):
            EGCPipeline(model, None, scheduler)
