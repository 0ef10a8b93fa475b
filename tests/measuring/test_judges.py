"""Judges of the size that they were trained on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_studies import measure

from latent_egc.config import ConfigError
from latent_egc.measuring.judges import load_judge
from latent_egc.measuring.suites import composition, generation


class OfItsSize(torch.nn.Module):
    """Logits by the brightness of three corners; images of another size than 4 x 4 are an error."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[2] != 4 or images.shape[3] != 4:
            raise RuntimeError("4 x 4 wanted")
        return images.mean(dim=1)[:, [0, 0, 3], [0, 3, 0]]


@pytest.fixture
def judge(tmp_path):
    torch.jit.script(OfItsSize()).save(tmp_path / "judge.pt")
    return str(tmp_path / "judge.pt")


def test_images_are_made_as_small_as_the_judge_knows_them(evaluation_context, judge):
    """As Pillow does it, which keeps what is finer from coming back as another pattern."""
    context = evaluation_context()
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    images[0] = 255 * (torch.arange(8) % 2)  # stripes of one pixel: grey, not black or white
    expected = []
    for image in images:
        small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((4, 4), Image.Resampling.BILINEAR)
        expected.append(torch.from_numpy(np.asarray(small)).permute(2, 0, 1) / 255)
    scores = load_judge(context, judge, "key", 4).scores(images)
    np.testing.assert_allclose(scores, OfItsSize()(torch.stack(expected)).numpy(), atol=1.1 / 255)
    assert 0.3 < scores[0].min() <= scores[0].max() < 0.7


@pytest.mark.parametrize("suite", [generation, composition])
def test_suites_take_its_size(suite, evaluation_context, judge, extractor):
    name = suite.__name__.rpartition(".")[2]
    settings = [f"{name}.judge={judge}", f"{name}.num_samples=5"]
    settings += [f"generation.features=[{extractor}]"] if suite is generation else ["composition.num_corrector_steps=1"]
    result = measure(suite, evaluation_context(*settings, f"{name}.judge_size=4"))
    assert "the judge's accuracy on decoded validation images" in result.metrics
    message = rf"{name}.judge: .* judges no images of 8 px \(.*4 x 4 wanted\); {name}.judge_size is the size"
    with pytest.raises(ConfigError, match=message):
        measure(suite, evaluation_context(*settings))


@pytest.mark.parametrize("suite", [generation, composition])
def test_suites_sample_in_the_pipelines_own_number_of_steps(suite, evaluation_context, extractor):
    name = suite.__name__.rpartition(".")[2]
    settings = [f"{name}.num_samples=5", f"{name}.num_judge_images=14"]
    settings += [f"generation.features=[{extractor}]"] if suite is generation else ["composition.num_corrector_steps=1"]
    found = []
    for steps in ("null", "3", "4"):
        context = evaluation_context(*settings, f"{name}.num_inference_steps={steps}")
        context.pipeline.register_to_config(default_num_inference_steps=3)
        found.append(measure(suite, context))
    own, three, four = ({figure.name: figure.png for figure in result.figures}["samples"] for result in found)
    assert own == three != four
    assert any("with 3 steps" in note for note in found[0].notes)


def test_images_are_resized_a_batch_at_a_time(evaluation_context, judge, monkeypatch):
    """All samples of a study as floating-point numbers would not fit into memory."""
    context, sizes, resize = evaluation_context("batch_size=2"), [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, *size, **how: sizes.append(len(x)) or resize(x, *size, **how))
    load_judge(context, judge, "key", 4).scores(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    assert sizes == [2, 2, 1]
