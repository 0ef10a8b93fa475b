"""The training loop: resumable to the bit, the same on any number of processes, and losing nothing when it fails."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import datasets
import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT, tiny_kl, tiny_unet, write_images
from tiny_runs import evaluations, finish, losses, run_config, run_values, start, wait_for_step

from latent_egc import EGCPipeline
from latent_egc.config import ConfigError, TrainingConfig, parse_config
from latent_egc.data.autoencoders import latents_from_moments
from latent_egc.data.sources import load_splits
from latent_egc.data.stream import TrainingSamples, collate
from latent_egc.data.views import PixelViews
from latent_egc.objective import EGCObjective
from latent_egc.training.build import resolve
from latent_egc.training.checkpoints import (
    checkpoint_folders,
    read_metrics,
    read_record,
    resolve_pipeline,
)
from latent_egc.training.figures import save_samples
from latent_egc.training.loop import learning_rate_at, objective_inputs, train
from latent_egc.training.sharding import averaged_weights, copy_without_weights
from latent_egc.training.step import NonFiniteLossError


def test_smoke_run_reaches_its_golden_losses(tmp_path):
    values = run_values(tmp_path / "run", trackers=["tensorboard"], sample_every=4)
    values["objective"]["timestep_log_normal"] = None  # as when the losses were written down
    folder = train(parse_config(values))
    found = losses(folder)
    golden = {
        1: (0.271727, 1.687395),
        4: (0.293521, 1.700474),
    }
    for step, (denoising, classification) in golden.items():
        assert found[step][1:3] == pytest.approx((denoising, classification), rel=1e-3), found
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "samples/step-00000004.png"} <= names
    assert "pipeline/model_index.json" in names
    assert any("tfevents" in name for name in names)
    assert not [name for name in names if ".tmp" in name or ".old" in name]
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())).training.max_steps == 4


def test_kill_minus_nine_and_resume_is_the_uninterrupted_run(tmp_path):
    steps = {"max_steps": 40, "checkpoint_every": 5, "validate_every": 20}
    whole, broken = (run_values(tmp_path / name, **steps) for name in ("whole", "broken"))
    uninterrupted = start(whole)
    process = start(broken)
    wait_for_step(process, tmp_path / "broken", 12)
    process.kill()
    process.wait()
    reached = max(losses(tmp_path / "broken"))
    assert reached < 40, "the run was over before it could be killed"
    output = finish(start(broken, "training.resume=auto"))
    assert "resumed at step" in output
    finish(uninterrupted)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    rows = read_metrics(tmp_path / "broken" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    weights = "pipeline/energy_model/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "broken" / weights).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(tmp_path, number):
    values = run_values(tmp_path / "run", max_steps=2000, checkpoint_every=1000, validate_every=1000)
    process = start(values)
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(number)
    output = finish(process)
    (checkpoint,) = checkpoint_folders(tmp_path / "run")
    step = read_record(checkpoint).global_step
    assert f"stopped at step {step}, checkpoint saved" in output
    assert step == max(losses(tmp_path / "run"))
    assert resolve_pipeline(tmp_path / "run") == checkpoint / "pipeline"
    output = finish(start(values, "training.resume=auto", f"training.max_steps={step}"))
    assert f"resumed at step {step}\n" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_too(tmp_path, number):
    """What clusters and terminals send: the loader's workers must live until the loop has saved. SIGTERM comes twice,
    from the cluster and from the launcher."""
    values = run_values(tmp_path / "run", max_steps=2000, checkpoint_every=1000, validate_every=1000)
    values["data"] = {"num_workers": 2}
    process = start(values, new_session=True)
    wait_for_step(process, tmp_path / "run", 3)
    os.killpg(process.pid, number)
    if number == signal.SIGTERM:
        process.send_signal(number)
    output = finish(process)
    (checkpoint,) = checkpoint_folders(tmp_path / "run")
    assert f"stopped at step {read_record(checkpoint).global_step}, checkpoint saved" in output


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]


def test_a_run_whose_launcher_dies_saves_and_stops(tmp_path):
    values = run_values(tmp_path / "run", max_steps=2000, checkpoint_every=1000, validate_every=1000)
    launcher = start(values, launcher=ACCELERATE)
    wait_for_step(launcher, tmp_path / "run", 2)
    launcher.kill()
    output, _ = launcher.communicate(timeout=60)  # ends when the run, which has the pipe, ends
    (checkpoint,) = checkpoint_folders(tmp_path / "run")
    assert f"stopped at step {read_record(checkpoint).global_step}, checkpoint saved" in output


def recorded(folder):
    training = yaml.safe_load((folder / "config.yaml").read_text())["training"]
    return training["mixed_precision"], training["gradient_accumulation_steps"]


def test_settings_of_the_launcher_are_the_runs(tmp_path):
    values = run_values(tmp_path / "run", max_steps=1, train_batch_size=2) | {"model": SHALLOW_TRANSFORMER}
    launcher = [*ACCELERATE, "--mixed_precision=bf16"]
    output = finish(start(values, launcher=launcher, environment={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}))
    assert "off plain float32" in output, "gradients are checked where the run is in bf16"
    assert recorded(tmp_path / "run") == ("bf16", 2)


def test_accumulation_by_the_launcher_is_that_of_the_configuration(tmp_path, monkeypatch):
    train(run_config(tmp_path / "ours", max_steps=2, gradient_accumulation_steps=4))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(run_config(tmp_path / "launchers", max_steps=2))
    assert losses(tmp_path / "ours") == losses(tmp_path / "launchers")
    assert recorded(tmp_path / "launchers") == recorded(tmp_path / "ours") == ("no", 4)


@pytest.mark.parametrize(
    ("variable", "value", "settings", "message"),
    [
        ("MIXED_PRECISION", "bf16", {"mixed_precision": "no"}, "mixed_precision=no contradicts .*PRECISION=bf16"),
        ("MIXED_PRECISION", "fp16", {}, "ACCELERATE_MIXED_PRECISION must be one of 'no', 'bf16', got 'fp16'"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", {"gradient_accumulation_steps": 2}, "steps=2 contradicts .*STEPS=4"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", {"gradient_accumulation_steps": 2}, "steps=2 contradicts .*STEPS=1"),
        ("GRADIENT_ACCUMULATION_STEPS", "0", {}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be in .*got 0"),
    ],
)
def test_a_configuration_against_its_launcher_is_refused(tmp_path, monkeypatch, variable, value, settings, message):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ConfigError, match=message):
        train(run_config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_what_accelerate_launch_says_where_nobody_chose_leaves_the_configuration_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    config = resolve(run_config(tmp_path / "run", mixed_precision="bf16"))
    assert (config.training.mixed_precision, config.training.checks_gradients) == ("bf16", True)
    config = resolve(run_config(tmp_path / "run"))
    assert (config.training.mixed_precision, config.training.gradient_accumulation_steps) == ("no", 1)


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(run_values(tmp_path / "run", max_steps=2000, checkpoint_every=1000), launcher=torchrun)
    wait_for_step(process, tmp_path / "run", 3)
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}
    ranks[1].send_signal(signal.SIGTERM)
    assert "checkpoint saved" in finish(process)
    (checkpoint,) = checkpoint_folders(tmp_path / "run")
    assert read_record(checkpoint).global_step == max(losses(tmp_path / "run"))


def half_labelled_parquet(folder, count=24):
    """Digits of which every third has no label, and every fifth cannot be read."""
    table = load_splits(parse_config(run_values(folder)).data, 10).train
    images = table.rows.select(range(count))["image"]
    images = [{"bytes": b"no image" if i % 5 == 0 else image["bytes"], "path": None} for i, image in enumerate(images)]
    labels = [None if i % 3 == 0 else int(table.labels[i]) for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    rows.to_parquet(str(folder / "half.parquet"))
    return {
        "dataset": "parquet",
        "data_files": str(folder / "half.parquet"),
        "image_column": "image",
        "image_size": 32,
        "skip_corrupt": True,
    }


def test_two_processes_train_as_one(tmp_path):
    """The losses of train.py on two processes are those of one with the same global batch, step for step."""
    data = half_labelled_parquet(tmp_path)
    one = run_values(tmp_path / "one", train_batch_size=8) | {"data": data}
    two = run_values(tmp_path / "two", train_batch_size=4) | {"data": data}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    processes = [start(one), start(two, launcher=torchrun)]
    outputs = [finish(process) for process in processes]
    assert "1 process(es)" in outputs[0]
    assert "2 process(es)" in outputs[1]
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert set(expected) == set(found) == {1, 2, 3, 4}
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step
    skipped, skipped_by_two = (
        [row["num_skipped_images"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("one", "two")
    )
    assert skipped == skipped_by_two
    assert skipped[-1] > 0
    for row, other in zip(evaluations(tmp_path / "one"), evaluations(tmp_path / "two"), strict=True):
        assert row == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize(
    ("backbone", "mode"), [("unet", "plain"), ("transformer", "aot_eager"), ("transformer", "checkpointed")]
)
def test_two_processes_give_the_gradients_of_one(tmp_path, backbone, mode):
    """In several buckets, every parameter with a gradient, both losses active, some labels -1; one process is plain."""
    script = str(ROOT / "tests" / "training" / "ddp_gradients.py")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, processes, step in ((torchrun, 2, mode), ([sys.executable], 1, "plain")):
        command = [*launcher, script, str(tmp_path / f"{processes}.pt"), str(processes), backbone, step]
        subprocess.run(command, env=environment, check=True)
    two, one = (torch.load(tmp_path / f"{processes}.pt") for processes in (2, 1))
    assert one.abs().max() > 0
    assert (two - one).norm() <= 1e-5 * one.norm()


def first_gradient(checkpoint):
    """AdamW's first moment after one step is (1 - beta_1) times the gradient."""
    state = torch.load(checkpoint / "state" / "optimizer.bin", weights_only=True)["state"]
    return torch.cat([entry["exp_avg"].flatten() for entry in state.values()]) / 0.1


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    settings = {"max_steps": 1, "warmup_steps": 0, "max_grad_norm": None}
    train(run_config(tmp_path / "large", train_batch_size=8, **settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(run_config(tmp_path / "small", train_batch_size=2, gradient_accumulation_steps=4, **settings))
    large, small = (first_gradient(checkpoint_folders(tmp_path / name)[0]) for name in ("large", "small"))
    assert (large - small).norm() <= 1e-5 * large.norm()
    assert losses(tmp_path / "large")[1] == pytest.approx(losses(tmp_path / "small")[1], rel=1e-5)


def test_a_step_is_adamws_with_the_clipped_gradient(tmp_path):
    """By hand, from the states of consecutive checkpoints: the step's own learning rate, the betas, the decay."""
    settings = {"adam_betas": [0.8, 0.95], "weight_decay": 0.1, "max_grad_norm": 0.01, "learning_rate": 1e-2}
    folder = train(run_config(tmp_path / "run", checkpoint_every=1, keep_checkpoints=4, **settings))
    names = dict(EGCPipeline.from_pretrained(folder / "pipeline").energy_model.named_parameters())
    checkpoints = [path / "state" for path in checkpoint_folders(folder)]
    weights = [load_file(path / "model.safetensors") for path in checkpoints]
    states = [torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in checkpoints]
    first = torch.cat([entry["exp_avg"].flatten() for entry in states[0].values()]) / (1 - 0.8)
    assert losses(folder)[1][3] > first.norm()  # what is logged is the norm before it was clipped
    assert first.norm() == pytest.approx(0.01, rel=1e-3)
    for step, rate in ((2, 1e-2), (3, 1e-2), (4, 5e-3)):  # the end of the warm-up, the cosine's start and its middle
        for number, name in enumerate(names):
            before, after = (weights[i][f"energy_model.{name}"] for i in (step - 2, step - 1))
            entry = states[step - 1][number]
            mean, square = entry["exp_avg"] / (1 - 0.8**step), entry["exp_avg_sq"] / (1 - 0.95**step)
            torch.testing.assert_close(after, (1 - 0.1 * rate) * before - rate * mean / (square.sqrt() + 1e-8))


def test_the_cheapest_step_trains_alike_in_one_batch_and_in_several(tmp_path):
    """A class embedding, the noisy cross entropy off dropped rows, half of the clean rows: 7.5 units."""
    settings = {"max_steps": 2, "warmup_steps": 0}
    found = {}
    for name, size, parts in (("large", 8, 1), ("small", 2, 4)):
        values = run_values(tmp_path / name, train_batch_size=size, gradient_accumulation_steps=parts, **settings)
        values["model"]["class_embedding"] = True
        values["objective"] |= {"label_drop": 0.5, "noisy_classification": "dropped", "clean_fraction": 0.5}
        train(parse_config(values))
        found[name] = losses(tmp_path / name)
        AcceleratorState._reset_state(reset_partial_state=True)
    for step in (1, 2):
        assert found["large"][step] == pytest.approx(found["small"][step], rel=1e-5)


def test_pipelines_and_grids_have_the_averaged_weights_and_the_validation_accuracy(tmp_path):
    often = {"checkpoint_every": 1, "keep_checkpoints": 4, "ema_decay": 0.15, "sample_every": 4}
    config = run_config(tmp_path / "run", learning_rate=1e-2, num_validation_images=40, **often)
    folder = train(config)
    pipeline = EGCPipeline.from_pretrained(folder / "pipeline")
    raw = [load_file(path / "state" / "model.safetensors") for path in checkpoint_folders(folder)]
    for name, parameter in pipeline.energy_model.named_parameters():
        first, *rest = (weights[f"energy_model.{name}"] for weights in raw)
        average = first
        for weights in rest:  # the warm-up's decays, 2/11, 3/12 and 4/13, are above the bound
            average = average + (1 - 0.15) * (weights - average)
        torch.testing.assert_close(parameter.detach(), average)
    last = EGCPipeline.from_pretrained(checkpoint_folders(folder)[-1] / "pipeline")
    pairs = zip(pipeline.energy_model.parameters(), last.energy_model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    save_samples(pipeline, config.sampling, 4, tmp_path / "grid.png")
    grids = [Image.open(path).convert("RGB") for path in (folder / "samples/step-00000004.png", tmp_path / "grid.png")]
    assert np.array_equal(*map(np.asarray, grids))
    table = load_splits(config.data, 10).validation
    output = pipeline.classify([table.image(i) for i in range(40)])
    accuracy = float((output.logits.argmax(dim=1) == torch.from_numpy(table.labels[:40])).float().mean())
    assert evaluations(folder)[-1]["validation_accuracy"] == pytest.approx(accuracy)
    assert read_record(folder / "checkpoints/step-00000004").score == pytest.approx(accuracy)


def test_averaged_weights_are_on_loan():
    model = tiny_unet().train()
    average, raw = EMAModel(model.parameters()), [parameter.clone() for parameter in model.parameters()]
    average.shadow_params = [torch.zeros_like(parameter) for parameter in raw]
    network = copy_without_weights(model)
    with averaged_weights(network, average):
        assert not network.training
        assert all(parameter.numel() and not parameter.any() for parameter in network.parameters())
        assert model.training, "or activations would be kept, not recomputed, from the first validation on"
    assert not any(parameter.numel() for parameter in network.parameters())
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), raw, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"autoencoder": {"path": None}, "model": {"in_channels": 3, "sample_size": 32}},
        {"model": {"num_classes": None, "energy_channels": 4}},
        {"model": {"head": "inner", "class_embedding": True, "gaussian_part": False}},
        {"training": {"mixed_precision": "bf16", "ema_decay": 0.0}},
    ],
    ids=["pixels", "unlabelled", "inner", "bf16"],
)
def test_other_kinds_of_runs(tmp_path, change):
    values = run_values(tmp_path / "run", max_steps=2, sample_every=2)
    for section, changed in change.items():
        values[section] = values.get(section, {}) | changed
    folder = train(parse_config(values))
    assert all(np.isfinite(row).all() for row in losses(folder).values())
    assert EGCPipeline.from_pretrained(folder / "pipeline").energy_model.config.beta_schedule == "linear"
    (measured,) = evaluations(folder)
    score = measured.get("validation_accuracy", -measured["validation_denoising_loss"])
    assert read_record(checkpoint_folders(folder)[-1]).score == score


def test_a_run_says_where_its_data_come_from(tmp_path, capsys):
    train(run_config(tmp_path / "run", max_steps=1))
    assert "training reads pixels of digits (1437 + 360 images), encoded by AutoencoderKL" in capsys.readouterr().out


@pytest.mark.parametrize("sample_posterior", [True, False])
def test_each_view_has_a_posterior_noise_of_its_own(tmp_path, sample_posterior):
    data, vae = write_images(tmp_path / "images"), tiny_kl()
    views = PixelViews(load_splits(data, 3).train, data, seed=0)
    samples = TrainingSamples(views, 0, (2, 4, 4), 1000, 0.1, posterior=sample_posterior)
    batch = collate(samples.__getitems__([0, 1]))
    batch["clean_view"] = batch["view"]
    with torch.no_grad():
        inputs = objective_inputs(batch, views, vae, labelled=True)
        moments = views.moments(vae, batch["view"])
    for latents, noise in (("latents", "posterior_noise"), ("clean_latents", "clean_posterior_noise")):
        expected = latents_from_moments(vae, moments, batch[noise] if sample_posterior else None)
        assert torch.equal(inputs[latents], expected)
    assert torch.equal(inputs["latents"], inputs["clean_latents"]) != sample_posterior


def test_learning_rate():
    constant = TrainingConfig(learning_rate=2.0, lr_schedule="constant", warmup_steps=4, max_steps=12)
    assert [learning_rate_at(step, constant) for step in (0, 1, 3, 4, 11)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = dataclasses.replace(constant, lr_schedule="cosine")
    assert [learning_rate_at(step, cosine) for step in (3, 4, 8)] == pytest.approx([2.0, 2.0, 1.0])
    assert 0 < learning_rate_at(11, cosine) < 0.1


def test_not_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    config = run_config(tmp_path / "run", learning_rate=1e30, warmup_steps=0, checkpoint_every=1, validate_every=1)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d.*step-0000000"):
        train(config)
    weights = checkpoint_folders(tmp_path / "run")[0] / "pipeline/energy_model/diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size > 1000


class KinkedObjective(EGCObjective):
    """Its loss is right and finite, its gradient is not."""

    def forward(self, *arguments, **named_arguments):
        losses = super().forward(*arguments, **named_arguments)
        kink = (0 * next(self.parameters()).sum()).sqrt()
        return losses._replace(loss=losses.loss + kink)


def test_not_finite_gradient_of_a_finite_loss_stops(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 0: \{'loss': \d.*'grad_norm': nan"):
        train(run_config(tmp_path / "run"), KinkedObjective)
    assert checkpoint_folders(tmp_path / "run") == []


def test_corrupt_training_image_is_named_or_skipped_and_counted(tmp_path):
    for split in ("train", "validation"):
        for label in "ab":
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / "images" / split / label / f"{i}.png")
    (tmp_path / "images" / "train" / "b" / "2.png").write_bytes(b"not an image")
    values = run_values(tmp_path / "run", max_steps=2)
    values["model"]["num_classes"] = 2
    values["data"] = {"dataset": "imagefolder", "data_dir": str(tmp_path / "images"), "validation_split": "validation"}
    with pytest.raises(ValueError, match=r"corrupt image.*b/2\.png"):
        train(parse_config(values))
    AcceleratorState._reset_state(reset_partial_state=True)
    values["data"]["skip_corrupt"] = True
    values["training"]["overwrite"] = True
    folder = train(parse_config(values))
    counts = [row["num_skipped_images"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert counts[-1] >= 1


def weights_of(folder):
    """The averaged weights of a run's newest checkpoint."""
    return load_file(checkpoint_folders(folder)[-1] / "pipeline/energy_model/diffusion_pytorch_model.safetensors")


# The code generator takes minutes for the other runs' U-Net.
SHALLOW_TRANSFORMER = {
    "backbone": "transformer",
    "sample_size": 8,
    "in_channels": 4,
    "num_classes": 10,
    "width": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("option", "precision", "tolerance"),
    [
        pytest.param("compile", "bf16", 1e-2, marks=pytest.mark.full_compiler),
        ("activation_checkpointing", "no", 1e-4),
    ],
)
def test_fast_and_frugal_steps_train_the_same_network(tmp_path, option, precision, tolerance):
    """With the average, a resume in the middle, and the same names in the checkpoint."""

    def run(name, **training):
        AcceleratorState._reset_state(reset_partial_state=True)
        values = run_values(tmp_path / name, mixed_precision=precision, **training)
        train(parse_config(values | {"model": SHALLOW_TRANSFORMER}))

    run("plain")
    settings = {option: True, "checkpoint_every": 2}
    run("other", **settings)
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "step-00000004")
    run("other", **settings, resume="auto")
    for step, values in losses(tmp_path / "plain").items():
        assert losses(tmp_path / "other")[step] == pytest.approx(values, rel=tolerance)
    plain, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "other")
    assert plain.keys() == other.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, rtol=tolerance, atol=tolerance)
    state = load_file(checkpoint_folders(tmp_path / "other")[-1] / "state" / "model.safetensors")
    assert {name.removeprefix("energy_model.") for name in state} == set(plain)


def test_without_a_compiler_there_is_one_warning_and_the_run_goes_on(tmp_path):
    values = run_values(tmp_path / "run", compile=True) | {"model": SHALLOW_TRANSFORMER}
    environment = {
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
    }
    output = finish(start(values, environment=environment))
    assert output.count("training.compile: the compiler failed, training goes on without it") == 1
    assert set(losses(tmp_path / "run")) == {1, 2, 3, 4}


def test_compile_and_checkpointing_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="exclude each other"):
        run_config(tmp_path, compile=True, activation_checkpointing=True)


def test_sharded_optimiser_trains_the_same_network_and_resumes_anywhere(tmp_path):
    """Two processes with half of the state each; their checkpoint goes on in one process with all of it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    constant = {"lr_schedule": "constant"}
    train(run_config(tmp_path / "one", train_batch_size=8, **constant))
    two = run_values(tmp_path / "two", train_batch_size=4, shard="optimizer", max_steps=2, **constant)
    finish(start(two, launcher=torchrun))
    finish(start(two, "training.max_steps=3", "training.resume=auto", launcher=torchrun))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(run_config(tmp_path / "two", train_batch_size=8, shard="optimizer", resume="auto", **constant))
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert expected.keys() == found.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_launches_that_the_loop_cannot_run_are_refused(tmp_path, kind, monkeypatch):
    """Accelerate offers neither on the CPU, so the launch is only said to be one."""
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", kind)
    with pytest.raises(ConfigError, match=f"launched with {kind.value}: .* training.shard=parameters"):
        train(run_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("worker", ["idle", "hangs"])
def test_a_run_that_fails_does_not_wait_for_its_workers_for_ever(tmp_path, worker):
    """While it trains they ignore the signal by which a process that ends stops them; not afterwards."""
    script = """
import sys, time
from latent_egc.training import loop
from tiny_runs import run_config
def fail(objective, optimizer, average, batches, *others):
    next(batches)
    time.sleep(2)  # the worker is at its second batch
    raise RuntimeError("a peer is gone")
loop.take_step = fail
def first_batch_alone(self, samples):
    if sys.argv[2] == "hangs" and samples[0] > 0:
        time.sleep(600)
    return getitems(self, samples)
getitems, loop.TrainingSamples.__getitems__ = loop.TrainingSamples.__getitems__, first_batch_alone
config = run_config(sys.argv[1], max_steps=100)
loop.train(loop.dataclasses.replace(config, data=loop.dataclasses.replace(config.data, num_workers=1)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "run"), worker]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "a peer is gone" in ended.stderr


def test_the_time_score_is_trained_and_its_constant_saved(tmp_path):
    """The pipeline then tells densities in one pass; the constant is that of its weights. Without the term, neither."""
    values = run_values(tmp_path / "run", trackers=[], max_steps=2, checkpoint_every=2)
    values["objective"]["time_score_weight"] = 0.01
    values["model"]["energy_pooling"] = "logmeanexp"
    folder = train(parse_config(values))
    for row in read_metrics(folder / "metrics.jsonl"):
        if "loss" in row:
            assert row["loss"] > row["denoising_loss"] + 0.1 * row["classification_loss"] + 1e-4
    pipeline = EGCPipeline.from_pretrained(resolve_pipeline(folder))
    found = pipeline.config.log_normalizer
    assert pipeline.fit_log_normalizer()[0] == pytest.approx(found, rel=1e-6)
    images = torch.zeros(1, 3, 32, 32)
    assert pipeline.log_density(images, "one_pass").log_density.isfinite().all()
    without = EGCPipeline.from_pretrained(resolve_pipeline(train(run_config(tmp_path / "without", max_steps=1))))
    with pytest.raises(ValueError, match="time_score_weight"):
        without.log_density(images, "one_pass")
