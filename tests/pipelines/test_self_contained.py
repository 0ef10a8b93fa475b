"""Whatever writes a pipeline, strangers can load the folder, and write it again for others."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import diffusers.utils.hub_utils
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import WITHOUT_THE_PACKAGE, generator, tiny_pipeline, tiny_unet

from latent_egc import EGCPipeline, EGCUNet
from latent_egc.pipelines.schedulers import default_scheduler

CODE_FILES = {"pipeline_egc.py", "energy_model/unet.py"}

# Runs where importing latent_egc fails: loads FIRST, saves it as SECOND, loads that, and is refused FIRST once damaged.
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import os
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
first, second, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(first, trust_remote_code=True)
pipeline.save_pretrained(second)
pixels = torch.load(out + "/pixels.pt")
energies = {"loaded": pipeline.classify(pixels).energy}
noise = torch.Generator().manual_seed(0)
logits = pipeline.classify(pixels, timesteps=[100], generator=noise).logits
votes = pipeline.certify(pixels, 0.5, n0=2, n=8, generator=noise).votes
torch.save({"logits": logits, "votes": votes}, out + "/noised.pt")
edited = [pipeline.counterfactual(pixels, num_inference_steps=2, output_type="pt").images]
edited.append(pipeline.inpaint(pixels, pixels[:, :1], num_inference_steps=2, output_type="pt",
                               generator=torch.Generator().manual_seed(0)).images)
torch.save(edited, out + "/edited.pt")
os.rename(first, first + ".moved")
again = DiffusionPipeline.from_pretrained(second, trust_remote_code=True)
energies["saved again"] = again.classify(torch.load(out + "/pixels.pt")).energy
torch.save(energies, out + "/energies.pt")
for folder, name in (("energy_model", "conv_out.weight"), ("vae", "decoder.conv_in.weight")):
    file = f"{second}/{folder}/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({key: value.clone() for key, value in tensors.items() if key != name}, file + ".new", {"format": "pt"})
    os.rename(file, file + ".whole")
    os.rename(file + ".new", file)
    try:
        DiffusionPipeline.from_pretrained(second, trust_remote_code=True)
    except ValueError as error:
        assert "missing: " + name in str(error), error
    else:
        raise AssertionError(name)
    os.rename(file + ".whole", file)
"""
)


def files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_strangers_load_save_and_check_what_save_pretrained_wrote(tmp_path, monkeypatch):
    pipeline, pixels = tiny_pipeline(), torch.rand(2, 3, 8, 8)
    first, second = tmp_path / "first", tmp_path / "second"
    pipeline.save_pretrained(first)
    assert files(first) >= CODE_FILES
    torch.save(pixels, tmp_path / "pixels.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", STRANGER, str(first), str(second), str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path)
    expected = pipeline.classify(pixels).energy
    for energy in torch.load(tmp_path / "energies.pt").values():
        assert torch.equal(energy, expected)
    noise, found = torch.Generator().manual_seed(0), torch.load(tmp_path / "noised.pt")
    assert torch.equal(found["logits"], pipeline.classify(pixels, timesteps=[100], generator=noise).logits)
    assert torch.equal(found["votes"], pipeline.certify(pixels, 0.5, n0=2, n=8, generator=noise).votes)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    edited = [
        pipeline.counterfactual(pixels, **options),
        pipeline.inpaint(pixels, pixels[:, :1], **options, generator=generator()),
    ]
    for found, output in zip(torch.load(tmp_path / "edited.pt"), edited, strict=True):
        torch.testing.assert_close(found, output.images)
    moved = tmp_path / "first.moved"
    assert all((moved / name).read_text() == (second / name).read_text() for name in CODE_FILES)
    for name in ("model_index.json", "energy_model/config.json", "vae/config.json"):
        assert (moved / name).read_text() == (second / name).read_text()
        assert str(tmp_path) not in (second / name).read_text()
    loaded = EGCPipeline.from_pretrained(second)
    assert type(loaded) is EGCPipeline
    assert type(loaded.energy_model) is EGCUNet
    loaded.save_pretrained(tmp_path / "third")
    assert files(tmp_path / "third") == files(second)


def test_push_to_hub_uploads_the_code_too(tmp_path, monkeypatch):
    hub = diffusers.utils.hub_utils
    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "load_or_create_model_card", lambda *arguments, **options: ModelCard("---\n---\n"))
    monkeypatch.setattr(
        hub, "upload_folder", lambda folder_path, **options: shutil.copytree(folder_path, tmp_path / "uploaded")
    )
    tiny_pipeline().push_to_hub("someone/digits")
    assert files(tmp_path / "uploaded") >= CODE_FILES
    index = json.loads((tmp_path / "uploaded" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_egc", "EGCPipeline"]
    assert index["energy_model"] == ["unet", "EGCUNet"]


def test_a_network_of_somebody_elses_is_saved_under_its_own_name(tmp_path):
    class Mine(EGCUNet):
        __module__ = "mine"

    model = Mine(**{k: v for k, v in tiny_unet().config.items() if not k.startswith("_")})
    EGCPipeline(model, None, default_scheduler(model)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["energy_model"] == ["mine", "Mine"]
    assert not files(tmp_path) & CODE_FILES


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none_are_refused_at_loading(value, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "energy_model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] = torch.full_like(tensors["conv_in.bias"], float(value))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinite: conv_in\.bias"):
        EGCPipeline.from_pretrained(tmp_path)
