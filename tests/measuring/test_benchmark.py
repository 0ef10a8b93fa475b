"""The benchmark: both sides do the same job, and a number is what it is called. No time is held against a limit."""

import dataclasses
import functools
import json
import math
import re

import pytest
import torch
import yaml
from tiny import tiny_kl

from latent_egc.commands import main
from latent_egc.config import ConfigError, parse_config
from latent_egc.measuring import benchmark as benchmark_module
from latent_egc.measuring.benchmark import benchmark, sampling_pairs, variant_pairs
from latent_egc.measuring.benchmark_steps import (
    attention_step,
    chunked_step,
    classification,
    classifier_free_step,
    denoising_step,
    full_step,
    guided_step,
    make_workload,
    noise_prediction_step,
    plain_forward,
    published_kernels,
    published_step,
    two_pass_guided_step,
    with_checkpointing,
)
from latent_egc.measuring.timing import Pair, Side, distinct_sides, measure, peak_memory_of, seconds_of
from latent_egc.models import attention

CPU = torch.device("cpu")
MODELS = {
    "unet": {"block_out_channels": [8, 16], "layers_per_block": 1, "attention_levels": [1], "norm_num_groups": 4},
    "transformer": {"width": 16, "num_layers": 3, "num_attention_heads": 2, "long_skips": True},
}
ROWS = [
    ("energy training step, denoising part", "noise-prediction training step", 2.0),
    ("energy training step, full", "noise-prediction training step", 3.0),
    ("full step, float32", "step as published, float32", 0.75),
    ("full step, bf16", "step as published, float32", None),
    ("full step, class embedding", "step as published, class embedding", None),
    ("full step, class embedding, dropped", "step as published, class embedding", None),
    ("guided sampling step, class embedding", "guidance in two passes, class embedding", 1.0),
    ("guided sampling step, class embedding", "classifier-free guidance, noise prediction", 2.0),
    ("full step, compiled", "full step, eager", None),
    ("full step, checkpointed", "full step, eager", None),
    ("full step, chunked attention", "full step, math attention", None),
    ("chunked attention, 16 tokens", "math attention, 16 tokens", None),
    ("chunked attention, 32 tokens", "math attention, 32 tokens", None),
    ("guided sampling step", "classifier-free guidance, noise prediction", 1.0),
    ("guided sampling step", "guidance in two passes, as published", 0.5),
    ("guided sampling step, compiled", "guided sampling step", None),
    ("guided sampling step, channels last", "guided sampling step", None),
    ("classification", "plain forward pass", 1.0),
    ("encoding 2 images of 8 px, AutoencoderKL", None, None),
]


def config_values(backbone="unet", autoencoder=None, mixed_precision="no", **model):
    shape = {"backbone": backbone, "sample_size": 4, "in_channels": 2, "num_classes": 3}
    return {
        "model": shape | MODELS[backbone] | model,
        "autoencoder": {"path": autoencoder},
        "data": {"image_size": 8},
        "objective": {"classification_weight": 0.5, "label_smoothing": 0.1},
        "training": {"train_batch_size": 2, "mixed_precision": mixed_precision},
    }


def double_workload(backbone, head, class_embedding):
    """A workload in float64."""
    work = make_workload(parse_config(config_values(backbone, head=head)), CPU, class_embedding)
    work.model.double(), work.noise_predictor.double()
    tensors = {name: value for name, value in vars(work).items() if torch.is_tensor(value)}
    doubled = {name: value.double() for name, value in tensors.items() if value.is_floating_point()}
    alpha, sigma = (level[:, None, None, None] for level in work.model.noise_levels(work.timesteps))
    doubled["noisy_latents"] = alpha * doubled["latents"] + sigma * doubled["noise"]  # without float32's rounding
    return dataclasses.replace(work, **doubled)


@pytest.fixture(params=[(backbone, head) for backbone in MODELS for head in ("map", "inner")], ids="-".join)
def work(request):
    """Without a class embedding."""
    return double_workload(*request.param, class_embedding=False)


@pytest.fixture(params=[(backbone, head) for backbone in MODELS for head in ("map", "inner")], ids="-".join)
def embedded_work(request):
    """With one."""
    return double_workload(*request.param, class_embedding=True)


def assert_same_gradients(found, expected):
    """All parameters together, relative to the norm."""
    found, expected = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (found, expected))
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-8 * expected.norm()


# --- both sides do the same job -------------------------------------------------------------------------------------


def test_step_as_published_has_the_objectives_gradients(work):
    assert_same_gradients(published_step(work), full_step(work, work.objective))


def test_both_steps_with_a_class_embedding_have_the_same_gradients_and_guidance(embedded_work):
    work = embedded_work
    assert_same_gradients(published_step(work), full_step(work, work.objective))
    torch.testing.assert_close(two_pass_guided_step(work), guided_step(work, work.model.epsilon))


def test_denoising_part_has_the_gradients_of_the_objectives_denoising_loss(work):
    losses = work.objective(
        work.latents, work.class_labels, work.clean_latents, noise=work.noise, timesteps=work.timesteps
    )
    expected = torch.autograd.grad(losses.denoising_loss, tuple(work.model.parameters()))
    assert_same_gradients(denoising_step(work), expected)


def test_compiled_sides_compute_what_the_eager_ones_do(monkeypatch):
    """Traced without generating code, which is the compiler's own business."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    work = make_workload(parse_config(config_values("transformer", num_layers=1, long_skips=False)), CPU)
    pairs = [*variant_pairs(work), *sampling_pairs(work)]
    compiled = [pair for pair in pairs if "compiled" in pair.side.name]
    assert [pair.side.name for pair in compiled] == ["full step, compiled", "guided sampling step, compiled"]
    for pair in compiled:
        torch.testing.assert_close(pair.side.step(), pair.reference.step(), rtol=1e-4, atol=1e-6)
    for side in distinct_sides(pairs):
        side.step()
    with torch._dynamo.config.patch(error_on_recompile=True):  # else compiling would be timed among the turns
        for pair in compiled:
            pair.side.step()


def test_noise_predictor_has_the_energys_trunk(work):
    energy, noise = (
        {
            name: p.shape
            for name, p in model.named_parameters()
            if not name.startswith(("conv_out", "proj_out.", "class_out"))
        }
        for model in (work.model, work.noise_predictor)
    )
    assert energy == noise
    assert plain_forward(work).shape == work.latents.shape
    assert all(gradient.isfinite().all() for gradient in noise_prediction_step(work))


def test_checkpointed_step_has_the_gradients_of_the_plain_one(work):
    checkpointed = with_checkpointing(work)
    assert checkpointed.model.gradient_checkpointing
    assert not work.model.gradient_checkpointing
    assert_same_gradients(full_step(checkpointed, checkpointed.objective), full_step(work, work.objective))


def test_chunked_step_has_the_gradients_of_the_plain_one_and_leaves_no_trace(work):
    usual = attention.CHUNKED_FROM_TOKENS
    assert_same_gradients(chunked_step(work, 1), full_step(work, work.objective))
    assert usual == attention.CHUNKED_FROM_TOKENS


def test_two_pass_guidance_is_the_guided_epsilon(work):
    expected = guided_step(work, work.model.epsilon)
    unguided = work.model.epsilon(work.noisy_latents, work.timesteps)
    assert (expected - unguided).norm() > 1e-4 * expected.norm()
    torch.testing.assert_close(two_pass_guided_step(work), expected, rtol=1e-8, atol=1e-10)


def test_classifier_free_guidance_without_a_difference_is_the_noise_prediction(work):
    """The trunk has no class embedding, so both halves of the 2N rows are alike."""
    expected, _ = work.noise_predictor.network(work.noisy_latents, work.timesteps, None)
    torch.testing.assert_close(classifier_free_step(work), expected)


def test_classification_is_the_models(work):
    torch.testing.assert_close(classification(work), work.model(work.latents, 0).logits)


def test_attention_alone_is_differentiated_twice_by_both_kernels():
    query, key, value = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64).requires_grad_().unbind()
    found = attention_step(attention.chunked_attention, query, key, value)
    expected = attention_step(attention.math_attention, query, key, value)
    assert_same_gradients(found, expected)


def test_published_kernels_are_local():
    def settings():
        fused = torch.backends.cuda.flash_sdp_enabled()
        tf32 = torch.backends.cudnn.allow_tf32
        return fused, tf32, torch.backends.cudnn.enabled, attention.CHUNKED_FROM_TOKENS

    usual = settings()
    with published_kernels():
        assert settings() == (False, False, True, math.inf)
    assert settings() == usual


@pytest.mark.parametrize("backbone", MODELS)
def test_no_layer_of_the_networks_is_zero(backbone):
    """A fresh network's zeros would leave whole paths without work for the second backward pass."""
    work = make_workload(parse_config(config_values(backbone)), CPU)
    assert all(parameter.any() for model in (work.model, work.noise_predictor) for parameter in model.parameters())


# --- measuring ------------------------------------------------------------------------------------------------------


def test_sides_take_turns_and_are_measured_once():
    calls = []
    first, second = (Side(name, functools.partial(calls.append, name)) for name in "ab")
    measure("test", [Pair(first, second), Pair(second)], CPU, repeats=3)
    assert calls == ["a", "a", "b", "b"] + 3 * ["a", "b"] + ["a", "b"]  # warm-up, in turns, memory
    assert len(first.seconds) == len(second.seconds) == 3


def test_ratio_is_that_of_the_medians():
    side = Side("side", print, units=9, seconds=[6.0, 1.0, 100.0])
    reference = Side("reference", print, units=3, seconds=[5.0, 3.0, 4.0])
    assert Pair(side, reference).ratio == 1.5
    assert Pair(side, reference).limit == 3.0
    assert Pair(side).ratio is None
    assert reference.to_dict()["lower_quartile_seconds"] == 3.5
    assert reference.to_dict()["upper_quartile_seconds"] == 4.5


def test_a_side_that_fails_keeps_the_reason_and_the_others_go_on():
    def fail():
        raise torch.OutOfMemoryError("no memory\nat all")

    failing, other = Side("failing", fail), Side("other", int)
    pair = Pair(failing, other)
    measure("test", [pair], CPU, repeats=2)
    assert failing.failure == "OutOfMemoryError: no memory"
    assert pair.ratio is None
    assert len(other.seconds) == 2
    assert pair.to_dict()["side"]["median_seconds"] is None


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_peak_memory_of_known_allocations(device):
    before = torch.zeros(2**20, device=device)  # float32: 4 MiB, a multiple of what CUDA's allocator rounds to

    def step():
        first = before.neg()  # 4 MiB held
        second = first.neg()  # 8
        del first  # 4
        twice = torch.cat([second, second])  # 12
        return twice.neg()  # 20

    assert peak_memory_of(step, torch.device(device)) == 20 * 2**20
    assert seconds_of(step, torch.device(device)) > 0


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Small attention, and no compiler: it alone would take a minute for the tiny U-Net."""
    monkeypatch.setattr(benchmark_module, "ATTENTION_TOKENS", (16, 32))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("quick")
def test_every_row_is_measured_printed_and_written(tmp_path, capsys):
    tiny_kl().save_pretrained(tmp_path / "vae")
    values = config_values(autoencoder=str(tmp_path / "vae"), mixed_precision="bf16")
    values["data"] |= {"num_workers": 1, "latent_cache": str(tmp_path / "cache")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    output = tmp_path / "new" / "benchmark.json"
    assert (
        main(["benchmark", str(tmp_path / "config.yaml"), "--repeats", "1", "--device", "cpu", "--output", str(output)])
        == 0
    )

    report = json.loads(output.read_text())
    names = [
        (row["side"]["name"], row["reference"] and row["reference"]["name"], row["limit"]) for row in report["rows"]
    ]
    assert names == ROWS
    for row in report["rows"]:
        for side in (row["side"], row["reference"] or row["side"]):
            assert side["failure"] is None
            assert 0 < side["lower_quartile_seconds"] == side["median_seconds"] == side["upper_quartile_seconds"]
            assert side["peak_bytes"] > 0
        if row["reference"] is not None:
            assert row["ratio"] == row["side"]["median_seconds"] / row["reference"]["median_seconds"]
    settings = report["settings"]
    assert settings["torch"] == torch.__version__
    assert settings["num_threads"] == torch.get_num_threads()
    assert settings["latents"] == [2, 2, 4, 4]
    assert settings["mixed_precision"] == "bf16"
    assert settings["autoencoder"] == "AutoencoderKL"
    assert settings["repeats"] == 1

    out = capsys.readouterr().out
    table = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")][2:]
    assert [(cells[0].strip(), cells[3].strip()) for cells in table] == [(name, other or "") for name, other, _ in ROWS]
    assert settings["device"] in out
    encoding, loading = report["notes"]
    assert re.fullmatch(
        r"encoding, from photographs, 1 workers: [\d.]+ views a second, [\d.]+ of the autoencoder's own [\d.]+",
        encoding,
    )
    assert re.fullmatch(
        r"loading, from a latent cache, 1 workers: [\d.]+ samples a second; the full step consumes [\d.]+", loading
    )
    assert encoding in out


def test_groups_of_rows_may_be_chosen():
    report = benchmark(parse_config(config_values()), repeats=1, groups=["classification"])
    assert [pair.side.name for pair in report.pairs] == ["classification"]
    with pytest.raises(ValueError, match=r"groups must be of training step, .*, got speed"):
        benchmark(parse_config(config_values()), groups=["speed"])


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_measured_is_said():
    """A transformer has no convolutions to store channels last, pixels need no encoder, bf16 is slow on most CPUs."""
    report = benchmark(parse_config(config_values("transformer", in_channels=3)), repeats=1)
    left_out = ("channels last", "bf16", "encoding")
    assert [pair.side.name for pair in report.pairs] == [
        name for name, _, _ in ROWS if not any(word in name for word in left_out)
    ]
    assert [note.split(":")[0] for note in report.notes] == [
        "full step, bf16",
        "encoding",
        "loading, from photographs, 0 workers",
    ]
    assert all(note in str(report) for note in report.notes)


def test_errors():
    config = parse_config(config_values())
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'meta'"):
        benchmark(config, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):
            benchmark(config, device="cuda")
    with pytest.raises(ConfigError, match="num_classes must be set"):
        benchmark(parse_config(config_values(num_classes=None, energy_channels=3)))
