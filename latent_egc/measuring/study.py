"""One engine, two front doors: `evaluate` judges a pipeline, `probe` a denoiser's features, suite by suite.

A suite is a module with `Settings`, a dataclass or None, and `run(context, settings)`; adding one is its file and its
name below, of one that samples in `SAMPLING` too. Each is written into the report as soon as it is finished, and not
run again with the same settings.
"""

import difflib
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate import Accelerator

from latent_egc.config import ConfigError, DataConfig
from latent_egc.measuring.context import EvaluationContext, StudyContext
from latent_egc.measuring.denoisers import Denoiser
from latent_egc.measuring.meaning import digest_of_files, same_study
from latent_egc.measuring.probe_context import ProbeContext
from latent_egc.measuring.probe_export import check_can_save, save_probe
from latent_egc.measuring.report import Report, draw_page, plain
from latent_egc.measuring.sample_sets import sampler_of
from latent_egc.measuring.settings import PlaceSettings, StudySettings, with_sections
from latent_egc.pipelines import EGCPipeline


def _suites(names: str) -> dict[str, ModuleType]:
    return {name: import_module(f"latent_egc.measuring.suites.{name}") for name in names.split()}


EVALUATION = _suites(
    "classification calibration generation guidance solvers robustness certification corruption ood likelihood "
    "composition counterfactual"
)
SAMPLING = {"generation", "guidance", "solvers", "composition", "counterfactual"}  # of them, by the pipeline's sampler
PROBING = _suites("heatmap pooling heads cka fusion few_shot comparison")
EvaluationSettings = with_sections("EvaluationSettings", StudySettings, EVALUATION)
ProbeSettings = with_sections("ProbeSettings", PlaceSettings, PROBING)
# What numbers depend on and the reports of earlier versions do not say.
UNSAID = {"noise": "by what rule noise was drawn", "sampler": "by what sampler the images were drawn"}
PACKAGES = "latent-egc torch diffusers transformers accelerate datasets numpy scipy scikit-learn torchmetrics"


def evaluate(
    pipeline: EGCPipeline,
    data: DataConfig,
    suites: Sequence[str],
    folder: str | Path,
    settings: StudySettings | None = None,
    name: str = "pipeline",
    accelerator: Accelerator | None = None,
    with_data_images: bool = True,
) -> Report:
    """Measures a pipeline on a dataset's validation split.

    Args:
        pipeline: what is judged.
        data: the dataset; its `image_size` gives way to the pipeline's.
        suites: names, see `EVALUATION`. Those that the folder's report holds with the same settings are not run again.
        folder: for report.json, report.html and figures/.
        settings: `EvaluationSettings`; None: the defaults.
        name: what the report calls the pipeline, its path for example.
        accelerator: the processes that share the work; None: those that a launcher started, or this one.
        with_data_images: whether report.html shows the pictures that hold images of the dataset.

    Returns:
        The report, as it stands in `folder`.

    Raises:
        ConfigError: an unknown suite, a dataset that does not fit the pipeline, a setting that cannot be used.
    """
    chosen, accelerator = _chosen(suites, EVALUATION), accelerator or Accelerator()
    pipeline.to(accelerator.device)
    pipeline.energy_model.eval()
    context = EvaluationContext(pipeline, data, settings or EvaluationSettings(), accelerator)
    return _study(context, chosen, Path(folder), name, with_data_images)


def probe(
    denoiser: Denoiser,
    data: DataConfig,
    suites: Sequence[str],
    folder: str | Path,
    settings: PlaceSettings | None = None,
    accelerator: Accelerator | None = None,
    save: Path | None = None,
) -> Report:
    """Measures what a frozen denoiser's features know of a dataset's classes.

    Args:
        denoiser: on the accelerator's device.
        data, suites, folder, settings: as for `evaluate`, with `PROBING` and `ProbeSettings`; the feature cache lies
            in the folder too, as features/.
        accelerator: the processes that compute the features together; the suites are the main one's.
        save: a folder for the best linear probe as a classifier of transformers; None: it is not saved.

    Returns:
        The report, as it stands in `folder`; in the other processes, as it stood before.

    Raises:
        ConfigError: an unknown suite, a dataset without labels, a setting that cannot be used, a probe that cannot be
            saved.
    """
    chosen, accelerator = _chosen(suites, PROBING), accelerator or Accelerator()
    context = ProbeContext(denoiser, data, settings or ProbeSettings(), accelerator, Path(folder) / "features")
    if save is not None:
        check_can_save(context, save)
    report = _study(context, chosen, Path(folder), denoiser.source or type(denoiser.network).__name__)
    if save is not None:
        context.cache.extract(context.timesteps_of([]), accelerator)  # nothing to do where a suite has been measured
        if accelerator.is_main_process:
            save_probe(context, save)
    return report


def _chosen(names: Sequence[str], suites: Mapping[str, ModuleType]) -> dict[str, ModuleType]:
    for name in names:
        if name not in suites:
            close = difflib.get_close_matches(name, suites, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(suites)}"
            raise ConfigError(f"unknown suite {name!r}; {hint}")
    return {name: suites[name] for name in names}


def _study(
    context: StudyContext, suites: dict[str, ModuleType], folder: Path, name: str, with_data_images: bool = True
) -> Report:
    """Runs what the folder's report does not hold yet, each suite into the report as soon as it is finished."""
    accelerator = context.accelerator
    report = Report(folder, context.subject(name), with_data_images)
    wanted = {suite: _suite_settings(context, suite) for suite in suites}
    held = {suite: report.settings_of(suite) or {} for suite in suites}
    missing = [suite for suite in suites if not same_study(held[suite], wanted[suite], _defaults(context, suite))]
    accelerator.wait_for_everyone()  # no process looks after the main one has written
    context.prepare(missing)
    if not (context.runs_on_all_processes or accelerator.is_main_process):
        return report
    for suite, module in suites.items():
        unfinished = folder / f"unfinished_{suite}"
        if suite not in missing:
            shutil.rmtree(unfinished, ignore_errors=True)  # left where its page could not be drawn
            accelerator.print(f"{suite}: already in the report with these settings")
            continue
        for key, what in UNSAID.items():
            if held[suite] and key in wanted[suite] and key not in held[suite]:
                accelerator.print(f"{suite}: its report does not say {what}, measured anew")
        # What a stopped suite left is used again by the same subject with settings of the same meaning alone.
        origin = json.dumps([report.content["subject"]["fingerprint"], wanted[suite]], sort_keys=True)
        context.parts = unfinished / hashlib.sha256(origin.encode()).hexdigest()[:16]
        start = time.perf_counter()
        result = module.run(context, None if module.Settings is None else getattr(context.settings, suite))
        seconds = time.perf_counter() - start
        if accelerator.is_main_process:
            report.add(suite, result, wanted[suite], _versions(), seconds)
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.print(f"{suite}: {result.num_samples} samples, {seconds:.1f} s")
    if accelerator.is_main_process and report.content["suites"]:
        draw_page(folder, with_data_images)  # also where nothing was measured: other pictures may be shown
    if context.runs_on_all_processes:
        accelerator.wait_for_everyone()
    return report


def _suite_settings(context: StudyContext, suite: str) -> dict[str, Any]:
    """What a suite's numbers depend on: its settings, the images, and the contents of the files that it names."""
    values = context.settings.of_suite(suite)
    section = values.get(suite)  # for `pooling`, which has none, the setting of that name
    section = section.values() if isinstance(section, dict) else ()
    named = [v for value in section for v in (value if isinstance(value, tuple) else (value,))]
    digests = {}  # of weights, data, a pipeline; a mistake in a name is left to the suite itself
    for value in named:
        digests |= digest_of_files(value) if isinstance(value, str) else {}
    sampler = {"sampler": sampler_of(context.pipeline)} if suite in SAMPLING else {}
    return plain(values | context.identity() | sampler | ({"files": digests} if digests else {}))


def _defaults(context: StudyContext, suite: str) -> dict[str, Any]:
    """What a suite's settings are where nothing is said; plain values."""
    return plain(type(context.settings)().of_suite(suite))


def _versions() -> dict[str, str]:
    """Of Python and of the installed packages that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES.split(), "adversarial-robustness-toolbox"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # one of an extra
    return versions
