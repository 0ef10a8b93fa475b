"""Suite `robustness`: accuracy of the whole classifier, pixels to label, under white-box attacks.

Every attack goes end to end through the autoencoder. A defence that merely hides its gradient looks robust too, so
checks after Athalye et al. (ICML 2018) and Carlini et al. (arXiv 1902.06705) stand beside the numbers.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed

from latent_egc.config import ConfigError, file_path, within
from latent_egc.measuring import plots
from latent_egc.measuring.attacks import Attack, Attacker, DenoisedClassifier, PixelClassifier, Threat
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table
from latent_egc.pipelines import EGCPipeline
from latent_egc.training.checkpoints import resolve_pipeline


@dataclass(frozen=True)
class Settings:
    """Attacks on pixels in [0, 1]; an eps in l_inf is given in 1/255."""

    num_images: int = within(500, 1)
    linf_eps_255: tuple[float, ...] = within((1.0, 2.0, 4.0, 8.0), 1e-3, 255.0)
    l2_eps: tuple[float, ...] = within((0.25, 0.5, 1.0), 1e-3)
    pgd_steps: int = within(20, 1)
    pgd_restarts: int = within(2, 1)  # random starts, each on the images that still stand
    plain: str | None = file_path()  # pipeline or run of a plainly trained classifier, attacked alike for comparison
    num_autoattack_images: int = within(100, 0)  # 0: no AutoAttack
    autoattack_linf_eps_255: float = within(4.0, 1e-3, 255.0)
    autoattack_l2_eps: float = within(0.5, 1e-3)
    autoattack_steps: int = within(100, 1)  # of each of the two APGD
    autoattack_queries: int = within(500, 1)  # of Square, for each image that still stands; the original has 5000
    num_check_images: int = within(100, 1)  # for the checks of gradient masking
    check_eps_255: float = within(4.0, 1e-3, 255.0)  # of the checks, the pictures and denoised classification
    check_steps: tuple[int, ...] = within((1, 5, 20, 100), 1)
    num_denoise_images: int = within(50, 1)
    denoise_timesteps: tuple[int, ...] = within((50, 150), 0)  # (): no denoised classification
    denoise_draws: int = within(4, 1)  # of the noise, averaged in each forward pass


TOLERANCE = 0.02  # of accuracy, by which a check may be missed before it fails: attacks are random
SHOWN_IMAGES = 8


@dataclass(frozen=True)
class Line:
    """One row of the table of attacks."""

    attack: str
    threat: Threat | None  # None without attack
    steps: int | str  # as shown
    restarts: int  # random starts; 0: one start at the image
    loss: str  # what the attack maximises
    right: dict[str, np.ndarray]  # model -> (N,) whether each image is still classified right


class Trial:
    """The images under attack, which the processes share among them."""

    def __init__(self, context: EvaluationContext, settings: Settings) -> None:
        self.context, self.settings = context, settings
        self.positions = context.choose(np.arange(len(context.rows)), settings.num_images)

    def load(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 3, H, W) in [0, 1] and labels (N,) of some of the evaluated images."""
        context = self.context
        pixel_values = context.pixel_values(context.splits.validation, context.rows[positions])
        return (pixel_values / 2 + 0.5).cpu().numpy(), context.labels[positions]

    def attacker(self, network: PixelClassifier) -> Attacker:
        """A network under attack."""
        size = self.context.pipeline.image_size
        return Attacker(network, (3, size, size), self.context.num_classes, self.context.accelerator.device)

    def first_success(
        self, attacker: Attacker, attacks: Sequence[Attack], description: str, count: int | None = None
    ) -> np.ndarray:
        """`Attacker.first_success` on `count` of the images (None: all), drawn by the seed: (count,).

        The description tells this step from the suite's others.
        """
        chosen = self.context.choose(self.positions, count)

        def found(batch: range) -> torch.Tensor:
            # The library draws from the global generators.
            set_seed((self.context.settings.seed + batch[0]) % 2**32)
            return torch.from_numpy(attacker.first_success(*self.load(chosen[list(batch)]), attacks))

        return self.context.over_in_parts(len(chosen), found, description).numpy()

    def accuracy(self, attacker: Attacker, attacks: Sequence[Attack], description: str, count: int) -> float:
        """The share of images that withstand all of the attacks."""
        return float((self.first_success(attacker, attacks, description, count) == len(attacks)).mean())


@contextmanager
def _frozen(pipelines: Iterable[EGCPipeline]) -> Iterator[None]:
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


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """FGSM, PGD and AutoAttack by norm and eps, checks of gradient masking, denoised classification under attack.

    Raises:
        ConfigError: a model without classes, a step without gradient, a timestep that the model has not, or a plain
            classifier that does not fit.
    """
    context.require_classes("robustness")
    num_timesteps = context.model.config.num_train_timesteps
    if max(settings.denoise_timesteps, default=0) >= num_timesteps:
        raise ConfigError(
            f"robustness.denoise_timesteps must be below {num_timesteps}, got {list(settings.denoise_timesteps)}"
        )
    pipelines = {"EGC": context.pipeline}
    if settings.plain is not None:
        pipelines["plain"] = _load_plain(context, settings.plain)
    with _frozen(pipelines.values()):
        trial = Trial(context, settings)
        attackers = {name: trial.attacker(PixelClassifier(pipeline)) for name, pipeline in pipelines.items()}
        lines = _attacked(trial, attackers)
        metrics, table = _table(context, lines)
        tables = [table, _checks(trial, attackers)]
        figures = [*_curves(context, lines), *_pictures(trial, attackers, lines[0].right["EGC"])]
        if settings.denoise_timesteps:
            denoised_metrics, denoised_table = _denoised(trial, attackers["EGC"])
            metrics |= denoised_metrics
            tables.append(denoised_table)
    return SuiteResult(len(trial.positions), metrics, tables, figures, _notes(settings))


def _load_plain(context: EvaluationContext, path: str) -> EGCPipeline:
    """The pipeline of a plainly trained classifier, which must have the same trunk, images and classes."""
    try:
        plain = EGCPipeline.from_pretrained(str(resolve_pipeline(Path(path)))).to(context.accelerator.device)
    except FileNotFoundError as error:
        raise ConfigError(
            f"robustness.plain: {error}; train one: python experiments/train_plain_classifier.py RUN {path}"
        ) from error
    if plain.id2label != context.pipeline.id2label or plain.image_size != context.pipeline.image_size:
        raise ConfigError(f"robustness.plain: {path} has other classes or another image size than the pipeline")
    own, other = (json.loads(p.energy_model.to_json_string()) for p in (context.pipeline, plain))
    for key in own:
        if own[key] != other.get(key) and not key.startswith("_"):
            raise ConfigError(
                f"robustness.plain: {path} has another trunk than the pipeline: {key} is {other.get(key)!r}, "
                f"it must be {own[key]!r}"
            )
    return plain


def _notes(s: Settings) -> list[str]:
    notes = [
        "White-box attacks end to end: pixels in [0, 1], autoencoder, classifier at timestep 0. An image that is wrong "
        "without attack counts as wrong and is not attacked.",
        "A restart goes on with the images that still stand, and an image that FGSM or PGD broke at one eps counts as "
        "broken at every larger eps of that norm, since what broke it lies within the larger ball too. For the "
        "accuracy in the worst case both are exact; they only save work.",
        f"PGD: {s.pgd_restarts} random starts of {s.pgd_steps} steps of 2.5 eps / {s.pgd_steps}. FGSM: one step of "
        "eps from the image.",
    ]
    if s.num_autoattack_images > 0:
        notes.append(
            f"AutoAttack: APGD with {s.autoattack_steps} steps on the cross entropy (a tenth of them before all of "
            f"them), {s.autoattack_steps} on the difference of logits ratio (DLR), then Square with "
            f"{s.autoattack_queries} queries on the margin, each on what still stands. The library has neither FAB nor "
            "the targeted APGD of the original."
        )
    if s.plain is not None:
        notes.append(f"plain: {s.plain}, the same trunk trained by the cross entropy on clean images alone.")
    return notes


# --- accuracy by attack, norm and eps -------------------------------------------------------------------------------


def _attacked(trial: Trial, attackers: dict[str, Attacker]) -> list[Line]:
    settings = trial.settings
    cross_entropy = "cross entropy"
    clean = {name: trial.first_success(a, [], f"{name}, no attack") == 0 for name, a in attackers.items()}
    lines = [Line("none", None, 0, 0, "", clean)]
    linf = [Threat("l_inf", eps / 255) for eps in sorted(settings.linf_eps_255)]
    l2 = [Threat("l_2", eps) for eps in sorted(settings.l2_eps)]

    def add(
        name: str,
        steps: int | str,
        restarts: int,
        loss: str,
        threats: list[Threat],
        method: Callable,
        count: int | None = None,
    ) -> None:
        """A line for each threat, weaker ones first; `method` is one of `Attacker`'s."""
        tries, found = max(1, restarts), {}
        for model, attacker in attackers.items():
            attacks = [partial(method, attacker, threat=threat) for threat in threats for _ in range(tries)]
            found[model] = trial.first_success(attacker, attacks, f"{model}, {name} in {threats[0].norm}", count)
        for number, threat in enumerate(threats, start=1):
            right = {model: first >= number * tries for model, first in found.items()}
            lines.append(Line(name, threat, steps, restarts, loss, right))

    steps, restarts = settings.pgd_steps, settings.pgd_restarts
    for threats in filter(None, (linf, l2)):
        add("FGSM", 1, 0, cross_entropy, threats, Attacker.fgsm)
    for threats in filter(None, (linf, l2)):
        add(f"PGD-{steps}", steps, restarts, cross_entropy, threats, partial(Attacker.pgd, num_steps=steps))
    if settings.num_autoattack_images > 0:
        steps, queries, loss = settings.autoattack_steps, settings.autoattack_queries, f"{cross_entropy}, DLR, margin"
        autoattack = partial(Attacker.autoattack, num_steps=steps, num_queries=queries)
        how = f"{steps}, {steps}, {queries} queries"
        for norm, eps in (("l_inf", settings.autoattack_linf_eps_255 / 255), ("l_2", settings.autoattack_l2_eps)):
            add("AutoAttack", how, 1, loss, [Threat(norm, eps)], autoattack, settings.num_autoattack_images)
    return lines


def _table(context: EvaluationContext, lines: list[Line]) -> tuple[dict[str, Metric], Table]:
    metrics, rows = {}, []
    for line in lines:
        threat = line.threat
        norm, eps, name = ("", "0", "no attack") if threat is None else (threat.norm, threat.eps_text, None)
        count = len(next(iter(line.right.values())))
        row = [line.attack, norm, eps, line.steps, line.restarts, line.loss, count]
        for model, right in line.right.items():
            metric = context.accuracy(right)
            metrics[f"{model}, {name or f'{line.attack} {threat}'}"] = metric
            row += [metric, metric.interval_text]
        rows.append(row)
    models = [column for model in lines[0].right for column in (model, "95 % interval")]
    columns = ["attack", "norm", "eps", "steps", "random restarts", "loss", "images", *models]
    return metrics, Table("Accuracy under attack", columns, rows)


def _curves(context: EvaluationContext, lines: list[Line]) -> list[Figure]:
    """For each norm, accuracy against eps of every model under FGSM and PGD."""
    figures = []
    for norm, scale, unit in (("l_inf", 255, " (1/255)"), ("l_2", 1, "")):
        own = [line for line in lines[1:] if line.threat.norm == norm and line.attack != "AutoAttack"]
        if not own:
            continue
        eps = [0.0, *(scale * line.threat.eps for line in own if line.attack == "FGSM")]
        series = {}
        for model, attack in itertools.product(lines[0].right, dict.fromkeys(line.attack for line in own)):
            right = [lines[0].right[model], *(line.right[model] for line in own if line.attack == attack)]
            points = [context.accuracy(r) for r in right]
            # FGSM's intervals are left out, for the eye's sake.
            series[f"{model}, {attack}"] = [p.value for p in points] if attack == "FGSM" else points
        picture = plots.lines(eps, series, f"eps in {norm}{unit}", "accuracy", (-0.02, 1.02))
        caption = f"Accuracy against the size of the attack in {norm}, with 95 % intervals of PGD."
        figures.append(Figure(f"accuracy_{norm}", caption, picture))
    return figures


def _pictures(trial: Trial, attackers: dict[str, Attacker], right: np.ndarray) -> list[Figure]:
    """Some of the images that EGC gets right, what PGD makes of them for each model, and the change."""
    candidates = trial.positions[right]
    if len(candidates) == 0:
        return []
    settings = trial.settings
    threat = Threat("l_inf", settings.check_eps_255 / 255)
    chosen = np.unique(np.linspace(0, len(candidates) - 1, SHOWN_IMAGES).round().astype(int))
    images, labels = trial.load(candidates[chosen])
    class_names = trial.context.class_names
    rows, names, sentences = [images], ["image"], []
    set_seed(trial.context.settings.seed)
    for model, attacker in attackers.items():
        attacked = attacker.pgd(images, labels, threat, settings.pgd_steps)
        rows += [attacked, 0.5 + (attacked - images) / (2 * threat.eps)]
        names += [f"{model} attacked", "its change"]
        pairs = zip(attacker.predict(images), attacker.predict(attacked), strict=True)
        sentences.append(f"{model} saw " + ", ".join(f"{class_names[b]} -> {class_names[a]}" for b, a in pairs) + ".")
    grid = np.stack(rows).transpose(0, 1, 3, 4, 2)
    caption = (
        f"Images under PGD-{settings.pgd_steps} at {threat}, and the change times {0.5 / threat.eps:.3g} around grey. "
        + " ".join(sentences)
    )
    return [Figure("images", caption, plots.image_grid(grid, names), shows_data=True)]


# --- is the gradient honest? ----------------------------------------------------------------------------------------


def _checks(trial: Trial, attackers: dict[str, Attacker]) -> Table:
    """What attacks on a classifier with honest gradients must show, and whether they do."""
    settings, attacker = trial.settings, attackers["EGC"]
    threat, count = Threat("l_inf", settings.check_eps_255 / 255), min(settings.num_check_images, len(trial.positions))
    steps = settings.pgd_steps

    def accuracy(description: str, *attacks: Attack) -> float:
        return trial.accuracy(attacker, attacks, f"check: {description}", count)

    from_image = {
        n: accuracy(f"{n} steps", partial(attacker.pgd, threat=threat, num_steps=n, random_start=False))
        for n in sorted({*settings.check_steps, steps})
    }
    still = from_image[steps]
    random = accuracy("random start", partial(attacker.pgd, threat=threat, num_steps=steps))
    one_step = accuracy("FGSM", partial(attacker.fgsm, threat=threat))
    unbounded = partial(attacker.pgd, threat=Threat("l_inf", 1.0), num_steps=steps)
    nothing = accuracy("unbounded", partial(unbounded, random_start=False), *[unbounded] * settings.pgd_restarts)

    monotone = all(later <= earlier + TOLERANCE for earlier, later in itertools.pairwise(from_image.values()))
    rows = [
        _check("more steps never help the defender", {f"PGD-{n}": v for n, v in from_image.items()}, monotone),
        _check(
            "the gradient at the image itself is no trap: a random start does not succeed more often",
            {"start at the image": still, "random start": random},
            still <= random + TOLERANCE,
        ),
        _check("many steps beat one", {"FGSM": one_step, f"PGD-{steps}": still}, still <= one_step + TOLERANCE),
        _check("an unbounded attack reaches 0 %", {"l_inf eps 1": nothing}, nothing == 0),
    ]
    if "plain" in attackers:
        foreign = accuracy("transfer", partial(attackers["plain"].pgd, threat=threat, num_steps=steps))
        found = {"own gradient": random, "transferred": foreign}
        rows.append(_check("attacks made on plain are weaker than its own", found, random <= foreign + TOLERANCE))
    title = (
        f"Checks of gradient masking on EGC: {count} images, {threat}, {steps} steps, one start at the image unless "
        f"stated; passed within {100 * TOLERANCE:g} points"
    )
    return Table(title, ["expected of an honest gradient", "accuracy found", "verdict"], rows)


def _check(expected: str, found: dict[str, float], passed: bool) -> list[str]:
    numbers = ", ".join(f"{name}: {Metric(value, percent=True)}" for name, value in found.items())
    return [expected, numbers, "pass" if passed else "FAIL"]


# --- denoised classification ----------------------------------------------------------------------------------------


def _denoised(trial: Trial, undefended: Attacker) -> tuple[dict[str, Metric], Table]:
    """Classifying what the network itself denoised, attacked through the denoising with the noise averaged out."""
    context, settings = trial.context, trial.settings
    threat, count = Threat("l_inf", settings.check_eps_255 / 255), settings.num_denoise_images
    attackers = {"not denoised": undefended} | {
        f"denoised from timestep {t}": trial.attacker(DenoisedClassifier(context.pipeline, t, settings.denoise_draws))
        for t in settings.denoise_timesteps
    }
    name = f"adaptive PGD-{settings.pgd_steps} {threat}"
    metrics, rows = {}, []
    for defence, attacker in attackers.items():
        row = [defence]
        for how, attacks in (
            ("no attack", []),
            ("not adaptive", [partial(undefended.pgd, threat=threat, num_steps=settings.pgd_steps)]),
            (name, [partial(attacker.pgd, threat=threat, num_steps=settings.pgd_steps)]),
        ):
            right = trial.first_success(attacker, attacks, f"{defence}, {how}", count) == len(attacks)
            metric = context.accuracy(right)
            row += [metric, metric.interval_text]
        metrics[f"EGC {defence}, {name}"] = metric
        rows.append(row)
    title = (
        f"Denoised classification: {min(count, len(trial.positions))} images at {threat}, the mean over "
        f"{settings.denoise_draws} draws of noise in every forward pass; PGD-{settings.pgd_steps}, one random start"
    )
    columns = ["no attack", "attack on the classifier that does not denoise", "adaptive attack"]
    return metrics, Table(title, ["classifier", *(c for column in columns for c in (column, "95 % interval"))], rows)
