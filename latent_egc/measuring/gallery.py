"""A picture of what a pipeline can do for each of its capabilities, and where it fails.

Nothing in them is selected: they show the first classes, the first noises and the first images. "So classified" is the
network's own verdict on its decoded samples; the suites of `latent-egc evaluate` ask an independent judge.
"""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from latent_egc.config import ConfigError, DataConfig
from latent_egc.data.sources import CorruptImageError, load_splits
from latent_egc.data.stream import noise_generator
from latent_egc.methods.certification import largest_radius
from latent_egc.pipelines import EGCPipeline
from latent_egc.pipelines.images import central_crop, crop_images
from latent_egc.pipelines.sampling_checks import check_strength
from latent_egc.pipelines.schedulers import SOLVERS, solver, steps_within
from latent_egc.training.figures import Panel, with_noised_copy

COLUMNS = 8
NUM_IMAGES = 4  # that are edited, and twice as many that are certified
SCALES = (1.0, 2.0, 4.0, 8.0)
INTERVALS = ((0.1, 0.8), (0.4, 1.0))  # of the noise levels
NUM_CANDIDATES = 4
BUDGETS = (5, 10, 20)  # evaluations of the network
STRENGTHS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
VOTES = {"n0": 50, "n": 200, "alpha": 0.001}


@dataclass
class Gallery:
    """What the pictures are made of.

    Args:
        pipeline: with at least two classes.
        images: (N, 3, H, W) in [0, 1], N at least 2, of its size; see `first_images`.
        classes: ids of two classes, which are composed.
        guidance_scale: of all pictures but those that compare scales; None: the pipeline's own.
        num_inference_steps: of all pictures but those that compare solvers.
        strength: of edits into other classes and of counterfactuals.
        sigmas: of the noise on pixels in [0, 1], and on scaled latents, by which images are certified.
        seed: image c of each row begins with `noise_generator(seed, c)`.

    Raises:
        ValueError: an argument that does not fit, before anything is drawn.
    """

    pipeline: EGCPipeline
    images: torch.Tensor
    classes: tuple[int, int] = (0, 1)
    guidance_scale: float | None = None
    num_inference_steps: int = 20
    strength: float = 0.8
    sigmas: tuple[float, float] = (0.12, 0.5)
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.images) < 2:
            raise ConfigError(f"the pictures need at least 2 images to edit, got {len(self.images)}")
        if len(set(self.classes)) < 2:
            raise ConfigError(f"two different classes are composed, got {self.name(self.classes[0])} twice")
        if self.guidance_scale is None:
            self.guidance_scale = self.pipeline.config.default_guidance_scale
        if not 0 < self.guidance_scale < float("inf"):
            raise ConfigError(f"the guidance scale must be finite and positive, got {self.guidance_scale}")
        check_strength(self.strength)
        for noise, sigma in self.noises.items():
            self.pipeline.certify(self.images[:1], sigma, n0=1, n=1, noise=noise)

    @property
    def noises(self) -> dict[str, float]:
        """What is noised for certificates, and the sigma. In pixel space the latents are the pixels."""
        noises = dict(zip(("pixels", "latents"), self.sigmas, strict=True))
        return noises if self.pipeline.vae is not None else {"pixels": noises["pixels"]}

    @property
    def first_classes(self) -> list[int]:
        """Ids, one a column."""
        return list(self.pipeline.id2label)[:COLUMNS]

    def name(self, class_id: int) -> str:
        """A class's, without a WordNet number before it."""
        return re.sub(r"^n\d{8}_", "", self.pipeline.id2label[class_id]).replace("_", " ")

    def column_names(self, class_ids: Sequence[int]) -> list[str]:
        """Names narrow enough to stand above images."""
        return [textwrap.fill(self.name(i), 11, break_long_words=False) for i in class_ids]

    def verdicts(self, images: Any) -> torch.Tensor:
        """(N, K) class ids of images as pipelines take them, likeliest first."""
        return self.pipeline.classify(images).logits.argsort(dim=1, descending=True)

    def generators(self, count: int) -> list[torch.Generator]:
        """One an image, the same in each call."""
        return [noise_generator(self.seed, number) for number in range(count)]

    def sample(self, shown_as: str, class_ids: Sequence[int] | None, **arguments: Any) -> np.ndarray:
        """A row of samples (N, H, W, 3) in [0, 1], of the classes or else `COLUMNS` of them, unlabelled."""
        count = COLUMNS if class_ids is None else len(class_ids)
        arguments = {"num_inference_steps": self.num_inference_steps} | arguments
        self.describe(shown_as)
        return self.pipeline(
            None if class_ids is None else list(class_ids),
            num_images_per_label=count if class_ids is None else 1,
            generator=self.generators(count),
            output_type="np",
            **arguments,
        ).images

    def describe(self, what: str) -> None:
        """Says before the pipeline's progress bar what is made."""
        self.pipeline.set_progress_bar_config(desc=what.replace("\n", ", "), leave=False)


def first_images(pipeline: EGCPipeline, data: DataConfig, count: int = 2 * NUM_IMAGES) -> torch.Tensor:
    """The first `count` images (N, 3, H, W) of a dataset's validation split that can be decoded, in [0, 1].

    Raises ConfigError as `load_splits`.
    """
    table, found = load_splits(data, len(pipeline.id2label)).validation, []
    for row in range(len(table)):
        try:
            found.append(central_crop(table.image(row), pipeline.image_size))
        except CorruptImageError:
            continue
        if len(found) == count:
            break
    return crop_images(found, pipeline.image_size)


def own_samples(pipeline: EGCPipeline, num_inference_steps: int, count: int = 2 * NUM_IMAGES) -> torch.Tensor:
    """Samples (N, 3, H, W) in [0, 1] of the classes in turn, where there are no other images to edit."""
    class_ids = [number % len(pipeline.id2label) for number in range(count)]
    generators = [noise_generator(1, number) for number in range(count)]  # not the ones of the pictures' own noise
    options = {"num_inference_steps": num_inference_steps, "generator": generators, "output_type": "pt"}
    return pipeline(class_ids, **options).images.float().cpu()


def _as_columns(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).cpu().numpy()


# --- samples --------------------------------------------------------------------------------------------------------


def _compared(gallery: Gallery, title: str, ways: Mapping[str, Mapping[str, Any]]) -> Panel:
    """A row for each way to sample, the same classes and noise in each column."""
    ids, rows, names = gallery.first_classes, [], []
    for name, arguments in ways.items():
        rows.append(gallery.sample(name, ids, **arguments))
        agreed = int((gallery.verdicts(rows[-1])[:, 0] == torch.tensor(ids)).sum())
        names.append(f"{name}\n{agreed} of {len(ids)} so classified")
    return Panel(np.stack(rows), names, title, gallery.column_names(ids))


def guidance(gallery: Gallery) -> list[Panel]:
    """Scales, intervals in which the pipeline's own scale acts, and candidates, from the same noise."""
    own = gallery.guidance_scale
    ways: dict[str, dict[str, Any]] = {f"scale {scale:g}": {"guidance_scale": scale} for scale in SCALES}
    for start, stop in INTERVALS:
        interval = {"guidance_scale": own, "guidance_interval": (start, stop)}
        ways[f"scale {own:g}, noise {start:g} to {stop:g}"] = interval
    ways[f"scale 1, best of {NUM_CANDIDATES}"] = {"guidance_scale": 1.0, "num_candidates": NUM_CANDIDATES}
    title = f"Guidance: the same noise in each column, {gallery.num_inference_steps} steps"
    return [_compared(gallery, title, ways)]


def selection(gallery: Gallery) -> list[Panel]:
    """The first candidate, and the best by each judge."""
    ways: dict[str, dict[str, Any]] = {"first drawn": {"guidance_scale": 1.0}}
    for judge in ("classifier", "density", "both"):
        chosen = {"num_candidates": NUM_CANDIDATES, "select_by": judge}
        ways[f"best by {judge}"] = {"guidance_scale": 1.0, **chosen}
    return [_compared(gallery, f"Selection: the best of {NUM_CANDIDATES} candidates, guidance scale 1", ways)]


def solvers(gallery: Gallery) -> list[Panel]:
    """A panel for each number of evaluations, a row a solver."""
    pipeline, panels = gallery.pipeline, []
    own = pipeline.scheduler
    try:
        for budget in BUDGETS:
            rows, scale = [], gallery.guidance_scale
            for name in SOLVERS:
                pipeline.scheduler = solver(name, own)
                ((steps, _),) = steps_within(pipeline.scheduler, [budget]).items()
                arguments = {"num_inference_steps": steps, "guidance_scale": scale}
                rows.append(gallery.sample(f"{name}, {budget}", gallery.first_classes, **arguments))
            title = f"{budget} evaluations of the network, guidance scale {scale:g}"
            names = gallery.column_names(gallery.first_classes) if budget == BUDGETS[0] else None
            panels.append(Panel(np.stack(rows), list(SOLVERS), title, names))
    finally:
        pipeline.scheduler = own
    return panels


def composition(gallery: Gallery) -> list[Panel]:
    """AND, OR and NOT, each alone and with a corrector; how many samples the network itself finds to be so."""
    first, second = gallery.classes
    names = [gallery.name(class_id) for class_id in gallery.classes]
    rules: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {}
    if len(gallery.pipeline.id2label) > 2:  # of two classes an image is always one
        both, either = " AND ".join(names), " OR ".join(names)
        wanted = torch.tensor(sorted(gallery.classes))
        rules[both] = {"all_of": [first, second]}, lambda top: (top[:, :2].sort(dim=1).values == wanted).all(dim=1)
        rules[either] = {"any_of": [first, second]}, lambda top: torch.isin(top[:, 0], wanted)
    rules[f"NOT {names[0]}"] = {"none_of": [first]}, lambda top: top[:, 0] != first
    rows, row_names = [gallery.sample("unlabelled", None)], ["unlabelled"]
    for name, (classes, holds) in rules.items():
        potential = gallery.pipeline.composed_potential(**classes, guidance_scale=gallery.guidance_scale)
        for corrector in (None, "mala"):
            row_names.append("with MALA" if corrector else name)
            rows.append(gallery.sample(f"{name}, {corrector}", None, potential=potential, corrector=corrector))
            row_names[-1] += f"\n{int(holds(gallery.verdicts(rows[-1])).sum())} of {COLUMNS} so classified"
    title = f"Composition: the same noise in each column, guidance scale {gallery.guidance_scale:g}"
    return [Panel(np.stack(rows), row_names, title)]


# --- images ---------------------------------------------------------------------------------------------------------


def editing(gallery: Gallery) -> list[Panel]:
    """Each way to edit."""
    ways = (_image_to_image, _inpainting, _interpolation, _class_edit, _counterfactual)
    return [way(gallery) for way in ways]


def _options(gallery: Gallery, shown_as: str) -> dict[str, Any]:
    gallery.describe(shown_as)
    steps, scale = gallery.num_inference_steps, gallery.guidance_scale
    return {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}


def _image_to_image(gallery: Gallery) -> Panel:
    images = gallery.images[:NUM_IMAGES]
    labels = gallery.verdicts(images)[:, 0].tolist()
    columns = {"image": _as_columns(images)}
    for strength in STRENGTHS:
        options = _options(gallery, f"image to image, {strength:g}")
        generators = gallery.generators(len(images))
        edited = gallery.pipeline.image_to_image(images, labels, strength=strength, generator=generators, **options)
        columns[f"{strength:g}"] = edited.images
    names = [f"classified as\n{gallery.name(label)}" for label in labels]
    title = f"Image to image, by strength, guided to that class (scale {gallery.guidance_scale:g})"
    return Panel(np.stack(list(columns.values()), axis=1), names, title, list(columns))


def _inpainting(gallery: Gallery, num_forms: int = 4) -> Panel:
    images, quarter = gallery.images[: NUM_IMAGES // 2], gallery.images.shape[-1] // 4
    mask = torch.zeros(images.shape[-2:])
    mask[quarter:-quarter, quarter:-quarter] = 1
    labels = gallery.verdicts(images)[:, 0].repeat_interleave(num_forms).tolist()
    forms = gallery.pipeline.inpaint(
        images.repeat_interleave(num_forms, dim=0),
        mask,
        labels,
        generator=gallery.generators(len(labels)),
        **_options(gallery, "inpainting"),
    ).images
    shown = [images, torch.where(mask > 0, torch.full_like(images, 0.5), images)]
    before = np.stack([_as_columns(one) for one in shown], axis=1)
    images_of_rows = np.concatenate([before, forms.reshape(len(images), num_forms, *forms.shape[1:])], axis=1)
    names = [f"classified as\n{gallery.name(label)}" for label in labels[::num_forms]]
    columns = ["image", "mask", *(f"form {number}" for number in range(1, num_forms + 1))]
    return Panel(images_of_rows, names, "Inpainting: what is grey is painted anew", columns)


def _interpolation(gallery: Gallery) -> Panel:
    images = gallery.images[:NUM_IMAGES]
    images = images[: len(images) // 2 * 2]
    ends, steps = (images[::2], images[1::2]), {"num_inference_steps": gallery.num_inference_steps}
    gallery.describe("interpolation")
    between = gallery.pipeline.interpolate(*ends, num_images=COLUMNS - 2, output_type="np", **steps).images
    between = between.reshape(len(ends[0]), COLUMNS - 2, *between.shape[1:])
    first, last = (_as_columns(end)[:, None] for end in ends)
    shares = [f"{number / (COLUMNS - 3):.1f}" for number in range(COLUMNS - 2)]
    columns = ["image", *shares, "other image"]
    return Panel(np.concatenate([first, between, last], axis=1), None, "Interpolation of their noises", columns)


def _class_edit(gallery: Gallery) -> Panel:
    images, ids = gallery.images[:NUM_IMAGES], gallery.first_classes[: COLUMNS - 1]
    labels = gallery.verdicts(images)[:, 0].tolist()
    columns = [_as_columns(images)]
    for class_id in ids:
        options = _options(gallery, f"to {gallery.name(class_id)}")
        columns.append(gallery.pipeline.edit_class(images, class_id, strength=gallery.strength, **options).images)
    title = f"Edits into other classes, strength {gallery.strength:g}, scale {gallery.guidance_scale:g}"
    names = [f"classified as\n{gallery.name(label)}" for label in labels]
    return Panel(np.stack(columns, axis=1), names, title, ["image", *gallery.column_names(ids)])


def _counterfactual(gallery: Gallery) -> Panel:
    images = gallery.images[:NUM_IMAGES]
    options = _options(gallery, "counterfactual")
    found = gallery.pipeline.counterfactual(images, strength=gallery.strength, **options)
    before, after = _as_columns(images), found.images
    ids = {name: class_id for class_id, name in gallery.pipeline.id2label.items()}
    names = []
    for number, flipped in enumerate(found.flipped.tolist()):
        old, asked = (gallery.name(ids[labels[number]]) for labels in (found.labels_before, found.labels_asked))
        arrow = "-> " if len(old + asked) < 16 else "->\n"
        far, alone = (float(distances[number]) for distances in (found.pixel_distance, found.autoencoder_distance))
        names.append(f"{old} {arrow}{asked}{'' if flipped else ' (failed)'}\nl2 {far:.1f}, autoencoder {alone:.1f}")
    shown = np.stack([before, after, 0.5 + (after - before) / 2], axis=1)
    title = f"Counterfactuals towards the second likeliest class, strength {gallery.strength:g}"
    return Panel(shown, names, title, ["before", "after", "difference"])


def certificates(gallery: Gallery) -> list[Panel]:
    """Radii of pixels and of latents, beside noised copies such as voted."""
    images, pipeline = gallery.images[: 2 * NUM_IMAGES], gallery.pipeline
    names, columns = [f"image {number + 1}" for number in range(len(images))], {"image": _as_columns(images)}
    for noise, sigma in gallery.noises.items():
        gallery.describe(f"votes over noised {noise}")
        found = pipeline.certify(images, sigma, noise=noise, generator=gallery.generators(len(images)), **VOTES)
        for row, (label, radius) in enumerate(zip(found.label_ids.tolist(), found.radius.tolist(), strict=True)):
            said = "abstains" if label < 0 else f"{gallery.name(label)}, radius {radius:.2f}"
            names[row] += f"\n{noise}: {said}"
        copies = [
            with_noised_copy(pipeline, image, sigma, noise, generator)[1]
            for image, generator in zip(images, gallery.generators(len(images)), strict=True)
        ]
        largest = largest_radius(VOTES["n"], sigma, VOTES["alpha"])
        columns[f"{noise}\nsigma {sigma:g}\nmax. {largest:.2f}"] = np.stack(copies)
    title = f"Certificates, {VOTES['n']} votes"
    return [Panel(np.stack(list(columns.values()), axis=1), names, title, list(columns))]


PICTURES: dict[str, Callable[[Gallery], list[Panel]]] = {
    "guidance": guidance,
    "solvers": solvers,
    "composition": composition,
    "editing": editing,
    "certificates": certificates,
    "selection": selection,
}
