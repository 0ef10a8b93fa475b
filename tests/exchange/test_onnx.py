"""The ONNX classifier says what `classify` says, for every backbone, kind of autoencoder and batch."""

import json

import numpy as np
import pytest
import torch
from command_line import fails
from tiny import TINY_BACKBONES, tiny_kl, tiny_pipeline, tiny_taesd

from latent_egc import EGCPipeline
from latent_egc.commands import main
from latent_egc.exchange import onnx as onnx_module
from latent_egc.pipelines.schedulers import default_scheduler


@pytest.mark.parametrize(
    ("backbone", "make_vae", "options"),
    [("unet", tiny_kl, {}), ("transformer", tiny_taesd, {"head": "inner", "class_embedding": True})],
)
def test_onnx_is_classify(backbone, make_vae, options, tmp_path, capsys):
    """Batches of 1 and of 65 too: diffusers' layers branch on a batch of 64, and the graph must not."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the packages of the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the packages of the extra onnx")
    model = TINY_BACKBONES[backbone](**options).eval()
    pipeline = EGCPipeline(model, make_vae(), default_scheduler(model), dict(enumerate(["cat", "dog", "cow"])))
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert main(["export", str(tmp_path / "pipeline"), str(tmp_path / "classifier"), "--onnx"]) == 0
    file = tmp_path / "classifier" / "classifier.onnx"
    assert f"exported to {file}" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["id2label"]) == {"0": "cat", "1": "dog", "2": "cow"}
    for num_images in (1, 3, 65):
        pixels = torch.rand(num_images, 3, 8, 8)
        expected = pipeline.classify(pixels)
        logits, energy = session.run(["logits", "energy"], {"pixel_values": pixels.numpy()})
        np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4)
        np.testing.assert_allclose(energy, expected.energy.numpy(), atol=1e-4)


def test_onnx_errors(tmp_path, monkeypatch, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_pipeline(num_classes=None, energy_channels=3).save_pretrained(tmp_path / "unlabelled")
    out = tmp_path / "classifier"
    fails(capsys, ["export", tmp_path / "unlabelled", out, "--onnx"], "trained without classes")
    monkeypatch.setattr(onnx_module, "find_spec", lambda name: None)
    fails(capsys, ["export", tmp_path / "pipeline", out, "--onnx"], "pip install 'latent-egc[onnx]'")
    assert not out.exists()
