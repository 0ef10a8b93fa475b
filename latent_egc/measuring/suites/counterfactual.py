"""Suite `counterfactual`: do changes that turn the network's own verdict show to others?

Images are changed by `EGCPipeline.counterfactual`, and beside it by projected gradient descent on the pixels, the
smallest of some sizes that turns the verdict. An independent judge says what both show.
"""

from dataclasses import dataclass

import einops
import numpy as np
import torch

from latent_egc.config import file_path, within
from latent_egc.measuring import plots
from latent_egc.measuring.attacks import Attacker, PixelClassifier, Threat
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.feature_extractors import Extractor, load_extractor
from latent_egc.measuring.judges import Judge, linear_judge, load_judge, reconstructed, to_uint8
from latent_egc.measuring.results import Figure, Metric, SuiteResult


@dataclass(frozen=True)
class Settings:
    """Counterfactuals, an attack and a judge."""

    num_images: int | None = within(100, 2)  # null: all that are evaluated
    strength: float = within(0.8, 0.0, 1.0)
    distance_scale: float = within(0.3, 0.0)
    guidance_scale: float | None = within(None, 0.0)  # the first one tried; null: the pipeline's own
    num_doublings: int = within(4, 0)
    num_inference_steps: int = within(50, 1)
    # A TorchScript classifier, images in [0, 1] to logits; null: a linear one on the features.
    judge: str | None = file_path()
    judge_size: int | None = within(None, 1)  # of the images that it knows, pixels; null: the pipeline's
    features: str | None = file_path()  # an extractor, as generation.features; null: the pixels
    num_judge_images: int = within(1000, 10)  # training images for the linear judge
    l2_eps: tuple[float, ...] = within((0.1, 0.2, 0.5, 1.0, 2.0, 4.0), 0.0)  # sizes of the attack, on pixels in [0, 1]
    pgd_steps: int = within(20, 1)


SHOWN = 8


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Flip rates by the network's own classifier and by a judge, and distances, of counterfactuals and of an attack.

    Raises:
        ConfigError: a model without classes, or a judge or extractor that cannot be used.
    """
    context.require_classes("counterfactual")
    judge = _judge(context, settings)
    rows = context.rows[context.choose(np.arange(len(context.rows)), settings.num_images)]
    originals = context.over(len(rows), lambda batch: _shares(context, rows[list(batch)]).cpu(), "read")
    before = _predict(context, originals)
    changed, asked, distances = _counterfactuals(context, settings, rows)
    attacked = _attacked(context, settings, rows, before)

    decoded = reconstructed(context, context.splits.validation, rows)
    seen = judge.predict(decoded)
    labels = context.splits.validation.labels[rows]
    metrics: dict[str, Metric] = {}
    for name, images in (("counterfactual", changed), ("attack", attacked)):
        own, judged = _predict(context, images / 255), judge.predict(images)
        far = (images / 255 - originals).flatten(1).norm(dim=1)
        metrics |= {
            f"{name}: the network says another class": context.accuracy(own != before),
            f"{name}: the judge says another class": context.accuracy(judged != seen),
            f"{name}: both say the same other class": context.accuracy((own != before) & (judged == own)),
            f"{name}: l2 distance of pixels in [0, 1]": context.with_interval(np.mean, far),
        }
        if name == "counterfactual":
            metrics |= {
                f"{name}: the network says the class asked for": context.accuracy(own == asked),
                f"{name}: the judge says the class asked for": context.accuracy(judged == asked),
                f"{name}: l2 distance of latents": context.with_interval(np.mean, distances),
            }
    floor = (decoded / 255 - originals).flatten(1).norm(dim=1)
    metrics |= {
        "autoencoder alone: l2 distance of pixels in [0, 1]": context.with_interval(np.mean, floor),
        "autoencoder alone: the network says another class": context.accuracy(
            _predict(context, decoded / 255) != before
        ),
        f"accuracy of the judge ({judge.name}) on decoded images": context.accuracy(seen == labels),
    }
    notes = [
        "Images are rounded to 8 bits before they are judged. The judge's verdict is compared with what it says of the "
        "original through the autoencoder. A change that turns the network's verdict alone is an adversarial one; a "
        "judge that noise confuses may say another class of it too, but seldom the network's.",
        f"The attack is PGD with {settings.pgd_steps} steps against the network's verdict, without random start, in "
        f"the smallest l2 ball of {list(settings.l2_eps)} in which it succeeds.",
        *([judge.note] if judge.note else []),
    ]
    figure = _picture(context, originals, changed, attacked)
    return SuiteResult(len(rows), metrics, figures=[figure], notes=notes)


def _judge(context: EvaluationContext, settings: Settings) -> Judge:
    if settings.judge is not None:
        return load_judge(context, settings.judge, "counterfactual.judge", settings.judge_size)
    extractor = Extractor("pixels", lambda images: images.flatten(1))
    if settings.features is not None:
        extractor = load_extractor(settings.features, context.accelerator.device)
    return linear_judge(context, extractor, settings.num_judge_images)


def _shares(context: EvaluationContext, rows: np.ndarray) -> torch.Tensor:
    """Validation images (N, 3, H, W) in [0, 1]."""
    return context.pixel_values(context.splits.validation, rows) / 2 + 0.5


def _predict(context: EvaluationContext, images: torch.Tensor) -> np.ndarray:
    """(N,) what the network says of images (N, 3, H, W) in [0, 1]."""
    pipeline = context.pipeline
    pipeline.set_progress_bar_config(disable=True)

    def predicted(batch: range) -> torch.Tensor:
        return pipeline.classify(images[list(batch)].float()).logits.argmax(dim=1)

    return context.over(len(images), predicted, "classify").numpy()


def _counterfactuals(
    context: EvaluationContext, settings: Settings, rows: np.ndarray
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Changed images (N, 3, H, W) uint8, the classes asked for (N,) and the distances of the latents (N,)."""
    pipeline, size = context.pipeline, context.pipeline.image_size
    pipeline.set_progress_bar_config(disable=True)
    ids = {name: i for i, name in pipeline.id2label.items()}

    def changed(batch: range) -> torch.Tensor:
        output = pipeline.counterfactual(
            _shares(context, rows[list(batch)]),
            strength=settings.strength,
            distance_scale=settings.distance_scale,
            guidance_scale=settings.guidance_scale,
            num_doublings=settings.num_doublings,
            num_inference_steps=settings.num_inference_steps,
            output_type="pt",
        )
        asked = torch.tensor([ids[label] for label in output.labels_asked])
        numbers = torch.stack([asked.float(), output.latent_distance.float()], dim=1)
        return torch.cat([numbers, to_uint8(output.images).flatten(1).cpu().float()], dim=1)

    found = context.over_in_parts(len(rows), changed, "counterfactual")
    images = found[:, 2:].to(torch.uint8).unflatten(1, (3, size, size))
    return images, found[:, 0].long().numpy(), found[:, 1].numpy()


def _attacked(context: EvaluationContext, settings: Settings, rows: np.ndarray, before: np.ndarray) -> torch.Tensor:
    """Attacked images (N, 3, H, W) uint8, rounded before it is looked whether the attack succeeded."""
    size = context.pipeline.image_size
    attacker = Attacker(
        PixelClassifier(context.pipeline), (3, size, size), context.num_classes, context.accelerator.device
    )

    def attacked(batch: range) -> torch.Tensor:
        images, labels = _shares(context, rows[list(batch)]).cpu(), before[list(batch)]
        found, left = to_uint8(images), np.arange(len(images))
        for eps in settings.l2_eps:
            threat = Threat("l_2", eps)
            tried = attacker.pgd(images[left].numpy(), labels[left], threat, settings.pgd_steps, random_start=False)
            found[left] = to_uint8(torch.from_numpy(tried))
            left = left[attacker.predict((found[left] / 255).numpy()) == labels[left]]
            if len(left) == 0:
                break
        return found

    return context.over_in_parts(len(rows), attacked, "attack")


def _picture(
    context: EvaluationContext, originals: torch.Tensor, changed: torch.Tensor, attacked: torch.Tensor
) -> Figure:
    """The first images, what became of them and the differences, each named by the network's verdicts."""
    before, after, broken = (images[:SHOWN] for images in (originals, changed / 255, attacked / 255))
    columns = [before, after, 0.5 + (after - before) / 2, broken, 0.5 + (broken - before) / 2]
    names = context.class_names
    verdicts = [_predict(context, images) for images in (before, after, broken)]
    row_names = [f"{names[i]} -> {names[j]}, {names[k]}" for i, j, k in zip(*verdicts, strict=True)]
    grid = einops.rearrange(torch.stack(columns, dim=1), "r k c h w -> r k h w c").numpy()
    caption = (
        "The first images: before; the counterfactual and its difference, grey being none; the attack and its "
        "difference. At the left what the network says of the three."
    )
    return Figure("counterfactual", caption, plots.image_grid(grid, row_names, gap_after=1), shows_data=True)
