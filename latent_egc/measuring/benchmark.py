"""latent-egc benchmark: what an energy costs, each number beside the one it is to be compared with.

Both sides of a comparison are measured in one run, taking turns, on one synthetic batch and networks of one trunk. A
side's work is counted in units, forward passes of a batch through that trunk; a backward pass is one unit for each kind
of gradient that it makes (inputs, parameters). The ratio of two sides' units is the limit: what the ratio of their
seconds is where both run on the same kernels, in the same precision, and nothing but the trunk takes time.

    noise prediction    forward 1, backward 2                                          3
    energy, denoising   forward 1, input gradient 1, backward of both 4                6
    energy, full step   and the clean batch: forward 1, backward 2                     9
      class embedding   the noisy batch at the null label beside the clean one        12
      dropped           the noisy logits off the rows whose label is dropped           9
    as published        denoising 6, a classifier pass over noisy and clean batch 6   12
    guided sampling     forward 1, input gradient 1; as published two such passes      2, 4
      class embedding   both of 2N rows; as published two passes of N                  4, 4
    classifier-free     forward of 2N rows                                             2

A training step ends with the gradients of all parameters; the optimiser, alike on all sides, is left out.
"""

import copy
import dataclasses
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from latent_egc.config import Config
from latent_egc.data.autoencoders import encode_moments, latent_shape, load_autoencoder, store_channels_last
from latent_egc.measuring import benchmark_steps as steps
from latent_egc.measuring.benchmark_data import encoding_note, loading_note
from latent_egc.measuring.benchmark_steps import Workload
from latent_egc.measuring.timing import NUM_WARM_UP_STEPS, Pair, Side, distinct_sides, measure, table
from latent_egc.models import EGCUNet, attention
from latent_egc.objective import EGCObjective

# Attention alone is measured at these numbers of tokens, by as many rows as make the largest of them in all.
ATTENTION_TOKENS = (256, 1024, 4096)
ATTENTION_HEADS, ATTENTION_HEAD_DIM = 4, 64


def _side(name: str, step: Callable[..., Any], *arguments: Any, units: int | None = None) -> Side:
    return Side(name, partial(step, *arguments), units)


def training_pairs(work: Workload) -> list[Pair]:
    """The energy's training step against a noise predictor's."""
    noise_prediction = _side("noise-prediction training step", steps.noise_prediction_step, work, units=3)
    denoising = _side("energy training step, denoising part", steps.denoising_step, work, units=6)
    full = _side("energy training step, full", steps.full_step, work, work.objective, units=9)
    return [Pair(denoising, noise_prediction), Pair(full, noise_prediction)]


def published_pairs(work: Workload, with_bf16: bool) -> list[Pair]:
    """The full step against the step done as published, which is float32 always."""
    published = _side("step as published, float32", steps.published_step, work, units=12)
    float32 = dataclasses.replace(work, mixed_precision="no")
    pairs = [Pair(_side("full step, float32", steps.full_step, float32, work.objective, units=9), published)]
    if with_bf16:  # not counted in units, which would compare two precisions
        bf16 = dataclasses.replace(work, mixed_precision="bf16")
        pairs.append(Pair(_side("full step, bf16", steps.full_step, bf16, work.objective), published))
    return pairs


def embedding_pairs(work: Workload) -> list[Pair]:
    """With a class embedding: the training step in both forms and the guided sampling step, against the published."""
    published = _side("step as published, class embedding", steps.published_step, work, units=12)
    weights = work.objective.classification_weight, work.objective.label_smoothing
    dropped = EGCObjective(work.model, *weights, label_drop=0.5, noisy_classification="dropped")
    # In bf16 not counted in units, which would compare two precisions: the published step is float32.
    all_units, dropped_units = (12, 9) if work.mixed_precision == "no" else (None, None)
    full = _side("full step, class embedding", steps.full_step, work, work.objective, units=all_units)
    fast = _side("full step, class embedding, dropped", steps.full_step, work, dropped, units=dropped_units)
    guided = _side("guided sampling step, class embedding", steps.guided_step, work, work.model.epsilon, units=4)
    two_passes = _side("guidance in two passes, class embedding", steps.two_pass_guided_step, work, units=4)
    classifier_free = _side("classifier-free guidance, noise prediction", steps.classifier_free_step, work, units=2)
    pairs = [Pair(full, published), Pair(fast, published)]
    return [*pairs, Pair(guided, two_passes), Pair(guided, classifier_free)]


def variant_pairs(work: Workload) -> list[Pair]:
    """The full step compiled, with activation checkpointing and with chunked attention."""
    compiled = torch.compile(work.objective.forward, fullgraph=True, dynamic=False)
    checkpointed = steps.with_checkpointing(work)
    eager = _side("full step, eager", steps.full_step, work, work.objective)
    math_attention = _side("full step, math attention", steps.chunked_step, work, math.inf)
    return [
        Pair(_side("full step, compiled", steps.full_step, work, compiled), eager),
        Pair(_side("full step, checkpointed", steps.full_step, checkpointed, checkpointed.objective), eager),
        Pair(_side("full step, chunked attention", steps.chunked_step, work, 1), math_attention),
    ]


def attention_pair(work: Workload, num_tokens: int) -> Pair:
    """Chunked against math attention, alone, in a training step."""
    num_rows = max(ATTENTION_TOKENS) // num_tokens
    dtype = torch.bfloat16 if work.mixed_precision == "bf16" else torch.float32
    shape = (num_rows, ATTENTION_HEADS, num_tokens, ATTENTION_HEAD_DIM)
    inputs = [torch.randn(shape, device=work.latents.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    kernels = {"chunked": attention.chunked_attention, "math": attention.math_attention}
    named = {name: f"{name} attention, {num_tokens} tokens" for name in kernels}
    return Pair(*(_side(named[name], steps.attention_step, kernel, *inputs) for name, kernel in kernels.items()))


def sampling_pairs(work: Workload) -> list[Pair]:
    """The guided sampling step against other guidances, and its faster forms against itself."""
    guided = _side("guided sampling step", steps.guided_step, work, work.model.epsilon, units=2)
    classifier_free = _side("classifier-free guidance, noise prediction", steps.classifier_free_step, work, units=2)
    two_passes = _side("guidance in two passes, as published", steps.two_pass_guided_step, work, units=4)
    compiled = torch.compile(work.model.epsilon, fullgraph=True, dynamic=False)
    faster = _side("guided sampling step, compiled", steps.guided_step, work, compiled)
    pairs = [Pair(guided, classifier_free), Pair(guided, two_passes), Pair(faster, guided)]
    if isinstance(work.model, EGCUNet):
        model = copy.deepcopy(work.model).to(memory_format=torch.channels_last)
        latents = work.noisy_latents.contiguous(memory_format=torch.channels_last)
        channels_last = dataclasses.replace(work, model=model, noisy_latents=latents)
        faster = _side("guided sampling step, channels last", steps.guided_step, channels_last, model.epsilon)
        pairs.append(Pair(faster, guided))
    return pairs


def classification_pair(work: Workload) -> Pair:
    """Classification against a plain forward pass."""
    plain = _side("plain forward pass", steps.plain_forward, work, units=1)
    return Pair(_side("classification", steps.classification, work, units=1), plain)


def encoding_pair(vae: ModelMixin, batch_size: int, image_size: int) -> Pair:
    """The autoencoder on a batch of random images, as encoding runs it, beside nothing."""
    store_channels_last(vae)
    pixel_values = torch.rand(batch_size, 3, image_size, image_size, device=vae.device) * 2 - 1
    name = f"encoding {batch_size} images of {image_size} px, {type(vae).__name__}"
    return Pair(_side(name, encode_moments, vae, pixel_values))


@dataclass(frozen=True)
class BenchmarkReport:
    """What was measured, under which settings, and notes on what was not.

    `str` gives the settings in a line, the rows as a Markdown table, and the notes.
    """

    settings: dict[str, Any]
    pairs: list[Pair]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"settings": self.settings, "rows": [pair.to_dict() for pair in self.pairs], "notes": self.notes}

    def __str__(self) -> str:
        s = self.settings
        title = (
            f"{s['device']}, {s['num_threads']} threads, torch {s['torch']}; {s['model']['backbone']} of "
            f"{s['num_parameters'] / 1e6:.2f} M parameters, latents {'x'.join(map(str, s['latents']))}, "
            f"mixed_precision {s['mixed_precision']}; medians of {s['repeats']}, memory beyond weights and batch"
        )
        return "\n\n".join([title, table(self.pairs), *self.notes])


def benchmark(
    config: Config, repeats: int = 20, device: str = "cpu", groups: Sequence[str] | None = None
) -> BenchmarkReport:
    """Measures the rows on the configuration's model, batch size, precision and autoencoder.

    Args:
        config: a whole run's configuration; its data are not read.
        repeats: how often each side is timed.
        device: "cpu" or a CUDA device.
        groups: names of groups of rows, which an unknown name's error lists; None: all.

    Raises:
        ConfigError: a configuration that cannot be measured, such as a model without classes.
        ValueError: another device, CUDA where there is none, or an unknown group.
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no GPU")
    image_size, batch_size = config.data.image_size, config.training.train_batch_size
    vae = load_autoencoder(config.autoencoder)
    latent_shape(vae, image_size)  # raises where the two do not fit
    work = steps.make_workload(config, place)
    with_bf16 = place.type == "cuda" or work.mixed_precision == "bf16"
    pairs_of = {
        "training step": training_pairs(work),
        "as published": published_pairs(work, with_bf16),
        "class embedding": embedding_pairs(steps.make_workload(config, place, class_embedding=True)),
        "variants": variant_pairs(work),
        **{f"{num_tokens} tokens": [attention_pair(work, num_tokens)] for num_tokens in ATTENTION_TOKENS},
        "sampling step": sampling_pairs(work),
        "classification": [classification_pair(work)],
        "encoding": [] if vae is None else [encoding_pair(vae.to(place), batch_size, image_size)],
    }
    if unknown := sorted(set(groups or ()) - pairs_of.keys()):
        raise ValueError(f"groups must be of {', '.join(pairs_of)}, got {', '.join(unknown)}")
    measured = {name: pairs for name, pairs in pairs_of.items() if groups is None or name in groups}
    for name, pairs in measured.items():
        measure(name, pairs, place, repeats)

    notes = []
    if not with_bf16:
        notes.append("full step, bf16: not measured on a CPU unless training.mixed_precision is bf16")
    if vae is None:
        notes.append("encoding: not measured, autoencoder.path is null (pixel space)")
    for pair in pairs_of["encoding"]:
        if pair.side.median is not None:
            notes.append(encoding_note(config, vae, batch_size, pair.side.median))
    full_step = pairs_of["training step"][-1].side
    if full_step.median is not None:
        notes.append(loading_note(config, vae, place, full_step.median))
    pairs = [pair for group in measured.values() for pair in group]
    notes += [f"{side.name}: failed, {side.failure}" for side in distinct_sides(pairs) if side.failure is not None]
    settings = describe(work, place) | {
        "autoencoder": None if vae is None else type(vae).__name__,
        "image_size": image_size,
        "repeats": repeats,
    }
    return BenchmarkReport(settings, pairs, notes)


def describe(work: Workload, device: torch.device) -> dict[str, Any]:
    """The settings that the numbers depend on."""
    model = work.model
    arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "model": {"backbone": type(model).__name__, **arguments},
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "latents": list(work.latents.shape),
        "mixed_precision": work.mixed_precision,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "chunked_from_tokens": attention.CHUNKED_FROM_TOKENS,
        "attention_alone": {"tokens": list(ATTENTION_TOKENS), "heads": ATTENTION_HEADS, "head_dim": ATTENTION_HEAD_DIM},
        "guidance_scale": steps.GUIDANCE_SCALE,
        "num_warm_up_steps": NUM_WARM_UP_STEPS,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform knows no more than the architecture there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
