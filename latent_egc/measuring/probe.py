"""Runs analyses of one denoiser's features and writes each into the report as soon as it is finished."""

import dataclasses
import difflib
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from accelerate import Accelerator

from latent_egc.config import ConfigError, DataConfig
from latent_egc.measuring.denoisers import Denoiser
from latent_egc.measuring.probe_context import ProbeContext
from latent_egc.measuring.probe_settings import ProbeSettings
from latent_egc.measuring.report import Report
from latent_egc.measuring.results import SuiteResult
from latent_egc.measuring.suites.cka import analyse_cka
from latent_egc.measuring.suites.few_shot import analyse_few_shot
from latent_egc.measuring.suites.fusion import analyse_fusion
from latent_egc.measuring.suites.heatmap import analyse_comparison, analyse_heads, analyse_heatmap, analyse_pooling

ANALYSES: dict[str, Callable[[ProbeContext], SuiteResult]] = {
    "heatmap": analyse_heatmap,
    "pooling": analyse_pooling,
    "heads": analyse_heads,
    "cka": analyse_cka,
    "fusion": analyse_fusion,
    "few_shot": analyse_few_shot,
    "comparison": analyse_comparison,
}
PACKAGES = ("latent-egc", "torch", "diffusers", "datasets", "numpy", "scikit-learn")


def probe(
    denoiser: Denoiser,
    data: DataConfig,
    analyses: Sequence[str],
    folder: str | Path,
    settings: ProbeSettings | None = None,
    accelerator: Accelerator | None = None,
) -> Report | None:
    """Measures what a frozen denoiser's features know of a dataset's classes.

    Args:
        denoiser: on the accelerator's device.
        data: the dataset; its `image_size` gives way to the denoiser's.
        analyses: names, see `ANALYSES`. Those that the folder's report holds with the same settings are not run again.
        folder: for report.json, report.html, figures/ and the feature cache, features/.
        settings: of the analyses; None: the defaults.
        accelerator: the processes that compute the features together; the analyses are the main one's.

    Returns:
        The report, as it stands in `folder`; None in the other processes.

    Raises:
        ConfigError: an unknown analysis, a dataset without labels, a setting that cannot be used.
    """
    for analysis in analyses:
        if analysis not in ANALYSES:
            close = difflib.get_close_matches(analysis, ANALYSES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(ANALYSES)}"
            raise ConfigError(f"unknown analysis {analysis!r}; {hint}")
    settings, folder = settings or ProbeSettings(), Path(folder)
    accelerator = accelerator or Accelerator()
    if accelerator.num_processes > 1 and settings.few_shot.finetune_steps > 0:
        raise ConfigError("few_shot.finetune_steps runs in one process; leave it at 0 under a launcher")
    subject = {
        "pipeline": denoiser.source or type(denoiser.network).__name__,
        "fingerprint": denoiser.fingerprint,
        "parameters": f"{sum(p.numel() for p in denoiser.network.parameters()):,}",
        "images": f"{denoiser.image_size} x {denoiser.image_size} px",
        "dataset": data.dataset,
    }
    report = Report(folder, subject)
    context = ProbeContext(denoiser, data, settings, folder / "features")
    wanted = {name: settings.of_analysis(name) | {"data": dataclasses.asdict(context.data)} for name in analyses}
    missing = [name for name in wanted if not report.holds(name, wanted[name])]
    accelerator.wait_for_everyone()  # no process looks after the main one has written
    if missing:
        context.cache.extract(context.timesteps_of(missing), accelerator)
    if not accelerator.is_main_process:
        return None
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    for name in wanted:
        if name not in missing:
            print(f"{name}: already in the report with these settings")
            continue
        start = time.perf_counter()
        result = ANALYSES[name](context)
        seconds = time.perf_counter() - start
        report.add(name, result, wanted[name], versions, seconds)
        print(f"{name}: {result.num_samples} samples, {seconds:.1f} s")
    return report
