"""The best linear probe, saved beside its network."""

import numpy as np
import pytest
import torch
import yaml
from command_line import fails
from tiny_studies import FAST_PROBE, tiny_unet2d
from transformers import AutoModel, AutoModelForImageClassification

from latent_egc import EGCPipeline
from latent_egc.commands import main
from latent_egc.config import ConfigError
from latent_egc.measuring.denoisers import load_denoiser
from latent_egc.measuring.probe_export import check_can_save
from latent_egc.measuring.probe_heads import fit_logistic, linear_layer, standardised


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_layer_is_the_probe_without_its_standardisation(num_classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, 60)
    features = (rng.standard_normal((60, 3, 2, 2)) * 5 + labels[:, None, None, None] + 7).astype(np.float32)
    features[:, 0, 0, 0] = 4.0  # constant
    weight, bias = linear_layer(features, labels, 0.1, 100)
    model = fit_logistic(standardised(features)[0], labels, 0.1, 100)
    logits = torch.from_numpy(features).flatten(1) @ weight.T + bias
    expected = model.predict_proba(standardised(features)[0].reshape(60, -1))
    assert weight.shape == (num_classes, 12)
    assert np.allclose(logits.softmax(dim=1), expected, atol=1e-4)


def test_the_saved_probe_classifies_what_the_probe_did(probe_context, tmp_path, capsys):
    """By the command line; beside a network that is as it was."""
    context = probe_context("block=up.0.1", "timestep=0", "pooling=2")
    data = {"dataset": "imagefolder", "data_dir": context.data.data_dir, "validation_fraction": 1 / 3}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    folder = tmp_path / "probe"
    command = ["probe", tmp_path / "pipeline", "--data", tmp_path / "data.yaml", "--output", tmp_path / "report"]
    command += ["--suite", "pooling", "--save", folder, "--set", *FAST_PROBE, "block=up.0.1", "timestep=0", "pooling=2"]
    assert main([str(argument) for argument in command]) == 0
    assert f"probe: {folder}" in capsys.readouterr().out

    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "cat", 1: "cow", 2: "dog"}
    place = [model.config.block, model.config.timestep, model.config.pooling]
    assert place == ["up.0.1", 0, 2]
    denoiser = load_denoiser(str(folder))
    latents = context.cache.latents("validation")
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(latents)
    features = denoiser.features(denoiser.noised(latents, noise, 0), 0)["up.0.1"]
    pooled = torch.nn.functional.adaptive_avg_pool2d(features, 2).flatten(1)
    _, ours, _ = model.features(latents)
    assert torch.equal(ours, pooled)
    probed = torch.from_numpy(context.features("validation", context.place)).flatten(1)  # an image's own noise
    assert np.array_equal(model.linear(probed).argmax(dim=1), context.probe(context.place)[1])

    pixels = torch.rand(2, 3, 8, 8)
    assert AutoModel.from_pretrained(folder)(2 * pixels - 1).pooler_output.shape == (2, pooled.shape[1])
    before, after = (EGCPipeline.from_pretrained(place) for place in (tmp_path / "pipeline", folder))
    assert torch.equal(before.classify(pixels).logits, after.classify(pixels).logits)
    assert "at up.0.1, timestep 0, 2 x 2" in (folder / "README.md").read_text()
    fails(capsys, command, f"{folder} already holds something")


def test_what_cannot_be_saved_is_refused_before_anything_is_measured(probe_context, tmp_path):
    context = probe_context(extract=False)
    context.train_labels = np.where(context.train_labels == 1, 0, context.train_labels)
    with pytest.raises(ConfigError, match="--save needs a training image of every class, there is none of cow"):
        check_can_save(context, tmp_path / "probe")
    tiny_unet2d().save_pretrained(tmp_path / "denoiser")
    other = probe_context(denoiser=load_denoiser(str(tmp_path / "denoiser")), extract=False)
    with pytest.raises(ConfigError, match="--save needs an energy network, got UNet2DModel"):
        check_can_save(other, tmp_path / "probe")
