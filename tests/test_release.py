"""The networks that come with a checkout: small, licensed, without what is not ours, and still what was measured."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from tiny import ROOT, SHARED, WITHOUT_THE_PACKAGE, needs_shared

from latent_egc import EGCPipeline
from latent_egc.config import load_data_config
from latent_egc.data.sources import load_splits
from latent_egc.data.views import central_view
from latent_egc.demo.opening import RELEASED, names_at_hand

FOLDERS = sorted(index.parent for index in (ROOT / "release").glob("*/model_index.json"))
MAXIMAL_BYTES = 16 * 2**20  # of a file
NUM_IMAGES = 200

released = pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])


def load(folder):
    """A released pipeline, its autoencoder from ../shared where it only names one."""
    named = json.loads((folder / "model_index.json").read_text()).get("autoencoder")
    if named is None:
        return EGCPipeline.from_pretrained(folder)
    if not SHARED.is_dir():
        pytest.skip(f"needs {named}")
    return EGCPipeline.from_pretrained(folder, vae=AutoencoderTiny.from_pretrained(SHARED / "taesd"))


@released
def test_it_is_small_and_holds_half_floats_and_nobody_elses_weights(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert max(file.stat().st_size for file in files) <= MAXIMAL_BYTES
    (weights,) = (file for file in files if file.suffix == ".safetensors")
    tensors = load_file(weights)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@released
def test_its_card_says_licence_data_and_what_was_measured(folder):
    card = (folder / "README.md").read_text()
    assert re.search(r"^license: \S+$", card, re.MULTILINE)
    for heading in ("## Trained on", "### classification, ", "### calibration, ", "### generation, "):
        assert f"\n{heading}" in card
    for file in folder.rglob("*.*"):
        if file.suffix in (".md", ".json"):
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|mnt|data)/", file.read_text()), file


@needs_shared
@released
def test_it_classifies_as_its_card_says(folder, tmp_path, monkeypatch):
    """Within four deviations of what was measured on more images, in single precision."""
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    card = (folder / "README.md").read_text()
    expected = float(re.search(r"top-1 accuracy \| ([\d.]+) %", card)[1]) / 100
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    data = load_data_config(tmp_path / "run.yaml")
    split = load_splits(data, pipeline.energy_model.config.num_classes).validation
    images = torch.stack([central_view(split.image(row), data.image_size) for row in range(NUM_IMAGES)])
    logits = pipeline.classify(images / 2 + 0.5).logits
    accuracy = (logits.argmax(dim=1).numpy() == split.labels[:NUM_IMAGES]).mean()
    assert abs(accuracy - expected) < 4 * (expected * (1 - expected) / NUM_IMAGES) ** 0.5


@released
def test_it_samples_the_class_that_is_asked_for(folder):
    """By its own classifier, which is what guides it."""
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    names = list(pipeline.id2label.values())[:4]
    images = pipeline(names, num_images_per_label=2, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(pipeline.image_size,) * 2] * 8
    found = [label for (label,) in pipeline.classify(images, top_k=1).labels]
    assert sum(label == names[i // 2] for i, label in enumerate(found)) >= 6


def test_right_after_a_clone_the_demo_has_photographs_without_a_download(monkeypatch):
    def refuse(*_):
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(ROOT)
    (name,) = (name for name in names_at_hand() if RELEASED in Path(name).parents)
    pipeline = EGCPipeline.from_pretrained(name)
    assert pipeline.vae is None
    assert "automobile" in pipeline.id2label.values()


# The folder's code is of the day on which it was exported; the package's has moved on since.
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from diffusers import DiffusionPipeline
folder, inputs, outputs = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, vae=None, autoencoder=None, trust_remote_code=True)
assert type(pipeline.energy_model).__module__.startswith("diffusers_modules")
latents = torch.load(inputs)
with torch.no_grad():
    torch.save(tuple(pipeline.energy_model(latents, torch.tensor([0, 500]))[:2]), outputs)
"""
)


@released
def test_its_own_code_says_what_the_package_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    network = EGCPipeline.from_pretrained(folder, vae=None, autoencoder=None).energy_model
    config = network.config
    latents = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
    torch.save(latents, tmp_path / "inputs.pt")
    files = [str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    subprocess.run([sys.executable, "-c", STRANGER, *files], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = network(latents, torch.tensor([0, 500]))[:2]
    for own, value in zip(torch.load(tmp_path / "outputs.pt"), expected, strict=True):
        torch.testing.assert_close(own, value)
