"""How fast data come, for `latent-egc benchmark`: images to the latent cache, and samples to the training step.

Both are measured in their steady state, on JPEG files in memory of a photograph's size, behind the batches that workers
have made beforehand.
"""

import dataclasses
import io
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from PIL import Image

from latent_egc.config import Config
from latent_egc.data.autoencoders import encode_moments
from latent_egc.data.encoding import IMAGES_PER_SHARD, Encoder
from latent_egc.data.latent_cache import CachedViews
from latent_egc.data.sources import ImageTable
from latent_egc.data.stream import num_loader_workers
from latent_egc.data.views import PixelViews, Views
from latent_egc.training.build import resolve
from latent_egc.training.loop import micro_batches

PHOTOGRAPH_SIZE = (500, 375)  # about ImageNet's mean
NUM_BATCHES = 8


def photographs(count: int) -> ImageTable:
    """A train split of so many unlabelled images, smooth with some noise, each file of about 90 kB."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(8):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(PHOTOGRAPH_SIZE)
        noisy = np.asarray(smooth) + rng.normal(0, 8, (*PHOTOGRAPH_SIZE[::-1], 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [files[i % len(files)] for i in range(count)]}, features=features)
    return ImageTable(rows, "image", np.full(count, -1), "train")


def encoding_note(config: Config, vae: ModelMixin, batch_size: int, seconds_alone: float) -> str:
    """How many images a second are decoded, resized and encoded, beside the autoencoder's own limit.

    Args:
        config: whose data section has the views and the workers.
        vae: on its device.
        batch_size: views encoded at once.
        seconds_alone: that the autoencoder takes for them.
    """
    encoder, workers = Encoder(vae, config.data, batch_size), num_loader_workers(config.data, reads_images=True)
    pieces = max(workers, -(-(NUM_BATCHES + 2 * workers + 2) * batch_size // IMAGES_PER_SHARD))
    table = photographs(pieces * IMAGES_PER_SHARD)  # each worker has one at least
    with closing(encoder.moments(table, [(piece, set()) for piece in range(pieces)])) as batches:
        counts = (0 if moments is None else moments.shape[:2].numel() for _, moments in batches)
        rate = _rate(counts, workers, vae.device)
    limit = batch_size / seconds_alone
    return (
        f"encoding, from photographs, {workers} workers: {rate:.1f} views a second, {rate / limit:.2f} of the "
        f"autoencoder's own {limit:.1f}"
    )


def loading_note(config: Config, vae: ModelMixin | None, device: torch.device, step_seconds: float) -> str:
    """How many samples a second are ready for the step, from a latent cache where the configuration names one, else
    from photographs through the autoencoder, beside how many a full step consumes in `step_seconds`.
    """
    config = resolve(config)
    section, cached = config.data, config.data.latent_cache is not None
    workers = num_loader_workers(section, reads_images=not cached)
    steps = NUM_BATCHES + 2 * workers + 2
    accumulation = {"max_steps": steps, "gradient_accumulation_steps": 1}
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **accumulation))
    table = photographs(256)
    views: Views = _cached(config, vae, len(table)) if cached else PixelViews(table, section, seed=0)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # which of several is "cuda"
        accelerator = Accelerator(cpu=device.type == "cpu")
        with closing(micro_batches(config, views, vae, 0, accelerator)) as batches:
            rate = _rate((len(inputs["latents"]) for inputs, _ in batches), workers, device)
    source = "a latent cache" if cached else "photographs"
    consumed = config.training.train_batch_size / step_seconds
    return (
        f"loading, from {source}, {workers} workers: {rate:.1f} samples a second; the full step consumes {consumed:.1f}"
    )


def _cached(config: Config, vae: ModelMixin, count: int) -> CachedViews:
    """Random moments of so many images, as a cache of this configuration holds them."""
    size, num_central = config.data.image_size, 2 if config.data.horizontal_flip else 1
    shape = encode_moments(vae, torch.zeros(1, 3, size, size)).shape[1:]
    rng, columns, features = np.random.default_rng(0), {"label": [-1] * count}, {"label": datasets.Value("int64")}
    for name, num_views in (("moments", num_central), ("clean_moments", config.data.num_views)):
        columns[name] = rng.standard_normal((count, num_views, *shape), dtype=np.float32).astype(np.float16)
        features[name] = datasets.Array4D((num_views, *shape), "float16")
    rows: Any = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return CachedViews(rows.with_format("numpy"), seed=0)


def _rate(counts: Iterator[int], workers: int, device: torch.device) -> float:
    """What `NUM_BATCHES` batches hold a second, behind the first and those that workers have in store."""
    for _ in islice(counts, 1 + 2 * workers):
        pass
    _synchronize(device)
    start = time.perf_counter()
    total = sum(islice(counts, NUM_BATCHES))
    _synchronize(device)
    return total / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
