"""Suite `ood`: do energies and probabilities tell images of another dataset from those of the pipeline's own?

Out-of-distribution is the positive class, and a higher score means more of it.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm.auto import tqdm

from latent_egc.config import ConfigError, file_path, load_data_config, within
from latent_egc.data.sources import load_splits
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table


@dataclass(frozen=True)
class Settings:
    """Detection of images from a second dataset."""

    data: str | None = file_path()  # YAML file whose data section describes it; its validation split is taken
    num_images: int | None = within(None, 1)  # of it, drawn by the seed; null: all
    timesteps: tuple[int, ...] = within((10, 50, 100, 200, 400), 0)  # noise levels at which the energy is read too


def fpr_at_95(is_ood: np.ndarray, scores: np.ndarray) -> float:
    """Share of out-of-distribution images accepted by the threshold that accepts 95 % of the others."""
    threshold = np.quantile(scores[is_ood == 0], 0.95, method="inverted_cdf")
    return float((scores[is_ood == 1] <= threshold).mean())


STATISTICS = {"AUROC": roc_auc_score, "AUPR": average_precision_score, "FPR95": fpr_at_95}


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """AUROC, AUPR and FPR95 of the energy, the maximum probability, and the energy at several noise levels.

    Raises:
        ConfigError: no second dataset, or one that cannot be loaded, or a timestep out of range.
    """
    num_timesteps = context.model.config.num_train_timesteps
    if settings.data is None:
        raise ConfigError("ood.data must name a YAML file whose data section describes a second dataset")
    if max(settings.timesteps, default=0) >= num_timesteps:
        raise ConfigError(f"ood.timesteps must be below {num_timesteps}, got {list(settings.timesteps)}")
    data = replace(load_data_config(settings.data), image_size=context.pipeline.image_size)
    table = load_splits(data, None).validation  # its labels play no part
    rows = context.choose(np.arange(len(table)), settings.num_images)
    rows = context.readable(table, rows, data.skip_corrupt)
    other = context.encode(table, rows, "encode, out of distribution")

    own_scores = _scores(context, settings, context.latents, context.rows)
    other_scores = _scores(context, settings, other, rows)
    is_ood = np.concatenate([np.zeros(len(context.latents)), np.ones(len(other))])
    found: dict[str, dict[str, Metric]] = {}
    for name in tqdm(own_scores, desc="resample", leave=False, disable=not context.accelerator.is_main_process):
        scores = np.concatenate([own_scores[name], other_scores[name]])
        found[name] = {
            title: context.with_interval(statistic, is_ood, scores, percent=True, strata=is_ood)
            for title, statistic in STATISTICS.items()
        }
    return SuiteResult(
        num_samples=len(is_ood),
        metrics={f"{title}, {name}": metric for name, row in found.items() for title, metric in row.items()},
        tables=[Table("Detection", ["score", *STATISTICS], [[name, *row.values()] for name, row in found.items()])],
        figures=_figures(settings, own_scores, other_scores, found),
        notes=[
            f"{len(context.latents)} images of the pipeline's validation split against {len(other)} of {settings.data} "
            f"({data.dataset}), out-of-distribution being the positive class; by chance AUROC is 50 %, AUPR "
            f"{100 * len(other) / len(is_ood):.1f} %, FPR95 95 %.",
            f"Both are brought to {context.pipeline.image_size} px; where one is enlarged for that, its smoothness is "
            "a cue too. The energy at a timestep is that of latents noised to it, with one draw of noise an image.",
        ],
    )


def _scores(
    context: EvaluationContext, settings: Settings, latents: torch.Tensor, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Name -> (M,), higher = less like the pipeline's own images."""
    energy, logits = context.energies_and_logits(latents, 0)
    scores = {"energy, clean latents": energy.numpy()}
    if context.num_classes is not None:
        # In float64: in float32 every confident image would have probability 1.
        scores["maximum probability"] = 1 - logits.double().softmax(dim=1).amax(dim=1).numpy()
    for timestep in settings.timesteps:
        noised, _ = context.energies_and_logits(latents, timestep, rows)
        scores[f"energy at timestep {timestep}"] = noised.numpy()
    return scores


def _figures(
    settings: Settings, own: dict[str, np.ndarray], other: dict[str, np.ndarray], found: dict[str, dict[str, Metric]]
) -> list[Figure]:
    figures = []
    for i, name in enumerate(list(own)[:2]):
        picture = plots.histograms({"own": own[name], "out of distribution": other[name]}, f"score by {name}")
        caption = f"Score of both datasets by {name} (higher = stranger; a probability is taken from 1)."
        figures.append(Figure(f"scores_{i}", caption, picture))
    timesteps = settings.timesteps
    if len(timesteps) > 1:
        aurocs = [found[f"energy at timestep {timestep}"]["AUROC"] for timestep in timesteps]
        series = {"energy of noised latents": aurocs}
        picture = plots.lines(timesteps, series, "timestep", "AUROC", (0, 1.02), (0.5, "chance"))
        caption = "AUROC of the energy against the noise level, with 95 % intervals."
        figures.append(Figure("timesteps", caption, picture))
    return figures
