"""Conversion: the published implementation's numbers on its own weights, and refusals that write nothing."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command_line import fails
from safetensors.torch import load_file, save_file
from tiny import ROOT, SHARED, tiny_kl, tiny_unet

from latent_egc import EGCObjective, EGCPipeline
from latent_egc.atomic import CheckpointError
from latent_egc.commands import main
from latent_egc.config import ConfigError, load_config
from latent_egc.exchange.from_egc import egc_names, egc_unet, from_egc
from latent_egc.training.build import build_network, resolve_model

REFERENCE = SHARED / "egc_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs ../shared/egc_reference")

# What `egc_unet` cannot see in names and shapes, for `published`.
HEADS = {"num_attention_heads": 2, "sample_size": 4}


def published(variant: str = "classes"):
    """A tiny network with the published architecture, and its tensors by the published names."""
    config = {
        "in_channels": 4,
        "gaussian_part": False,
        "class_embedding": True,
        "class_embedding_dim": 12,
        "block_out_channels": (32, 64),
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    }
    if variant == "unlabelled":  # attended at the finest level only, two ResNet blocks a level
        config |= {"num_classes": None, "energy_channels": 5, "class_embedding": False, "class_embedding_dim": None}
        config |= {"attention_levels": (0,), "layers_per_block": 2}
    unet = tiny_unet(**config).eval()
    names = egc_names(unet)
    return unet, {names[name]: tensor.detach() for name, tensor in unet.state_dict().items()}


def public(config) -> dict:
    """A model's own fields, sequences as lists as in JSON."""
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


@pytest.fixture
def vae(tmp_path) -> str:
    """A saved tiny autoencoder with 4 latent channels."""
    tiny_kl(latent_channels=4).save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


# --- the published implementation's numbers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The converted tiny reference network as a reloaded pipeline, and the reference's values."""
    folder = tmp_path_factory.mktemp("reference")
    tiny_kl(latent_channels=4).save_pretrained(folder / "vae")
    checkpoint = REFERENCE / "latent_tiny" / "state_dict.safetensors"
    from_egc(checkpoint, folder / "pipeline", autoencoder=str(folder / "vae"), sample_size=8)
    pipeline = EGCPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    values = load_file(REFERENCE / "latent_tiny" / "values.safetensors")
    # The reference's null label is the embedding's last row, ours is -1.
    null = pipeline.energy_model.config.num_classes
    values["class_labels"] = torch.where(values["class_labels"] == null, -1, values["class_labels"])
    return pipeline, values


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@needs_reference
def test_reference_epsilon_logits_and_guidance(reference):
    pipeline, values = reference
    model, timesteps = pipeline.energy_model, values["timesteps"]
    alpha, sigma = (level[:, None, None, None] for level in model.noise_levels(timesteps))
    noisy_latents = alpha * values["x0"] + sigma * values["noise"]
    assert_close(noisy_latents, values["noisy_latents"])
    with torch.no_grad():
        assert_close(model.epsilon(noisy_latents, timesteps, values["class_labels"]), values["epsilon"])
        assert_close(model(noisy_latents, timesteps).logits, values["logits"])
        guided = model.epsilon(noisy_latents, timesteps, values["guided_class_labels"], guidance_scale=6.0)
        assert_close(guided, values["guided_epsilon"])


@needs_reference
def test_reference_losses_and_their_gradients(reference):
    pipeline, values = reference
    model, labels = pipeline.energy_model, values["guided_class_labels"]
    denoising_loss, classification_loss = EGCObjective(model, label_smoothing=0.2)(
        values["x0"],
        labels,
        values["clean_latents"],
        noise=values["noise"],
        timesteps=values["timesteps"],
        label_dropped=values["class_labels"] == -1,
    )[1:]
    # The reference's clean rows are other images than its noisy ones, with labels of their own: the difference that
    # this makes to the mean over all six rows.
    clean_timesteps = torch.zeros(3, dtype=torch.long)
    logits, (alpha, _) = model(values["clean_latents"], clean_timesteps).logits, model.noise_levels(clean_timesteps)
    for sign, clean_labels in ((1, values["clean_class_labels"]), (-1, labels)):
        cross_entropy = F.cross_entropy(logits, clean_labels, label_smoothing=0.2, reduction="none")
        classification_loss = classification_loss + sign * (alpha * cross_entropy).sum() / 6
    loss = denoising_loss + 0.005 * classification_loss
    assert_close(denoising_loss, values["denoising_loss"][0])
    assert_close(classification_loss, values["classification_loss"][0])
    assert_close(loss, values["loss"][0])

    names, parameters = egc_names(model), dict(model.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    expected = json.loads((REFERENCE / "latent_tiny" / "gradients.json").read_text())
    assert {names[name] for name in gradients} == set(expected)
    for name, gradient in gradients.items():
        theirs = expected[names[name]]
        # Some gradients are zero but for rounding, such as those of a bias in front of one-channel group norms.
        assert gradient.norm().item() == pytest.approx(theirs["norm"], rel=1e-3, abs=1e-6), names[name]
        first = gradient.flatten()[:4].tolist()
        assert first == pytest.approx(theirs["first"], rel=1e-3, abs=1e-4), names[name]


@needs_reference
def test_reference_trajectory(reference):
    """The published procedure is the converted pipeline's default: label, scale 6, deterministic DDIM.

    In float64 on our side: the steps add up float32's rounding, which differs from processor to processor, and the
    reference's own moves its values of up to 34 by 0.7e-4.
    """
    pipeline, values = reference
    model, scale = copy.deepcopy(pipeline.energy_model).double(), pipeline.config.default_guidance_scale
    pipeline = EGCPipeline(model, pipeline.vae, pipeline.scheduler, pipeline.id2label, scale)
    pipeline.set_progress_bar_config(disable=True)
    trajectory, timesteps = [], []

    def note(pipeline, step, timestep, tensors):
        timesteps.append(int(timestep))
        trajectory.append(tensors["latents"])

    latents = pipeline(
        values["guided_class_labels"],
        num_inference_steps=5,
        latents=values["ddim_noise"],
        output_type="latent",
        callback_on_step_end=note,
    ).images
    assert timesteps == values["ddim_timesteps"].tolist()
    assert_close(torch.stack(trajectory), values["ddim_trajectory"].double())
    assert_close(latents, values["ddim_trajectory"][-1].double())


@needs_reference
def test_full_size_checkpoint_converts_completely():
    shapes = json.loads((REFERENCE / "imagenet256_state_dict_shapes.json").read_text())
    unet = egc_unet({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert sum(parameter.numel() for parameter in unet.parameters()) == 543_119_208
    with torch.device("meta"):
        recipe = build_network(resolve_model(load_config(ROOT / "configs" / "imagenet256.yaml").model))
    assert public(unet.config) == public(recipe.config)


# --- the converter by itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["classes", "unlabelled"])
def test_own_weights_under_published_names_come_back(variant, tmp_path, vae):
    unet, tensors = published(variant)
    save_file(tensors, tmp_path / "egc.safetensors")
    assert from_egc(tmp_path / "egc.safetensors", tmp_path / "out", autoencoder=vae, **HEADS) == tmp_path / "out"
    pipeline = EGCPipeline.from_pretrained(tmp_path / "out")
    assert public(pipeline.energy_model.config) == public(unet.config)
    converted = pipeline.energy_model.state_dict()
    assert converted.keys() == unet.state_dict().keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in unet.state_dict().items())
    assert type(pipeline.vae).__name__ == "AutoencoderKL"
    assert pipeline.config.default_guidance_scale == (6.0 if variant == "classes" else 1.0)


def test_published_names():
    """A few that a renaming to and fro would not find wrong."""
    names, unlabelled = (egc_names(published(variant)[0]) for variant in ("classes", "unlabelled"))
    assert names["down_blocks.1.0.resnet.conv_shortcut.weight"] == "input_blocks.3.0.skip_connection.weight"
    assert names["downsamplers.0.conv.bias"] == "input_blocks.2.0.op.bias"
    assert names["mid_blocks.0.attention.norm3.bias"] == "middle_block.1.transformer_blocks.0.norm3.bias"
    assert names["mid_blocks.1.resnet.norm2.bias"] == "middle_block.2.out_layers.0.bias"
    assert names["up_blocks.1.1.resnet.time_emb_proj.weight"] == "output_blocks.3.0.emb_layers.1.weight"
    assert names["upsamplers.0.conv.weight"] == "output_blocks.1.2.conv.weight"
    assert unlabelled["upsamplers.0.conv.weight"] == "output_blocks.2.1.conv.weight"


@pytest.mark.parametrize("wrap", [lambda t: {"ema": t, "step": 3}, lambda t: {f"module.{n}": v for n, v in t.items()}])
def test_command_line_reads_wrapped_checkpoints_and_class_names(wrap, tmp_path, vae, capsys):
    _, tensors = published()
    torch.save(wrap({name: tensor.half() for name, tensor in tensors.items()}), tmp_path / "egc.pt")
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    arguments = ["convert", "--from-egc", str(tmp_path / "egc.pt"), str(tmp_path / "out"), "--autoencoder", vae]
    arguments += ["--sample-size=4", "--num-attention-heads=2", "--class-names", str(tmp_path / "names.txt")]
    assert main(arguments) == 0
    assert f"pipeline written: {tmp_path / 'out'}" in capsys.readouterr().out
    pipeline = EGCPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.id2label == {0: "cat", 1: "dog", 2: "cow"}
    assert pipeline.energy_model.dtype == torch.float32


# --- refusals -------------------------------------------------------------------------------------------------------


class Harmful:
    """A pickle that would create a file on loading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "output_blocks.1.2.conv.bias"), "missing: output_blocks.1.2.conv.bias"),
        (lambda t: without(t, "input_blocks.3.0.in_layers.2.weight"), "input_blocks.3.0.in_layers.2.weight is missing"),
        (lambda t: t | {"fc.weight": torch.zeros(2)}, "unexpected: fc.weight"),
        (lambda t: t | {"out.0.bias": torch.zeros(31)}, r"wrong shape: out.0.bias \(31,\) instead of \(32,\)"),
        (lambda t: t | {"label_emb.weight": torch.zeros(3, 12)}, r"label_emb.weight \(3, 12\) instead of \(4, 12\)"),
        (lambda t: {"conv.weight": torch.zeros(2)}, "input_blocks.1.0.in_layers is missing"),
        (lambda t: {"state_dict": 3}, "no state dict"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, message, tmp_path, vae):
    torch.save(change(published()[1]), tmp_path / "egc.pt")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        from_egc(tmp_path / "egc.pt", tmp_path / "out", autoencoder=vae, **HEADS)
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_are_no_checkpoints_are_refused(tmp_path, vae, capsys):
    _, tensors = published()
    torch.save(tensors, tmp_path / "whole.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-1000])
    save_file(tensors, tmp_path / "whole.safetensors")
    (tmp_path / "truncated.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1000])
    torch.save(Harmful(tmp_path / "harmed"), tmp_path / "code.pt")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(Harmful(tmp_path / "harmed")))
    (tmp_path / "text.pt").write_text("not a checkpoint")
    before = sorted(tmp_path.iterdir())
    for name in ("truncated.pt", "truncated.safetensors", "code.pt", "code.pkl", "text.pt"):
        arguments = ["convert", "--from-egc", tmp_path / name, tmp_path / "out", "--autoencoder", vae]
        fails(capsys, arguments, name, "damaged or not a file of tensors")
    fails(capsys, ["convert", "--from-egc", tmp_path / "none.pt", tmp_path / "out"], "no such checkpoint", "none.pt")
    assert sorted(tmp_path.iterdir()) == before


def test_other_arguments_are_checked_before_anything_is_written(tmp_path, vae):
    save_file(published()[1], tmp_path / "egc.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for error, match, options in (
        (ConfigError, "already holds", {"folder": tmp_path / "full"}),
        (ConfigError, "latents of 3 channels, the network takes 4", {"autoencoder": None}),
        (ConfigError, "cannot be loaded", {"autoencoder": str(tmp_path / "full")}),
        (ValueError, "num_attention_heads must divide", {"num_attention_heads": 3}),
        (ValueError, "sample_size must be divisible by 2, got 5", {"sample_size": 5}),
        (ValueError, "id2label must name the classes 0 to 2", {"id2label": {0: "cat"}}),
    ):
        arguments = {"folder": tmp_path / "out", "autoencoder": vae} | HEADS | options
        with pytest.raises(error, match=match):
            from_egc(tmp_path / "egc.safetensors", **arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_is_required(tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["convert", str(tmp_path / "out")])
    assert end.value.code == 2
