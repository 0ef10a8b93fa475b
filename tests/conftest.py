"""What the tests are given."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import tiny_pipeline, write_images
from tiny_studies import FAST_EVALUATION, FAST_PROBE, Brightness


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state a process; every test ends without one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def evaluation_context(tmp_path, monkeypatch):
    """A function: settings as overrides, and options of `tiny_pipeline` -> an EvaluationContext on 7 images."""
    # Only here: tests of the other parts shall not need the packages of the extra `eval`.
    from latent_egc.measuring.context import EvaluationContext
    from latent_egc.measuring.study import EvaluationSettings

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = write_images(tmp_path / "images")

    def make(*overrides: str, **options):
        pipeline = tiny_pipeline(names=("cat", "cow", "dog"), **options)
        settings = EvaluationSettings.parse(["num_resamples=20", *overrides])
        return EvaluationContext(pipeline, data, settings, Accelerator(cpu=True))

    return make


@pytest.fixture
def run(evaluation_context, tmp_path):
    """A function: suites and settings -> the report on the tiny pipeline, always in the same folder."""
    from latent_egc.measuring.study import EvaluationSettings, evaluate

    context = evaluation_context()

    def run(suites, *overrides, pipeline=context.pipeline, **options):
        settings = EvaluationSettings.parse([*FAST_EVALUATION, *overrides])
        return evaluate(pipeline, context.data, suites, tmp_path / "report", settings, "tiny", **options)

    return run


@pytest.fixture
def probe_context(tmp_path, monkeypatch):
    """A function: settings as overrides, a denoiser (default: the tiny one) -> a ProbeContext on 14 + 7 images."""
    from latent_egc.measuring.denoisers import load_denoiser
    from latent_egc.measuring.probe_context import ProbeContext
    from latent_egc.measuring.study import ProbeSettings

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tiny_pipeline(names=("cat", "cow", "dog")).save_pretrained(tmp_path / "pipeline")
    data = write_images(tmp_path / "images")

    def make(*overrides: str, denoiser=None, extract: bool = True):
        denoiser = denoiser or load_denoiser(str(tmp_path / "pipeline"))
        settings, accelerator = ProbeSettings.parse([*FAST_PROBE, *overrides]), Accelerator(cpu=True)
        context = ProbeContext(denoiser, data, settings, accelerator, tmp_path / "features")
        if extract:
            context.cache.extract(settings.timesteps, accelerator)
        return context

    return make


@pytest.fixture
def extractor(tmp_path) -> str:
    """A TorchScript file that gives an image's brightness: 6 features."""
    torch.jit.script(Brightness()).save(tmp_path / "brightness_features.pt")
    return str(tmp_path / "brightness_features.pt")
