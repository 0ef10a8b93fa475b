"""What the tests are given."""

import datasets
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import tiny_pipeline, write_images


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps one state a process; what uses this begins and ends without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def evaluation_context(tmp_path, monkeypatch):
    """A function: settings as overrides, and options of `tiny_pipeline` -> an EvaluationContext on 7 images."""
    # Only here: tests of the other parts shall not need the packages of the extra `eval`.
    from latent_egc.measuring import parse_settings
    from latent_egc.measuring.context import EvaluationContext

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = write_images(tmp_path / "images")

    def make(*overrides: str, **options):
        pipeline = tiny_pipeline(names=("cat", "cow", "dog"), **options)
        return EvaluationContext(
            pipeline, data, parse_settings(["num_resamples=20", *overrides]), Accelerator(cpu=True)
        )

    return make


FAST_PROBE = ["timesteps=[0,90]", "poolings=[1,2]", "num_resamples=20", "linear.c=[0.01]", "linear.held_out=0.3"]


@pytest.fixture
def probe_context(tmp_path, monkeypatch):
    """A function: settings as overrides, a denoiser (default: the tiny one) -> a ProbeContext on 14 + 7 images."""
    from latent_egc.measuring.denoisers import load_denoiser
    from latent_egc.measuring.probe_context import ProbeContext
    from latent_egc.measuring.probe_settings import parse_settings

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tiny_pipeline(names=("cat", "cow", "dog")).save_pretrained(tmp_path / "pipeline")
    data = write_images(tmp_path / "images")

    def make(*overrides: str, denoiser=None, extract: bool = True):
        denoiser = denoiser or load_denoiser(str(tmp_path / "pipeline"))
        context = ProbeContext(denoiser, data, parse_settings([*FAST_PROBE, *overrides]), tmp_path / "features")
        if extract:
            context.cache.extract(context.settings.timesteps, Accelerator(cpu=True))
        return context

    return make
