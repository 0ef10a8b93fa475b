"""A configuration proposed for images and a machine, every value with its reason, and what it will take.

The loss, optimiser, average and guidance are those that train within a few hundred steps (configs/imagenette64.yaml).
What is proposed for an accelerator and large data follows the published recipes, and was not measured.
"""

import math
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from diffusers import ModelMixin
from tqdm.auto import tqdm

from latent_egc.config import Config, ConfigError, parse_config
from latent_egc.data.autoencoders import encode_moments, latent_shape
from latent_egc.data.inspection import Inspection
from latent_egc.objective import EGCObjective
from latent_egc.pipelines.latents import vae_scale_factor
from latent_egc.training.build import MemoryEstimate, build_model, estimate_memory, resolve

WIDTHS = (32, 64, 96, 128, 192)  # of the finest level; multiples of the group norms' groups
# Up to how many images a network is to be no wider: it would learn them by heart.
IMAGES_FOR_WIDTH = {64: 1_000, 96: 50_000, 128: 500_000}
SHARE_OF_MEMORY = 0.6  # the estimate is rough, and the machine has other things to hold
ENERGY_CHANNELS = 64  # of a network without classes: as many latent ones


@dataclass(frozen=True)
class Machine:
    """What trains: kind of device ("cpu", "cuda", ...), free memory in bytes, whether it multiplies in bf16."""

    device: str
    memory: int
    bf16: bool


def this_machine(device: str) -> Machine:
    """The machine, as far as the device goes."""
    if torch.device(device).type != "cuda":
        return Machine(device, psutil.virtual_memory().available, bf16=False)
    free, _ = torch.cuda.mem_get_info(device)
    return Machine(device, free, torch.cuda.is_bf16_supported())


class Choice(NamedTuple):
    """A value and why it was chosen."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Proposal:
    """A run that fits.

    Args:
        choices: section -> key -> `Choice`, as in a configuration's file, and "output_dir".
        config: they as a resolved configuration.
        shape: (C, h, w) of the latents.
        memory: what a training step needs.
    """

    choices: dict[str, dict[str, Choice] | Choice]
    config: Config
    shape: tuple[int, int, int]
    memory: MemoryEstimate


def propose(
    found: Inspection, name: str, machine: Machine, autoencoder: str | None, vae: ModelMixin | None, size: int | None
) -> Proposal:
    """A run on the images that were found.

    Args:
        found: the images.
        name: of the run's folder below runs/; other characters than letters, digits, - and _ are replaced.
        machine: what trains.
        autoencoder, vae: its name and itself; None: pixel space.
        size: of the images; None: chosen by theirs.

    Raises:
        ConfigError: a size that the autoencoder does not take, or one at which the smallest network does not fit.
    """
    on_cpu = torch.device(machine.device).type == "cpu"
    image_size = _image_size(found, vae, on_cpu) if size is None else Choice(size, "as asked for")
    shape = latent_shape(vae, image_size.value)
    run = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "images"
    run = f"runs/{run}{image_size.value}"
    labelled = is_labelled(found)
    where = "in its latents" if vae is not None else "pixel space"
    objective: dict[str, Choice] = {}
    if labelled:
        weight = Choice(0.2, "of the classification loss; the paper's 0.005 is for ImageNet")
        smoothing = Choice(0.1, "keeps the classifier from being too sure")
        objective |= {"classification_weight": weight, "label_smoothing": smoothing}
    if vae is None:
        reason = "mean and deviation of training's log noise levels: EDM's, for pixels"
        objective["timestep_log_normal"] = Choice([-1.2, 1.2], reason)
    choices: dict[str, dict[str, Choice] | Choice] = {
        "model": {},
        "autoencoder": {"path": Choice(autoencoder, f"{shape[0]}x{shape[1]}x{shape[2]} numbers an image, {where}")},
        "data": _data(found, image_size, labelled, None if vae is None else f"{run}_latents"),
        "objective": objective,
        "training": {},
        "sampling": {
            "guidance_scale": Choice(4.0, "strong: samples show their class; 1 is unguided and more varied"),
            "num_inference_steps": Choice(15, "of the solver, for the grids and whoever samples"),
        },
        "output_dir": Choice(run, "checkpoints, samples, curves and the pipeline"),
    }
    if not objective:
        del choices["objective"]
    if not labelled:
        del choices["sampling"]["guidance_scale"]

    wanted = next((width for width, most in IMAGES_FOR_WIDTH.items() if found.num_images <= most), WIDTHS[-1])
    widths = [width for width in WIDTHS if width <= (min(wanted, 96) if on_cpu else wanted)]
    wanted_batch = min(48 if on_cpu else 128, found.num_train)
    for width in reversed(widths):
        for batch in dict.fromkeys(max(1, wanted_batch // divisor) for divisor in (1, 2, 4)):
            choices["model"] = _model(found, shape, width, on_cpu)
            choices["training"] = _training(found, machine, width, batch, wanted_batch)
            config = resolve(parse_config(plain_values(choices)))
            memory = estimate_memory(config.model, shape, config.training)
            if memory.state + memory.activations <= SHARE_OF_MEMORY * machine.memory:
                return Proposal(choices, config, shape, memory)
    raise ConfigError(
        f"data.image_size={image_size.value}: the smallest network would need "
        f"{(memory.state + memory.activations) / 2**30:.2f} GiB, {machine.memory / 2**30:.2f} GiB are free on "
        f"{machine.device}; ask for smaller images or an autoencoder with a larger factor"
    )


def is_labelled(found: Inspection) -> bool:
    """Whether there is something to classify: images of two classes at least."""
    return sum(count > 0 for count in found.class_counts.values()) > 1


def plain_values(choices: Mapping[str, dict[str, Choice] | Choice]) -> dict[str, Any]:
    """The values without their reasons, as `parse_config` takes them."""
    return {
        name: part.value if isinstance(part, Choice) else {key: choice.value for key, choice in part.items()}
        for name, part in choices.items()
    }


def _image_size(found: Inspection, vae: ModelMixin | None, on_cpu: bool) -> Choice:
    """A power of two: not above the images' own size or what the machine trains in a day, not too few latents."""
    shorter = int(np.median(found.sizes.min(axis=1)))
    own = 2 ** int(math.log2(shorter))
    largest, place = (64, "a CPU") if on_cpu else (256, "one accelerator")
    if vae is None:
        largest //= 2
    smallest = 8 if vae is None else 8 * vae_scale_factor(vae)
    if own < smallest or largest < smallest:
        return Choice(smallest, f"the smallest with 8x8 latents; images have {shorter} px (median of shorter sides)")
    if own > largest:
        return Choice(largest, f"what {place} trains in reasonable time; images have {shorter} px")
    return Choice(own, f"images have {shorter} px (median of shorter sides)")


def _data(found: Inspection, image_size: Choice, labelled: bool, cache: str | None) -> dict[str, Choice]:
    reasons = {
        "dataset": "what datasets.load_dataset takes",
        "data_dir": "the images",
        "data_files": "the images",
        "train_split": "there is none that is called train",
        "validation_split": f"held out by its makers, {found.num_validation:,} images; never trained on",
    }
    choices = {key: Choice(value, reasons[key]) for key, value in found.source.items()}
    if "validation_split" not in choices:
        choices["validation_fraction"] = Choice(0.2, f"no split for it: {found.num_validation:,} images are held out")
    choices["image_size"] = image_size
    if labelled and all(len(name) == 1 for name in found.class_counts):
        choices["horizontal_flip"] = Choice(False, "the classes look like digits or letters; true for photographs")
    else:
        reason = "right for photographs; false for text, digits, left and right hands"
        choices["horizontal_flip"] = Choice(True, reason)
    if labelled:
        choices["random_resized_crop"] = Choice([0.8, 1.0], "share of the area that the classifier sees")
        choices["num_views"] = Choice(4 if found.num_images < 2000 else 2, "such crops of an image in the cache")
    else:
        choices["random_resized_crop"] = Choice(None, "nothing is classified without labels")
        choices["num_views"] = Choice(1, "as nothing is classified")
    if cache is not None:
        choices["latent_cache"] = Choice(cache, "written by latent-egc encode, once")
    if found.num_unreadable:
        choices["skip_corrupt"] = Choice(True, f"cannot be read: {found.num_unreadable:,}; skipped and counted")
    elif found.num_looked_at < found.num_images:
        choices["skip_corrupt"] = Choice(True, "not all images were looked at; one that cannot be read is counted")
    return choices


def _model(found: Inspection, shape: tuple[int, int, int], width: int, on_cpu: bool) -> dict[str, Choice]:
    channels, size, _ = shape
    num_levels = 2 if size < 16 else 3 if size < 64 else 4
    while size % 2 ** (num_levels - 1):
        num_levels -= 1
    widths = [width * min(2**level, 4) for level in range(num_levels)]
    resolutions = ", ".join(f"{size // 2**level}x{size // 2**level}" for level in range(num_levels))
    if is_labelled(found):
        classes = {"num_classes": Choice(len(found.class_counts), "one for each name above")}
    else:
        classes = {
            "num_classes": Choice(None, "unlabelled"),
            "energy_channels": Choice(ENERGY_CHANNELS, "as many latent classes in their place"),
        }
    return {
        "backbone": Choice("unet", "learns faster than the transformer on little data"),
        "sample_size": Choice(size, "data.image_size through the autoencoder"),
        "in_channels": Choice(channels, "the autoencoder's latent channels"),
        **classes,
        "block_out_channels": Choice(widths, f"widths at {resolutions}; by the number of images and the memory"),
        "layers_per_block": Choice(1 if on_cpu else 2, "more is slower and better"),
    }


def _training(found: Inspection, machine: Machine, width: int, batch: int, wanted_batch: int) -> dict[str, Choice]:
    on_cpu = torch.device(machine.device).type == "cpu"
    epochs, least, most = (10, 400, 4000) if on_cpu else (100, 2000, 200_000)
    steps = min(max(50 * math.ceil(epochs * found.num_train / batch / 50), least), most)
    passes = f"{steps * batch / found.num_train:,.0f} passes over {found.num_train:,} images"
    decay = 0.995 if steps <= 5_000 else 0.999 if steps <= 50_000 else 0.9999
    choices = {
        "max_steps": Choice(steps, f"{passes}; more while held-out accuracy rises"),
        "train_batch_size": Choice(batch, "images a step" + (", as many as fit" if batch < wanted_batch else "")),
        "learning_rate": Choice(6e-4 if width <= 96 else 2e-4, "for this width" + ("" if width <= 96 else ", a guess")),
        "lr_schedule": Choice("cosine", "to zero at the last step"),
        "warmup_steps": Choice(max(1, round(steps / 20)), "5 % of the steps"),
        "ema_decay": Choice(decay, f"the saved weights are an average of about {1 / (1 - decay):,.0f} steps"),
        "validate_every": Choice(min(1000, math.ceil(steps / 4)), "steps; accuracy and loss on the held-out images"),
        "sample_every": Choice(min(5000, math.ceil(steps / 2)), "steps; a grid of samples"),
        "checkpoint_every": Choice(min(1000, math.ceil(steps / 4)), "steps; training.resume=auto goes on from there"),
    }
    if found.num_validation > 1000:
        choices["num_validation_images"] = Choice(1000, f"of {found.num_validation:,}, to be quick")
    if machine.bf16:
        choices["mixed_precision"] = Choice("bf16", "this device multiplies in it; gradients are checked at the start")
    return choices


def measure_step(proposal: Proposal, device: str, num_steps: int = 3) -> float:
    """Seconds of a training step of the proposed network, the median of a few on random latents."""
    config, batch = proposal.config, proposal.config.training.train_batch_size
    model = build_model(config.model, proposal.shape).to(device)
    objective = EGCObjective(model, config.objective.classification_weight, config.objective.label_smoothing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate)
    latents, clean_latents = torch.randn(2, batch, *proposal.shape, device=device)
    labels = torch.randint(config.model["num_classes"] or 1, (batch,), device=device)
    seconds = []
    for _ in tqdm(range(num_steps + 1), desc="measure a training step", unit="step"):
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, config.training.mixed_precision == "bf16"):
            loss = objective(latents, labels, clean_latents).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        next(model.parameters())[0].sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure_encoding(vae: ModelMixin, image_size: int, batch_size: int = 8) -> float:
    """Seconds that the autoencoder takes for one image."""
    images = torch.zeros(batch_size, 3, image_size, image_size)
    encode_moments(vae, images).cpu()
    start = time.perf_counter()
    encode_moments(vae, images).cpu()
    return (time.perf_counter() - start) / batch_size
