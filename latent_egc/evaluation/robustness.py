"""Suite `robustness`: accuracy of the whole classifier, pixels to label, under white-box attacks.

Every attack goes end to end through the autoencoder. A defence that merely hides its gradient looks robust too, so
checks after Athalye et al. (ICML 2018) and Carlini et al. (arXiv 1902.06705) stand beside the numbers.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from latent_egc.config import ConfigError
from latent_egc.evaluation import plots
from latent_egc.evaluation.attacks import (
    Attacker,
    DenoisedClassifier,
    PixelClassifier,
    Threat,
    largest_change,
    threats,
)
from latent_egc.evaluation.context import EvaluationContext
from latent_egc.evaluation.results import Figure, Metric, SuiteResult, Table
from latent_egc.pipelines import EGCPipeline
from latent_egc.run_folder import pipeline_folder

TOLERANCE = 0.02  # of accuracy, by which a check may be missed before it fails: attacks are random
Attack = Callable[[Attacker, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What an attack left: images (N, 3, H, W), whether each is still classified right, its cross entropy (N,)."""

    images: np.ndarray
    right: np.ndarray
    losses: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share still right."""
        return float(self.right.mean())


class Trial:
    """Images under attack, shared among the processes."""

    def __init__(self, context: EvaluationContext, num_images: int) -> None:
        self.context = context
        positions = context.choose(np.arange(len(context.rows)), num_images)
        rows, table = context.rows[positions], context.splits.validation
        self.images = context.over(
            len(rows), lambda batch: context.pixel_values(table, rows[list(batch)]) / 2 + 0.5, "images"
        ).numpy()
        self.labels = context.labels[positions]

    def attacker(self, network: PixelClassifier) -> Attacker:
        """A network under attack."""
        shape = self.images.shape[1:]
        return Attacker(network, shape, self.context.num_classes, self.context.accelerator.device)

    def run(self, attacker: Attacker, attack: Attack, description: str, count: int | None = None) -> Outcome:
        """Attacks the first `count` images (None: all) that are right without attack; the others stay as they are."""
        count = min(count or len(self.images), len(self.images))
        shape = self.images.shape[1:]

        def attacked(batch: range) -> torch.Tensor:
            images, labels = self.images[list(batch)].copy(), self.labels[list(batch)]
            # The library draws from the global generators; this makes a batch's draws its own.
            np.random.seed((self.context.settings.seed + batch[0]) % 2**32)
            torch.manual_seed(self.context.settings.seed + batch[0])
            right_before, _ = attacker.judge(images, labels)
            if right_before.any():
                images[right_before] = attack(attacker, images[right_before], labels[right_before])
            right, losses = attacker.judge(images, labels)
            columns = np.stack([right & right_before, losses], axis=1)
            flat = np.concatenate([columns, images.reshape(len(images), -1)], axis=1)
            return torch.from_numpy(flat.astype(np.float32))

        rows = self.context.over(count, attacked, description).numpy()
        return Outcome(rows[:, 2:].reshape(count, *shape), rows[:, 0] > 0.5, rows[:, 1])

    def run_within(self, attacker: Attacker, method: str, threat: Threat, count: int | None = None, **how) -> Outcome:
        """One of `Attacker`'s methods within a threat."""
        outcome = self.run(
            attacker, lambda a, x, y: getattr(a, method)(x, y, threat, **how), f"{method} {threat}", count
        )
        change = largest_change(self.images[: len(outcome.images)], outcome.images, threat)
        assert change <= threat.eps * (1 + 1e-3) + 1e-6, f"{method} moved an image by {change}, allowed is {threat}"
        return outcome


@contextmanager
def _frozen(pipelines: Sequence[EGCPipeline]) -> Iterator[None]:
    """Parameters need no gradient while the images are attacked."""
    networks = [network for p in pipelines for network in (p.energy_model, p.vae) if network is not None]
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def evaluate_robustness(context: EvaluationContext) -> SuiteResult:
    """FGSM, PGD and AutoAttack by norm and eps, checks of gradient masking, denoised classification under attack.

    Raises:
        ConfigError: a model without classes, a step without gradient, or a plain classifier that does not fit.
    """
    context.require_classes("robustness")
    settings = context.settings.robustness
    pipelines = {"EGC": context.pipeline}
    if settings.plain is not None:
        pipelines["plain"] = _load_plain(context, settings.plain)
    with _frozen(list(pipelines.values())):
        trial = Trial(context, settings.num_images)
        attackers = {name: trial.attacker(PixelClassifier(pipeline)) for name, pipeline in pipelines.items()}
        metrics, table, figures = _accuracy_under_attack(trial, attackers)
        metrics |= _autoattack(trial, attackers)
        tables = [table, _checks(trial, attackers)]
        if settings.denoise_timesteps:
            tables.append(_denoised(trial, attackers["EGC"]))
    return SuiteResult(len(trial.labels), metrics, tables, figures, _notes(context))


def _load_plain(context: EvaluationContext, path: str) -> EGCPipeline:
    """The pipeline of a plainly trained classifier, which must know the same classes and images."""
    try:
        plain = EGCPipeline.from_pretrained(str(pipeline_folder(path))).to(context.accelerator.device)
    except FileNotFoundError as error:
        raise ConfigError(
            f"robustness.plain: {error}; scripts/train_plain_classifier.py trains one from a run's folder"
        ) from error
    if plain.id2label != context.pipeline.id2label or plain.image_size != context.pipeline.image_size:
        raise ConfigError(f"robustness.plain: {path} has other classes or another image size than the pipeline")
    plain.energy_model.eval()
    return plain


def _notes(context: EvaluationContext) -> list[str]:
    s = context.settings.robustness
    notes = [
        "White-box attacks end to end: pixels in [0, 1], autoencoder, classifier at timestep 0. An image that is wrong "
        "without attack counts as wrong and is not attacked.",
        f"PGD: {s.pgd_steps} steps of 2.5 eps / {s.pgd_steps}, {s.pgd_restarts} random starts, cross entropy.",
    ]
    if s.num_autoattack_images:
        notes.append(
            f"AutoAttack on at most {s.num_autoattack_images} images: APGD on the cross entropy and on the logits' "
            f"difference ratio with {s.autoattack_steps} steps, then Square with {s.autoattack_queries} queries; the "
            "library has neither FAB nor the targeted variant of the original."
        )
    if s.plain is not None:
        notes.append(f"plain: {s.plain}, the classifier that the same attacks are compared on.")
    return notes


# --- accuracy by norm and eps ---------------------------------------------------------------------------------------


def _accuracy_under_attack(
    trial: Trial, attackers: dict[str, Attacker]
) -> tuple[dict[str, Metric], Table, list[Figure]]:
    settings, with_interval = trial.context.settings.robustness, trial.context.with_interval
    clean = {name: trial.run(attacker, lambda a, x, y: x, "clean") for name, attacker in attackers.items()}
    metrics = {f"{name}, no attack": with_interval(np.mean, o.right, percent=True) for name, o in clean.items()}
    clean_rows = [[*[metrics[f"{name}, no attack"]] * 2, float(clean[name].losses.mean())] for name in attackers]
    rows = [["none", *(cell for row in clean_rows for cell in row)]]
    curves: dict[str, list[tuple[float, dict[str, float]]]] = {"linf": [], "l2": []}
    for threat in threats(settings.linf_eps_255, settings.l2_eps):
        row, point = [str(threat)], {}
        for name, attacker in attackers.items():
            fgsm = trial.run_within(attacker, "fgsm", threat)
            how = {"num_steps": settings.pgd_steps, "num_restarts": settings.pgd_restarts}
            pgd = trial.run_within(attacker, "pgd", threat, **how)
            metric = with_interval(np.mean, pgd.right, percent=True)
            metrics[f"{name}, PGD-{settings.pgd_steps} {threat}"] = metric
            row += [Metric(fgsm.accuracy, percent=True), metric, float(pgd.losses.mean())]
            point |= {f"{name}, FGSM": fgsm.accuracy, f"{name}, PGD-{settings.pgd_steps}": pgd.accuracy}
        rows.append(row)
        curves[threat.norm].append((threat.eps, point))
    columns = ["threat", *(f"{name}, {what}" for name in attackers for what in ("FGSM", "PGD", "loss under PGD"))]
    figures = [_curve(norm, points, clean) for norm, points in curves.items() if points]
    return metrics, Table("Accuracy under attack", columns, rows), figures


def _curve(norm: str, points: list[tuple[float, dict[str, float]]], clean: dict[str, Outcome]) -> Figure:
    scale, unit = (255, " (1/255)") if norm == "linf" else (1, "")
    series = {
        name: [clean[name.split(",")[0]].accuracy, *(values[name] for _, values in points)] for name in points[0][1]
    }
    eps = [0, *(scale * eps for eps, _ in points)]
    picture = plots.lines(eps, series, f"eps in {norm}{unit}", "accuracy", (0, 1.02))
    return Figure(f"accuracy_{norm}", f"Accuracy against the size of the attack in {norm}.", picture)


def _autoattack(trial: Trial, attackers: dict[str, Attacker]) -> dict[str, Metric]:
    settings = trial.context.settings.robustness
    if settings.num_autoattack_images == 0:
        return {}
    metrics = {}
    for threat in threats([settings.autoattack_linf_eps_255], [settings.autoattack_l2_eps]):
        for name, attacker in attackers.items():
            how = {"num_steps": settings.autoattack_steps, "num_queries": settings.autoattack_queries}
            outcome = trial.run_within(attacker, "autoattack", threat, settings.num_autoattack_images, **how)
            metrics[f"{name}, AutoAttack {threat}"] = trial.context.with_interval(np.mean, outcome.right, percent=True)
    return metrics


# --- is the gradient honest? ----------------------------------------------------------------------------------------


def _checks(trial: Trial, attackers: dict[str, Attacker]) -> Table:
    """What attacks on a classifier with honest gradients must show, and whether they do."""
    settings, attacker = trial.context.settings.robustness, attackers["EGC"]
    threat, count = Threat("linf", settings.check_eps_255 / 255), min(settings.num_check_images, len(trial.labels))
    pgd = partial(trial.run_within, attacker, "pgd", count=count)
    by_steps = {n: pgd(threat=threat, num_steps=n, num_restarts=0).accuracy for n in sorted(settings.check_steps)}
    still = pgd(threat=threat, num_steps=settings.pgd_steps, num_restarts=0).accuracy
    random_start = pgd(threat=threat, num_steps=settings.pgd_steps, num_restarts=1).accuracy
    one_step = trial.run_within(attacker, "fgsm", threat, count).accuracy
    unbounded = pgd(threat=Threat("linf", 1.0), num_steps=settings.pgd_steps, num_restarts=0).accuracy

    values = list(by_steps.values())
    monotone = all(later <= earlier + TOLERANCE for earlier, later in itertools.pairwise(values))
    rows = [
        _check("more steps never help the defender", {f"{n} steps": v for n, v in by_steps.items()}, monotone),
        _check(
            "a random start is not needed",
            {"start at the image": still, "random start": random_start},
            still <= random_start + TOLERANCE,
        ),
        _check("many steps beat one", {"FGSM": one_step, "PGD": still}, still <= one_step + TOLERANCE),
        _check("an unbounded attack reaches 0 %", {"eps 1": unbounded}, unbounded == 0),
    ]
    if "plain" in attackers:
        how = {"num_steps": settings.pgd_steps, "num_restarts": 1}
        foreign = trial.run_within(attackers["plain"], "pgd", threat, count, **how).images
        right_before, _ = attacker.judge(trial.images[: len(foreign)], trial.labels[: len(foreign)])
        right, _ = attacker.judge(foreign, trial.labels[: len(foreign)])
        transferred = float((right & right_before).mean())
        found = {"own gradient": random_start, "transferred": transferred}
        rows.append(_check("transfer from plain is weaker", found, random_start <= transferred + TOLERANCE))
    return Table(
        f"Checks of gradient masking ({count} images at {threat})", ["expected", "accuracy found", "verdict"], rows
    )


def _check(expected: str, found: dict[str, float], passed: bool) -> list[str]:
    return [expected, ", ".join(f"{name}: {100 * v:.1f} %" for name, v in found.items()), "yes" if passed else "NO"]


# --- denoised classification ----------------------------------------------------------------------------------------


def _denoised(trial: Trial, undefended: Attacker) -> Table:
    """Classifying what the network itself denoised, attacked through the denoising with the noise averaged out."""
    settings = trial.context.settings.robustness
    threat, count = Threat("linf", settings.check_eps_255 / 255), min(settings.num_denoise_images, len(trial.labels))
    how = {"num_steps": settings.pgd_steps, "num_restarts": 1}
    attackers = {"not denoised": undefended} | {
        f"denoised from timestep {t}": trial.attacker(
            DenoisedClassifier(trial.context.pipeline, t, settings.denoise_draws)
        )
        for t in settings.denoise_timesteps
    }
    rows = []
    for name, attacker in attackers.items():
        clean = trial.run(attacker, lambda a, x, y: x, name, count)
        attacked = trial.run_within(attacker, "pgd", threat, count, **how)
        rows.append([name, Metric(clean.accuracy, percent=True), Metric(attacked.accuracy, percent=True)])
    title = (
        f"Denoised classification ({count} images, {settings.denoise_draws} draws of noise), attacked through it at "
        f"{threat}"
    )
    return Table(title, ["classifier", "no attack", f"adaptive PGD-{settings.pgd_steps}"], rows)
