"""Runs suites over one pipeline and writes each into the report as soon as it is finished."""

import dataclasses
import difflib
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.autoencoders import fingerprint
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.report import Report
from latent_egc.measuring.results import SuiteResult
from latent_egc.measuring.settings import EvaluationSettings
from latent_egc.measuring.suites.calibration import evaluate_calibration
from latent_egc.measuring.suites.classification import evaluate_classification
from latent_egc.measuring.suites.corruption import evaluate_corruption
from latent_egc.measuring.suites.generation import evaluate_generation
from latent_egc.measuring.suites.likelihood import evaluate_likelihood
from latent_egc.measuring.suites.ood import evaluate_ood
from latent_egc.pipelines import EGCPipeline
from latent_egc.training.checkpoints import resolve_pipeline


def _evaluate_robustness(context: EvaluationContext) -> SuiteResult:
    # Only here: the library of attacks takes seconds to import, and the other suites do without it.
    try:
        from latent_egc.measuring.suites.robustness import evaluate_robustness
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--suite robustness needs one more package ({error}): pip install 'latent-egc[eval]'"
        ) from error
    return evaluate_robustness(context)


SUITES: dict[str, Callable[[EvaluationContext], SuiteResult]] = {
    "classification": evaluate_classification,
    "calibration": evaluate_calibration,
    "generation": evaluate_generation,
    "robustness": _evaluate_robustness,
    "corruption": evaluate_corruption,
    "ood": evaluate_ood,
    "likelihood": evaluate_likelihood,
}
PACKAGES = (
    "latent-egc",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "scipy",
    "scikit-learn",
    "torchmetrics",
    "adversarial-robustness-toolbox",
)


def evaluate(
    pipeline: EGCPipeline,
    data: DataConfig,
    suites: Sequence[str],
    folder: str | Path,
    settings: EvaluationSettings | None = None,
    name: str = "pipeline",
    accelerator: Accelerator | None = None,
    with_data_images: bool = True,
) -> Report:
    """Measures a pipeline on a dataset's validation split.

    Args:
        pipeline: what is judged.
        data: the dataset; its `image_size` gives way to the pipeline's.
        suites: names, see `SUITES`. Those that the folder's report holds with the same settings are not run again.
        folder: for report.json, report.html and figures/.
        settings: of the suites; None: the defaults.
        name: what the report calls the pipeline, its path for example.
        accelerator: the processes that share the work; None: those that a launcher started, or this one.
        with_data_images: whether report.html shows the pictures that hold images of the dataset.

    Returns:
        The report, as it stands in `folder`.

    Raises:
        ConfigError: an unknown suite, a dataset that does not fit the pipeline, a setting that cannot be used.
    """
    for suite in suites:
        if suite not in SUITES:
            close = difflib.get_close_matches(suite, SUITES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(SUITES)}"
            raise ConfigError(f"unknown suite {suite!r}; {hint}")
    settings = settings or EvaluationSettings()
    accelerator = accelerator or Accelerator()
    pipeline.to(accelerator.device)
    pipeline.energy_model.eval()
    report = Report(Path(folder), _subject(name, pipeline, data, accelerator), with_data_images)
    context = EvaluationContext(pipeline, data, settings, accelerator)
    for suite in dict.fromkeys(suites):
        # The images decide every suite's numbers, so they are among its settings; so does what named files hold.
        suite_settings = settings.of_suite(suite)
        suite_settings |= {"data": dataclasses.asdict(context.data), "files": _digests(suite_settings[suite])}
        finished = report.holds(suite, suite_settings)
        accelerator.wait_for_everyone()  # no process looks after the main one has written
        if finished:
            accelerator.print(f"{suite}: already in the report with these settings")
            continue
        # What a stopped suite left is used again by the same pipeline with the same settings alone.
        origin = json.dumps([report.content["subject"]["fingerprint"], suite_settings], sort_keys=True)
        unfinished = report.folder / f"unfinished_{suite}"
        context.parts = unfinished / hashlib.sha256(origin.encode()).hexdigest()[:16]
        start = time.perf_counter()
        result = SUITES[suite](context)
        seconds = time.perf_counter() - start
        if accelerator.is_main_process:
            report.add(suite, result, suite_settings, _versions(), seconds)
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.print(f"{suite}: {result.num_samples} samples, {seconds:.1f} s")
        accelerator.wait_for_everyone()
    if accelerator.is_main_process and report.content["suites"]:
        report.write_html()  # also where nothing was measured: the pictures that are shown may be others
    return report


def _subject(name: str, pipeline: EGCPipeline, data: DataConfig, accelerator: Accelerator) -> dict[str, Any]:
    model = pipeline.energy_model
    return {
        "pipeline": name,
        "fingerprint": f"{fingerprint(model)} with {fingerprint(pipeline.vae)}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "images": f"{pipeline.image_size} x {pipeline.image_size} px",
        "dataset": f"{data.dataset}, validation split",
        "device": f"{accelerator.num_processes} process(es) on {accelerator.device.type}",
    }


def _digests(section: dict[str, Any]) -> dict[str, str]:
    """Path -> SHA-256 of every file that a suite's section of the settings names: weights, data, a pipeline."""
    values = [v for value in section.values() for v in (value if isinstance(value, tuple) else (value,))]
    files: list[Path] = []
    for path in (Path(value) for value in values if isinstance(value, str)):
        try:
            files += [path] if path.is_file() else sorted(resolve_pipeline(path).rglob("*.safetensors"))
        except FileNotFoundError:
            continue  # neither a file nor a pipeline: a Hub id, or a mistake that the suite itself names
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _versions() -> dict[str, str]:
    installed = {name: metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {"python": platform.python_version(), **installed}


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
