"""Weights are loaded whole or refused, naming the tensors."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny import TINY_BACKBONES, tiny_kl, tiny_pipeline, tiny_transformer, tiny_unet

from latent_egc import EGCPipeline, EGCTransformer, EGCUNet
from latent_egc.config import AutoencoderConfig, ConfigError
from latent_egc.data.autoencoders import load_autoencoder

FILE = "diffusion_pytorch_model.safetensors"
CLASSES = {"unet": EGCUNet, "transformer": EGCTransformer}


def damage(file, fault, name):
    """Makes a saved file lack `name`, hold another tensor, or hold `name` in another shape or not finite."""
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    tensor = tensors.pop(name)
    if fault == "unexpected":
        tensors |= {name: tensor, "stray": torch.ones(2)}
    elif fault == "mis-shaped":
        tensors[name] = torch.cat([tensor, tensor])
    elif fault in ("nan", "inf"):
        tensor.flatten()[1] = float(fault)
        tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}, {"ignore_mismatched_sizes": True}], ids=str)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mis-shaped", "nan", "inf"])
@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_a_network_that_does_not_fit_its_file_is_refused(backbone, fault, options, tmp_path):
    name = "time_embedding.linear_1.weight"
    TINY_BACKBONES[backbone]().save_pretrained(tmp_path)
    damage(tmp_path / FILE, fault, name)
    named = "unexpected: stray" if fault == "unexpected" else name
    with pytest.raises((ValueError, RuntimeError), match=named):
        CLASSES[backbone].from_pretrained(tmp_path, **options)


def test_both_shapes_are_told_where_diffusers_would_only_have_ignored_them(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    damage(tmp_path / FILE, "mis-shaped", "conv_out.bias")
    options = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    with pytest.raises(ValueError, match=r"mis-shaped: conv_out\.bias \(.*6.* for .*3.*\)"):
        EGCUNet.from_pretrained(tmp_path, **options)


def test_all_tensors_are_named_and_the_report_is_still_to_be_had(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    model, report = EGCTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, EGCTransformer)
    assert not any(report.values())
    for name in ("proj_out.bias", "modulation_out.bias"):
        damage(tmp_path / FILE, "missing", name)
    with pytest.raises(ValueError, match=r"missing: modulation_out\.bias, proj_out\.bias"):
        EGCTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mis-shaped", "nan"])
def test_a_pipeline_whose_network_does_not_fit_its_file_is_refused(fault, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    damage(tmp_path / "energy_model" / FILE, fault, "conv_out.weight")
    with pytest.raises(ValueError, match=r"stray|conv_out\.weight"):
        EGCPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mis-shaped", "nan"])
def test_a_pipeline_whose_autoencoder_does_not_fit_its_file_is_refused(fault, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    damage(tmp_path / "vae" / FILE, fault, "decoder.conv_in.weight")
    with pytest.raises(ValueError, match=r"stray|decoder\.conv_in\.weight"):
        EGCPipeline.from_pretrained(tmp_path)


def test_old_pickled_weights_of_an_autoencoder_are_looked_through_too(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "vae" / FILE)
    (tmp_path / "vae" / FILE).unlink()
    torch.save(tensors, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    EGCPipeline.from_pretrained(tmp_path)
    torch.save(tensors | {"stray": torch.ones(2)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="AutoencoderKL; unexpected: stray"):
        EGCPipeline.from_pretrained(tmp_path)


def test_names_of_former_versions_are_expected(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.register_modules(vae=tiny_kl(mid_block_add_attention=True))
    pipeline.save_pretrained(tmp_path)
    file, renamed = tmp_path / "vae" / FILE, {}
    for name, tensor in load_file(file).items():
        for now, before in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            name = name.replace(now, before)
        renamed[name] = tensor
    assert len(renamed.keys() - pipeline.vae.state_dict().keys()) == 16
    save_file(renamed, file, {"format": "pt"})
    loaded = EGCPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.vae.state_dict(), pipeline.vae.state_dict())


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mis-shaped", "nan"])
def test_an_autoencoder_that_does_not_fit_its_file_is_refused(fault, tmp_path):
    tiny_pipeline().vae.save_pretrained(tmp_path)
    damage(tmp_path / FILE, fault, "decoder.conv_in.weight")
    with pytest.raises(ConfigError, match=r"autoencoder\.path=.*(stray|decoder\.conv_in\.weight)"):
        load_autoencoder(AutoencoderConfig(str(tmp_path)))


def test_networks_made_of_nan_in_memory_are_refused_by_the_pipeline():
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.energy_model.conv_in.bias[0] = float("nan")
    assert isinstance(pipeline.vae, AutoencoderKL)
    with pytest.raises(ValueError, match=r"NaN or infinite: conv_in\.bias"):
        EGCPipeline(pipeline.energy_model, pipeline.vae, pipeline.scheduler)
