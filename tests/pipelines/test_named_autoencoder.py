"""A pipeline that names its autoencoder, by a folder or a Hub id, in place of holding its weights."""

import json
import os
import pickle
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import WITHOUT_THE_PACKAGE, tiny_kl, tiny_pipeline, tiny_taesd, tiny_unet

from latent_egc import EGCPipeline
from latent_egc.exchange.export import add_transformers_files
from latent_egc.pipelines.schedulers import default_scheduler

PIXELS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def named_pipeline(name, vae=None, **overrides):
    """The tiny pipeline, its autoencoder by its name."""
    model = tiny_unet(**overrides).eval()
    return EGCPipeline(model, vae, default_scheduler(model), autoencoder=str(name))


@pytest.fixture
def taesd(tmp_path):
    """A folder with an autoencoder."""
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    return tmp_path / "taesd"


def test_it_is_saved_without_the_autoencoder_and_loads_the_same(tmp_path, taesd):
    pipeline = named_pipeline(taesd)
    expected = pipeline.classify(PIXELS).logits
    model = pipeline.energy_model
    assert torch.equal(EGCPipeline(model, tiny_taesd(), pipeline.scheduler).classify(PIXELS).logits, expected)
    for folder in (tmp_path / "first", tmp_path / "second"):
        pipeline.save_pretrained(folder)
        assert type(pipeline.vae) is type(tiny_taesd())  # in memory it stays
        assert not (folder / "vae").exists()
        index = json.loads((folder / "model_index.json").read_text())
        assert (index["vae"], index["autoencoder"]) == ([None, None], str(taesd))
        pipeline = EGCPipeline.from_pretrained(folder)
        assert torch.equal(pipeline.classify(PIXELS).logits, expected)
    assert not list((tmp_path / "second").rglob("*taesd*"))
    again = EGCPipeline(**pipeline.components)
    assert torch.equal(again.classify(PIXELS).logits, expected)
    again.save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third" / "vae").exists()


def test_what_is_given_is_taken_and_nothing_is_looked_up(tmp_path, taesd):
    named_pipeline(taesd).save_pretrained(tmp_path / "saved")
    expected = EGCPipeline.from_pretrained(tmp_path / "saved").classify(PIXELS).logits
    taesd.rename(tmp_path / "moved")
    mine = tiny_taesd()
    loaded = EGCPipeline.from_pretrained(tmp_path / "saved", vae=mine)
    assert loaded.vae is mine
    assert torch.equal(loaded.classify(PIXELS).logits, expected)
    elsewhere = EGCPipeline.from_pretrained(tmp_path / "saved", autoencoder=str(tmp_path / "moved"))
    assert torch.equal(elsewhere.classify(PIXELS).logits, expected)
    assert EGCPipeline.from_pretrained(tmp_path / "saved", autoencoder=None).vae is None
    with pytest.raises(
        ValueError, match=r"autoencoder='.*taesd' cannot be loaded: there is no such folder; .* by vae="
    ):
        EGCPipeline.from_pretrained(tmp_path / "saved")


def test_the_name_may_be_that_of_a_pipeline(tmp_path):
    whole = tiny_pipeline()
    whole.save_pretrained(tmp_path / "whole")
    add_transformers_files(tmp_path / "whole", whole)  # a config.json that is no autoencoder's
    found = named_pipeline(tmp_path / "whole")
    assert torch.equal(found.classify(PIXELS).logits, whole.classify(PIXELS).logits)


def test_it_has_the_energy_networks_precision(tmp_path, taesd):
    named_pipeline(taesd).save_pretrained(tmp_path / "saved")
    found = EGCPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert (found.energy_model.dtype, found.vae.dtype) == (torch.bfloat16, torch.bfloat16)
    assert EGCPipeline.from_pretrained(tmp_path / "saved").vae.dtype == torch.float32


def test_other_latents_are_refused_at_once(taesd):
    with pytest.raises(ValueError, match=r"AutoencoderTiny \(autoencoder='.*taesd'\) have 2 channels, .*network's 4"):
        named_pipeline(taesd, in_channels=4)
    with pytest.raises(ValueError, match="latents of AutoencoderKL have 3 channels, the energy network's 2"):
        EGCPipeline(tiny_unet(), tiny_kl(3), default_scheduler(tiny_unet()))


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"(?s)autoencoder='nobody/taesd' cannot be loaded: .* by vae="):
        named_pipeline("nobody/taesd")
    assert named_pipeline("nobody/taesd", tiny_taesd()).vae is not None


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_nothing_but_safetensors_of_an_autoencoder_is_read(tmp_path, taesd):
    (taesd / "diffusion_pytorch_model.safetensors").unlink()
    (taesd / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"autoencoder=.*no file named diffusion_pytorch_model\.safetensors"):
        named_pipeline(taesd)
    tiny_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="it is a EGCUNet, not an autoencoder"):
        named_pipeline(tmp_path / "unet")


# Runs where importing latent_egc fails, and from the Hub's cache alone.
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForImageClassification
out, *names = sys.argv[1:]
pixels, logits = torch.load(out + "/pixels.pt"), []
for name in names:
    pipeline = DiffusionPipeline.from_pretrained(out + "/" + name, trust_remote_code=True)
    logits.append(pipeline.classify(pixels).logits)
    pipeline.save_pretrained(out + "/again")
    again = DiffusionPipeline.from_pretrained(out + "/again", trust_remote_code=True)
    logits.append(again.classify(pixels).logits)
    model = AutoModelForImageClassification.from_pretrained(out + "/" + name, trust_remote_code=True, revision="main")
    logits.append(model(2 * pixels - 1).logits.detach())
torch.save(logits, out + "/logits.pt")
"""
)


def test_strangers_load_it_by_a_hub_id(tmp_path):
    """From the Hub's cache: an autoencoder by itself, and a pipeline's."""
    vae, model = tiny_taesd(), tiny_unet().eval()
    expected = EGCPipeline(model, vae, default_scheduler(model))
    for name, repository in (("itself", vae), ("whole", expected)):
        cached = tmp_path / "hub" / "hub" / f"models--someone--{name}"
        repository.save_pretrained(cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        pipeline = named_pipeline(f"someone/{name}", vae)
        pipeline.save_pretrained(tmp_path / name)
        add_transformers_files(tmp_path / name, pipeline)
    torch.save(PIXELS, tmp_path / "pixels.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(tmp_path), "itself", "whole"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    assert not (tmp_path / "again" / "vae").exists()
    found = torch.load(tmp_path / "logits.pt")
    assert len(found) == 6
    assert all(torch.equal(logits, expected.classify(PIXELS).logits) for logits in found)


def test_no_code_is_run_of_what_is_named(tmp_path, taesd):
    """Its own code needs the flag, and the autoencoder has none."""
    named_pipeline(taesd).save_pretrained(tmp_path / "saved")
    (taesd / "evil.py").write_text("raise SystemExit('was run')")
    config = json.loads((taesd / "config.json").read_text())
    (taesd / "config.json").write_text(json.dumps(config | {"_class_name": ["evil", "AutoencoderTiny"]}))
    with pytest.raises(ValueError, match=r"autoencoder=.*cannot be loaded"):
        EGCPipeline.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
