"""Analysis `few_shot`: accuracy with few labelled images of each class, of frozen features and after fine-tuning."""

import dataclasses
import hashlib
import json
from pathlib import Path

import datasets
import numpy as np

from latent_egc.config import (
    AutoencoderConfig,
    Config,
    ConfigError,
    DataConfig,
    ObjectiveConfig,
    SamplingConfig,
    TrainingConfig,
)
from latent_egc.data.sources import ImageTable
from latent_egc.measuring.linear_probe import fit_logistic
from latent_egc.measuring.probe_context import ProbeContext
from latent_egc.measuring.results import Metric, SuiteResult, Table
from latent_egc.measuring.suites.heatmap import classify
from latent_egc.models import EGCTransformer, EnergyModel
from latent_egc.pipelines import EGCPipeline
from latent_egc.training.loop import train


def draw_shots(labels: np.ndarray, count: int, num_classes: int, seed: int) -> np.ndarray:
    """Positions of `count` rows of each class, drawn by the seed; a smaller count draws a part of a larger one's.

    Raises:
        ConfigError: a class that has fewer.
    """
    positions = []
    for label in range(num_classes):
        own = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        if len(own) < count:
            raise ConfigError(f"few_shot.shots: {count} images a class, class {label} has {len(own)} training images")
        positions.append(own[:count])
    return np.concatenate(positions)


def analyse_few_shot(context: ProbeContext) -> SuiteResult:
    """Mean and deviation over draws of the linear probe's accuracy, and the accuracy after fine-tuning.

    Raises:
        ConfigError: a class with too few images, or fine-tuning of another denoiser than an energy network.
    """
    settings, few, place = context.settings, context.settings.few_shot, context.place
    num_classes, labels = len(context.class_names), context.train_labels
    draws = {
        count: [draw_shots(labels, count, num_classes, settings.seed + draw) for draw in range(few.draws)]
        for count in few.shots
    }
    if few.finetune_steps > 0 and not isinstance(context.denoiser.network, EnergyModel):
        raise ConfigError(
            f"few_shot.finetune_steps needs an energy network, got {type(context.denoiser.network).__name__}"
        )
    train_features, test = (array.reshape(len(array), -1) for array in context.standardised(place))
    metrics, rows = {}, []
    for count, choices in draws.items():
        accuracies = [
            fit_logistic(train_features[chosen], labels[chosen], few.c, settings.linear.max_iter).score(
                test, context.labels
            )
            for chosen in choices
        ]
        probed = Metric(float(np.mean(accuracies)), percent=True)
        metrics[f"frozen features, {count} a class"] = probed
        row = [count, probed, Metric(float(np.std(accuracies)), percent=True)]
        if few.finetune_steps > 0:
            tuned = context.accuracy(_finetuned(context, choices[0]) == context.labels)
            metrics[f"fine-tuned, {count} a class"] = tuned
            row.append(tuned)
        rows.append(row)
    columns = ["images a class", "linear probe, mean", "deviation over draws"]
    notes = [
        f"Features at {place}; the penalty is fixed, the features' mean and deviation are those of all "
        f"{len(labels)} training rows, without their labels. {few.draws} draws of the labelled images.",
    ]
    if few.finetune_steps > 0:
        columns.append("fine-tuned, first draw")
        notes.append(
            f"Fine-tuning: {few.finetune_steps} steps of the whole objective from the pipeline's weights "
            "(model.init_from), on the first draw's images alone."
        )
    return SuiteResult(len(context.labels), metrics, [Table("Accuracy by images a class", columns, rows)], notes=notes)


def _finetuned(context: ProbeContext, chosen: np.ndarray) -> np.ndarray:
    """Predicted labels (M,) after `latent_egc.training.train` from the pipeline's weights on the chosen rows.

    The run's folder is that of its settings: a killed training goes on from its last checkpoint.
    """
    values = json.dumps([dataclasses.asdict(context.settings.few_shot), context.settings.seed])
    digest = hashlib.sha256(values.encode() + chosen.tobytes()).hexdigest()[:8]
    folder = context.cache.folder / f"finetuned_{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    config = finetuning_config(context, chosen, folder)
    train(config)
    pipeline = EGCPipeline.from_pretrained(Path(config.output_dir) / "pipeline").to(context.denoiser.network.device)
    return classify(pipeline.energy_model.eval(), context.cache.latents("validation"), context.settings.batch_size)


def finetuning_config(context: ProbeContext, chosen: np.ndarray, folder: Path) -> Config:
    """A run that trains from the pipeline's weights on some training rows, which are written to `folder`."""
    network, few, splits = context.denoiser.network, context.settings.few_shot, context.cache.splits
    # The run's own validation is not used; four images keep it short.
    for name, positions in (("train", np.sort(chosen)), ("validation", np.arange(min(4, len(context.labels))))):
        rows = splits[name].rows[positions]
        _write(splits[name].table, rows, context.class_names, folder / f"{name}.parquet")
    values = {key: value for key, value in network.config.items() if not key.startswith("_")}
    values["num_classes"] = len(context.class_names)
    if values.get("energy_channels") is not None:
        values["energy_channels"] = len(context.class_names)
    autoencoder = AutoencoderConfig(path=context.denoiser.source, subfolder="vae")
    return Config(
        model={
            "backbone": "transformer" if isinstance(network, EGCTransformer) else "unet",
            "init_from": context.denoiser.source,
            **values,
        },
        autoencoder=AutoencoderConfig(path=None) if context.denoiser.vae is None else autoencoder,
        data=DataConfig(
            dataset="parquet",
            data_files={name: str(folder / f"{name}.parquet") for name in ("train", "validation")},
            validation_split="validation",
            image_size=context.data.image_size,
            horizontal_flip=context.data.horizontal_flip,
            random_resized_crop=context.data.random_resized_crop,
        ),
        objective=ObjectiveConfig(classification_weight=few.finetune_classification_weight),
        training=TrainingConfig(
            max_steps=few.finetune_steps,
            train_batch_size=few.finetune_batch_size,
            learning_rate=few.finetune_learning_rate,
            lr_schedule="cosine",
            ema_decay=0.9,
            seed=context.settings.seed,
            validate_every=few.finetune_steps,
            sample_every=few.finetune_steps + 1,
            checkpoint_every=few.finetune_steps,
            trackers=(),
            resume="auto",
        ),
        sampling=SamplingConfig(num_inference_steps=1, num_images_per_label=1, max_classes=1),
        output_dir=str(folder / "run"),
    )


def _write(table: ImageTable, rows: np.ndarray, names: list[str], path: Path) -> None:
    chosen = table.rows.select(rows)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    images = [{"bytes": _bytes(stored), "path": None} for stored in chosen[table.image_column]]
    columns = {"image": images, "label": table.labels[rows].tolist()}
    datasets.Dataset.from_dict(columns, features=features).cast_column("image", datasets.Image()).to_parquet(path)


def _bytes(stored: dict) -> bytes:
    return Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
