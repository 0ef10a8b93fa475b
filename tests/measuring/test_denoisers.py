"""Features of every kind of denoiser."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline
from tiny import TINY_BACKBONES, tiny_kl, tiny_pipeline, tiny_unet
from tiny_studies import tiny_dit, tiny_unet2d

from latent_egc.config import ConfigError
from latent_egc.measuring.denoisers import Denoiser, load_denoiser
from latent_egc.measuring.report import Report


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
@pytest.mark.parametrize("class_embedding", [False, True])
def test_hooks_read_what_the_network_calls_its_features(backbone, class_embedding, monkeypatch):
    """Every block's, in the order of the forward pass, without a label or with the null one."""
    network = TINY_BACKBONES[backbone](in_channels=3, class_embedding=class_embedding)
    denoiser = Denoiser(network, None, network.alphas_cumprod)
    latents, run_block, computed = torch.randn(2, 3, 4, 4), network.run_block, []
    found = denoiser.features(latents, 90)
    assert list(found) == list(denoiser.blocks)

    def recording(block, *inputs):
        computed.append(run_block(block, *inputs))
        return computed[-1]

    monkeypatch.setattr(network, "run_block", recording)
    network.norm_out.register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0]))
    entrance = network.conv_in if backbone == "unet" else network.patch_embedding
    for labels in (None, torch.tensor([-1, -1])):
        computed[:] = [entrance(latents)]
        network(latents, 90, labels)
        *blocks, seen_by_the_output = computed
        for maps, expected in zip(found.values(), blocks, strict=True):
            expected = expected[:2]  # with labels the rows are there twice, the second time with the null label
            is_tokens = expected.ndim == 3
            torch.testing.assert_close(maps, expected.mT.unflatten(2, (2, 2)) if is_tokens else expected)
        torch.testing.assert_close(seen_by_the_output, blocks[-1])


def test_features_are_named_maps():
    network = tiny_unet(class_embedding=True, in_channels=3)
    maps = Denoiser(network, None, network.alphas_cumprod).features(torch.randn(3, 3, 4, 4), 90)
    assert {name: tuple(feature.shape) for name, feature in maps.items()} == {
        "in": (3, 8, 4, 4),
        "down.0.0": (3, 8, 4, 4),
        "down.1.0": (3, 16, 2, 2),
        "mid.0": (3, 16, 2, 2),
        "mid.1": (3, 16, 2, 2),
        "up.1.0": (3, 16, 2, 2),
        "up.1.1": (3, 16, 2, 2),
        "up.0.0": (3, 8, 4, 4),
        "up.0.1": (3, 8, 4, 4),
    }


@torch.no_grad()
def test_unet_of_diffusers(tmp_path):
    """The last block's features, put through the output layers, are the network's output."""
    network = tiny_unet2d()
    DDPMPipeline(network, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path)
    denoiser = load_denoiser(str(tmp_path))
    pixels, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noisy = scheduler.add_noise(pixels, noise, torch.tensor([90, 90]))
    torch.testing.assert_close(denoiser.noised(denoiser.encode(pixels), noise, 90), noisy)
    maps = denoiser.features(noisy, 90)
    sizes = {name: (m.shape[1], m.shape[-1]) for name, m in maps.items()}
    assert sizes == {
        "in": (8, 8),
        "down.0.0": (8, 8),
        "down.1.0": (16, 4),
        "mid.0": (16, 4),
        "up.1.0": (16, 4),
        "up.1.1": (16, 4),
        "up.0.0": (8, 8),
        "up.0.1": (8, 8),
    }
    output = network.conv_out(network.conv_act(network.conv_norm_out(maps["up.0.1"])))
    torch.testing.assert_close(output, network(noisy, 90).sample)
    assert denoiser.feedback_pairs == [("up.1.1", "down.1.0"), ("up.0.1", "down.0.0")]


@torch.no_grad()
def test_dit_of_diffusers_sees_the_null_label(tmp_path):
    network = tiny_dit()
    vae = tiny_kl()
    DiTPipeline(network, vae, DDPMScheduler(), {0: "a"}).save_pretrained(tmp_path)
    denoiser = load_denoiser(str(tmp_path))
    assert denoiser.image_size == 8
    pixels, latents = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 4, 4)
    expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(denoiser.encode(pixels), expected)
    maps = denoiser.features(latents, 300)
    assert list(maps) == ["in", "block.0", "block.1", "block.2"]
    timesteps, labels = torch.tensor([300, 300]), torch.tensor([5, 5])
    tokens = network.eval().pos_embed(latents)
    for i, block in enumerate(network.transformer_blocks):
        tokens = block(tokens, timestep=timesteps, class_labels=labels)
        torch.testing.assert_close(maps[f"block.{i}"], tokens.transpose(1, 2).reshape(2, 16, 2, 2))
    assert denoiser.feedback_pairs == [("block.2", "block.0")]


def test_a_bare_network_gets_ddpms_schedule(tmp_path):
    tiny_unet2d().save_pretrained(tmp_path)
    torch.testing.assert_close(load_denoiser(str(tmp_path)).alphas_cumprod, DDPMScheduler().alphas_cumprod)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet2d", "dit", "unet", "transformer"])
def test_edits_take_a_blocks_place(kind):
    """The identity changes nothing; another map reaches the later blocks and no earlier one."""
    if kind in TINY_BACKBONES:
        network = TINY_BACKBONES[kind](in_channels=3)
    else:
        network = tiny_unet2d() if kind == "unet2d" else tiny_dit()
    vae = tiny_kl() if kind == "dit" else None
    denoiser = Denoiser(network, vae, DDPMScheduler().alphas_cumprod)
    latents = torch.randn(2, denoiser.channels, denoiser.sample_size, denoiser.sample_size)
    plain, (_, earlier) = denoiser.features(latents, 90), denoiser.feedback_pairs[0]
    for name, maps in denoiser.features(latents, 90, {earlier: lambda maps: maps}).items():
        torch.testing.assert_close(maps, plain[name])
    edited = denoiser.features(latents, 90, {earlier: lambda maps: maps.flip(0)})
    torch.testing.assert_close(edited[earlier], plain[earlier].flip(0))
    names = list(plain)
    place = names.index(earlier)
    assert all(torch.equal(edited[name], plain[name]) for name in names[:place])
    assert not any(torch.allclose(edited[name], plain[name]) for name in names[place:])


def test_denoisers_that_cannot_be_probed(tmp_path):
    tiny_kl().save_pretrained(tmp_path / "vae")
    tiny_unet2d(num_class_embeds=3).save_pretrained(tmp_path / "conditional")
    tiny_unet2d(in_channels=2).save_pretrained(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("vae", "an? AutoencoderKL cannot be probed"),
        ("conditional", "no null label"),
        ("two", "takes 2 channels, pixels, as there is no autoencoder, have 3"),
        ("empty", "holds no pipeline"),
        ("none", "no such run or pipeline"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_denoiser(str(tmp_path / folder))


def test_a_report_is_of_one_denoiser(tmp_path):
    """The noise schedule is a part of what a report is of."""
    network = tiny_unet2d()
    prints = {
        Denoiser(network, None, DDPMScheduler(beta_schedule=schedule).alphas_cumprod).fingerprint
        for schedule in ("linear", "squaredcos_cap_v2")
    }
    assert len(prints) == 2
    assert Report(tmp_path, {"fingerprint": prints.pop()}).content["suites"] == {}


@pytest.mark.parametrize("content", ["[1]", "null", ""])
def test_a_pipeline_with_a_broken_index_is_named(tmp_path, content):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "model_index.json").write_text(content)
    with pytest.raises(ConfigError, match="pipeline cannot be loaded"):
        load_denoiser(str(tmp_path / "pipeline"))
