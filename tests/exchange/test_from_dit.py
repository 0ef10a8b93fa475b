"""Warm starts from diffusers' DiT: the field is the DiT's noise output, and what cannot be taken over is refused."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from test_cli import fails
from tiny import tiny_kl

from latent_egc import EGCPipeline, EGCTransformer
from latent_egc.atomic import CheckpointError
from latent_egc.commands import main
from latent_egc.config import ConfigError
from latent_egc.exchange.from_dit import from_dit

NAMES = {0: "cat", 1: "dog", 2: "cow, ox"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_dit(**overrides) -> DiTTransformer2DModel:
    """A DiT of three classes with random weights, one embedding for all blocks, 4 tokens."""
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 4,
        "num_embeds_ada_norm": 3,
    } | overrides
    dit = DiTTransformer2DModel(**config).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in dit.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    return dit


def save_repository(folder, dit: DiTTransformer2DModel) -> str:
    """A folder in the layout of the Hub's facebook/DiT-XL-2-256."""
    scheduler = DDIMScheduler(beta_start=0.0002, beta_end=0.015, beta_schedule="linear", clip_sample=False)
    DiTPipeline(dit, tiny_kl(latent_channels=4), scheduler).save_pretrained(folder)
    edit(folder / "model_index.json", id2label=NAMES)
    return str(folder)


def edit(file, **values) -> None:
    """Changes values of a JSON file; None is JSON's null."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def repository(tmp_path):
    """A tiny repository's folder; its network is `tiny_dit()`."""
    save_repository(tmp_path / "dit", tiny_dit())
    return tmp_path / "dit"


@pytest.mark.parametrize(
    "overrides",
    [{}, {"out_channels": 4}, {"out_channels": None}, {"in_channels": 4, "patch_size": 1, "sample_size": 3}],
    ids=["learned variance", "noise only", "out_channels by default", "patch 1"],
)
def test_field_is_the_noise_output(overrides, tmp_path):
    dit = tiny_dit(**overrides)
    assert from_dit(save_repository(tmp_path / "dit", dit), tmp_path / "out") == tmp_path / "out"
    pipeline = EGCPipeline.from_pretrained(tmp_path / "out")
    model = pipeline.energy_model
    size = dit.config.sample_size
    latents, timesteps = torch.randn(5, 4, size, size), torch.tensor([0, 17, 500, 999, 20])
    labels = torch.tensor([0, 1, 2, -1, -1])
    with torch.no_grad():
        field, logits = model.network(latents, timesteps, labels)
        # The DiT's null label is its embedding's last row.
        noise = dit(latents, timesteps, torch.where(labels < 0, 3, labels)).sample[:, :4]
    assert field.abs().mean() > 0.1
    torch.testing.assert_close(field, noise, atol=1e-5, rtol=0)
    assert torch.equal(logits, torch.zeros(5, 3))


def test_pipeline_of_a_repository(repository, tmp_path):
    from_dit(repository, tmp_path / "out")
    pipeline = EGCPipeline.from_pretrained(tmp_path / "out")
    config = pipeline.energy_model.config
    assert isinstance(pipeline.energy_model, EGCTransformer)
    assert (config.head, config.class_embedding, config.num_classes) == ("inner", True, 3)
    assert not any((config.gaussian_part, config.qk_norm, config.long_skips))
    assert (config.num_train_timesteps, config.beta_start, config.beta_end) == (1000, 0.0002, 0.015)
    assert config.beta_schedule == "linear"
    assert pipeline.id2label == NAMES
    assert pipeline.image_size == 8
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("dog", num_inference_steps=2, classifier_free_scale=2.0, output_type="latent").images
    assert latents.isfinite().all()


def test_command_line_and_older_repositories(repository, tmp_path, capsys):
    """Older repositories name another class and write options that the DiT has lost, and no id2label need be there."""
    edit(repository / "transformer" / "config.json", _class_name="Transformer2DModel", cross_attention_dim=None)
    index = json.loads((repository / "model_index.json").read_text())
    (repository / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "id2label"}))
    tiny_kl(latent_channels=4, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    arguments = ["convert", "--from-dit", str(repository), str(tmp_path / "out"), "--autoencoder", tmp_path / "vae"]
    assert main([str(argument) for argument in arguments]) == 0
    assert f"pipeline written: {tmp_path / 'out'}" in capsys.readouterr().out
    pipeline = EGCPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.id2label == {0: "0", 1: "1", 2: "2"}
    assert pipeline.vae.config.scaling_factor == 0.5


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("transformer", {"activation_fn": "geglu"}, "activation_fn='geglu'.* activation_fn='gelu-approximate'"),
        ("transformer", {"attention_bias": False}, "attention_bias=False"),
        ("transformer", {"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ("transformer", {"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ("transformer", {"dropout": 0.1}, "dropout=0.1"),
        ("transformer", {"norm_type": "layer_norm"}, "no DiT: .* norm_type='layer_norm'"),
        ("transformer", {"_class_name": "PixArtTransformer2DModel"}, "no DiT: it is a PixArtTransformer2DModel"),
        ("transformer", {"out_channels": 6}, "out_channels=6, neither in_channels=4 nor"),
        ("transformer", {"num_embeds_ada_norm": 4}, "embedding_table"),
        ("scheduler", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        ("scheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas="),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule must be .* got 'sigmoid'"),
    ],
)
def test_what_an_energy_transformer_has_not_is_refused(file, values, message, repository, tmp_path):
    if values.keys() & {"out_channels", "norm_elementwise_affine", "attention_bias", "activation_fn"}:
        dit = tiny_dit(**values)  # their weights change too
        save_repository(repository, dit)
    names = {"transformer": "config.json", "scheduler": "scheduler_config.json"}
    edit(repository / file / names[file], **values)
    refused(repository, tmp_path, message)


def refused(repository, tmp_path, message, error=(CheckpointError, ValueError)):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        from_dit(repository, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def edit_weights(repository, change) -> None:
    file = repository / "transformer" / WEIGHTS
    tensors = load_file(file)
    save_file(change({name: tensor.clone() for name, tensor in tensors.items()}), file)


def test_blocks_with_embeddings_of_their_own_are_refused(repository, tmp_path):
    def change(tensors):
        tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"][0] += 1e-3
        tensors["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"][3, 0] += 1e-3
        return tensors

    edit_weights(repository, change)
    refused(repository, tmp_path, "transformer_blocks.1, transformer_blocks.2 differ from transformer_blocks.0's")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "proj_out_1.bias"}, "missing: proj_out_1.bias"),
        (lambda t: t | {"extra.weight": torch.zeros(2)}, "unexpected: extra.weight"),
        (lambda t: t | {"proj_out_2.bias": torch.zeros(5)}, "proj_out_2.bias"),
        # A class table without a null row.
        (lambda t: {k: v[:3] if "embedding_table" in k else v for k, v in t.items()}, "embedding_table"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, repository, tmp_path):
    edit_weights(repository, change)
    refused(repository, tmp_path, message, CheckpointError)


def test_a_scheduler_without_betas_is_refused(repository, tmp_path):
    FlowMatchEulerDiscreteScheduler().save_pretrained(repository / "scheduler")
    refused(repository, tmp_path, "says nothing of beta_start, beta_end, beta_schedule", CheckpointError)


def test_other_refusals_write_nothing(repository, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="already holds"):
        from_dit(repository, tmp_path / "full")
    tiny_kl(latent_channels=3).save_pretrained(tmp_path / "vae")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="latents of 3 channels, the network takes 4"):
        from_dit(repository, tmp_path / "out", autoencoder=str(tmp_path / "vae"))
    fails(capsys, ["convert", "--from-dit", tmp_path / "full", tmp_path / "out"], "model_index.json", tmp_path / "full")
    fails(
        capsys,
        ["convert", "--from-dit", repository, tmp_path / "out", "--sample-size=4", "--num-attention-heads=2"],
        "--from-dit",
        "--sample-size, --num-attention-heads",
    )
    edit(repository / "model_index.json", id2label={0: "cat"})
    refused(repository, tmp_path, "id2label must name the classes 0 to 2")
    assert sorted(tmp_path.rglob("*")) == before
