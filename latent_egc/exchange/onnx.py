"""The classifier as an ONNX file: pixels in [0, 1] to logits and energy, in any ONNX runtime, without PyTorch.

    session = onnxruntime.InferenceSession("classifier.onnx")
    logits, energy = session.run(None, {"pixel_values": pixels})

It is the pass that `EGCPipeline.classify` makes: the autoencoder's encoder and the energy network at timestep 0. What
comes before it, an image cropped to the pipeline's size, is the caller's: `latent_egc.pipelines.images.crop_images`.
"""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from latent_egc.atomic import check_unoccupied, replace_folder
from latent_egc.config import ConfigError
from latent_egc.pipelines import EGCPipeline


class Classifier(nn.Module):
    """What is exported, of a pipeline with classes; the networks are its own parts, so that it has their weights."""

    def __init__(self, pipeline: EGCPipeline) -> None:
        super().__init__()
        self.energy_model, self.vae = pipeline.energy_model, pipeline.vae
        self._pipeline = pipeline

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixel_values (N, 3, H, W) in [0, 1] -> logits (N, K), energy (N,)."""
        output = self.energy_model(self._pipeline.encode(2 * pixel_values - 1), 0)
        return output.logits, output.energy


def export_onnx(pipeline: EGCPipeline, folder: Path) -> Path:
    """Writes the classifier of a pipeline, for batches of any size, with its class names as metadata.

    Args:
        pipeline: with classes, in float32 on the CPU.
        folder: what to write; must not exist, or be empty.

    Returns:
        FOLDER/classifier.onnx, beside which weights of more than 2 GB lie in a file of their own. Its input is
        `pixel_values` (N, 3, H, W) in [0, 1], H = W = `image_size`; its outputs are `logits` (N, K) and `energy` (N,);
        all float32. Its metadata has `id2label`, as JSON.

    Raises:
        ConfigError: a pipeline without classes, `folder` holds something, or a package of the extra `onnx` is missing.
        CheckpointError: writing failed; nothing half-written stays.
    """
    if pipeline.energy_model.config.num_classes is None:
        raise ConfigError("--onnx exports the classifier, and this model was trained without classes")
    if find_spec("onnxscript") is None:  # torch would ask for it in the midst of its work
        raise ConfigError("--onnx needs the packages of an extra: pip install 'latent-egc[onnx]'")
    check_unoccupied(folder)
    pixel_values = torch.rand(2, 3, pipeline.image_size, pipeline.image_size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts about each other
        classifier = Classifier(pipeline).eval()
        graph = torch.export.export(classifier, (pixel_values,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        program = torch.onnx.export(
            graph, input_names=["pixel_values"], output_names=["logits", "energy"], dynamo=True, verbose=False
        )
    program.model.metadata_props["id2label"] = json.dumps(pipeline.id2label)
    replace_folder(folder, lambda unfinished: program.save(unfinished / "classifier.onnx"))
    return folder / "classifier.onnx"
