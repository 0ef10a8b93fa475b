"""latent-egc benchmark: what an energy costs, each number beside the one it is to be compared with.

Both sides of a comparison are measured in one run, taking turns, on one synthetic batch and networks of one trunk. A
side's work is counted in units, forward passes of a batch through that trunk; a backward pass is one unit for each kind
of gradient that it makes (inputs, parameters). The ratio of two sides' units is the limit: what the ratio of their
seconds is where both run on the same kernels, in the same precision, and nothing but the trunk takes time.

    noise prediction    forward 1, backward 2                                          3
    energy, denoising   forward 1, input gradient 1, backward of both 4                6
    energy, full step   and the clean batch: forward 1, backward 2                     9
    as published        denoising 6, a classifier pass over noisy and clean batch 6   12
    guided sampling     forward 1, input gradient 1; as published two such passes      2, 4
    classifier-free     forward of 2N rows                                             2

A training step ends with the gradients of all parameters; the optimiser, alike on all sides, is left out.
"""

import copy
import dataclasses
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latent_egc.config import Config, ConfigError
from latent_egc.data.autoencoders import encode_moments, latent_shape, load_autoencoder
from latent_egc.measuring.timing import NUM_WARM_UP_STEPS, Pair, Side, distinct_sides, measure, table
from latent_egc.models import EGCUNet, EnergyModel, attention
from latent_egc.models.energy import at_least_float32
from latent_egc.objective import EGCLosses, EGCObjective
from latent_egc.training.build import build_network, resolve_model

GUIDANCE_SCALE = 2.0
# Attention alone is measured at these numbers of tokens, by as many rows as make the largest of them in all.
ATTENTION_TOKENS = (256, 1024, 4096)
ATTENTION_HEADS, ATTENTION_HEAD_DIM = 4, 64


# --- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """The networks and the one batch of all rows but the attention's and the encoder's.

    Args:
        model: the energy network.
        noise_predictor: the same trunk with another output layer, whose field h is the noise prediction.
        objective: the full training step's loss.
        latents, clean_latents, noise, noisy_latents: (N, C, h, w).
        timesteps, class_labels: (N,) int64.
        mixed_precision: "no" or "bf16".
    """

    model: EnergyModel
    noise_predictor: EnergyModel
    objective: EGCObjective
    latents: torch.Tensor
    clean_latents: torch.Tensor
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    class_labels: torch.Tensor
    mixed_precision: str

    def autocast(self) -> torch.autocast:
        """The context in which the forward passes run."""
        return torch.autocast(self.latents.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")


def make_workload(config: Config, device: torch.device) -> Workload:
    """The networks of a configuration, without a class embedding, and a random batch.

    An embedding would make 2N rows of the noisy batch, on both sides of every comparison.

    Raises:
        ConfigError: a model without classes, or arguments that contradict each other.
    """
    section = resolve_model(config.model) | {"class_embedding": False}
    if section["num_classes"] is None:
        raise ConfigError("model.num_classes must be set: the benchmark compares classification and guidance, too")
    as_noise_predictor = {"head": "inner", "num_classes": None, "energy_channels": None, "gaussian_part": False}
    torch.manual_seed(0)
    model = build_network(section).to(device)
    noise_predictor = build_network(section | as_noise_predictor).to(device)
    for parameter in (*model.parameters(), *noise_predictor.parameters()):
        if not parameter.any():  # else whole paths of a fresh network, and their gradients, would be zero
            nn.init.normal_(parameter, std=0.02)

    batch_size, size = config.training.train_batch_size, model.config.sample_size
    latents, clean, noise = torch.randn(3, batch_size, model.config.in_channels, size, size, device=device)
    timesteps = torch.randint(model.config.num_train_timesteps, (batch_size,), device=device)
    alpha, sigma = (level[:, None, None, None] for level in model.noise_levels(timesteps))
    return Workload(
        model=model,
        noise_predictor=noise_predictor,
        objective=EGCObjective(model, config.objective.classification_weight, config.objective.label_smoothing),
        latents=latents,
        clean_latents=clean,
        noise=noise,
        noisy_latents=alpha * latents + sigma * noise,
        timesteps=timesteps,
        class_labels=torch.randint(model.config.num_classes, (batch_size,), device=device),
        mixed_precision=config.training.mixed_precision,
    )


def with_checkpointing(work: Workload) -> Workload:
    """The workload with a copy of the energy network that recomputes its activations.

    A copy, since what is switched on a network makes the compiler begin anew with its other sides.
    """
    objective = copy.deepcopy(work.objective)
    objective.energy_model.enable_gradient_checkpointing()
    return dataclasses.replace(work, model=objective.energy_model, objective=objective)


@contextmanager
def chunked_attention_from(num_tokens: float) -> Iterator[None]:
    """Within it, twice differentiable attention is chunked from this number of tokens on."""
    usual = attention.CHUNKED_FROM_TOKENS
    attention.CHUNKED_FROM_TOKENS = num_tokens
    try:
        yield
    finally:
        attention.CHUNKED_FROM_TOKENS = usual


@contextmanager
def published_kernels() -> Iterator[None]:
    """Within it, attention is math attention in all passes, and float32 is float32: no TF32."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            chunked_attention_from(math.inf),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(usual)


# --- training steps: each returns the gradients of all parameters ---------------------------------------------------


def noise_prediction_step(work: Workload) -> tuple[torch.Tensor, ...]:
    """The step of an ordinary diffusion model: 3 units."""
    with work.autocast():
        predicted = work.noise_predictor.network(work.noisy_latents, work.timesteps, None)
        loss = F.mse_loss(at_least_float32(predicted[0]), work.noise)
    return torch.autograd.grad(loss, tuple(work.noise_predictor.parameters()))


def denoising_step(work: Workload) -> tuple[torch.Tensor, ...]:
    """The energy's step without the clean batch and the classifier: 6 units."""
    with work.autocast():
        loss = F.mse_loss(work.model.epsilon(work.noisy_latents, work.timesteps), work.noise)
    return torch.autograd.grad(loss, tuple(work.model.parameters()))


def full_step(work: Workload, objective: Callable[..., EGCLosses]) -> tuple[torch.Tensor, ...]:
    """The step that training takes: 9 units. `objective` is the workload's, or its forward compiled."""
    with work.autocast():
        losses = objective(
            work.latents, work.class_labels, work.clean_latents, noise=work.noise, timesteps=work.timesteps
        )
    return torch.autograd.grad(losses.loss, tuple(work.model.parameters()))


def chunked_step(work: Workload, from_tokens: float) -> tuple[torch.Tensor, ...]:
    """`full_step` with chunked attention from this number of tokens on."""
    with chunked_attention_from(from_tokens):
        return full_step(work, work.objective)


def published_step(work: Workload) -> tuple[torch.Tensor, ...]:
    """The gradients of `full_step`, computed as published: 12 units.

    Eager, math attention, float32 without TF32, and a score pass beside a classifier pass over noisy and clean latents.
    """
    model, objective = work.model, work.objective
    with published_kernels():
        noisy_latents = work.noisy_latents.detach().requires_grad_()
        energy = model(noisy_latents, work.timesteps).energy
        (epsilon,) = torch.autograd.grad(energy.sum(), noisy_latents, create_graph=True)
        latents = torch.cat([work.noisy_latents, work.clean_latents])
        timesteps = torch.cat([work.timesteps, torch.zeros_like(work.timesteps)])
        cross_entropy = F.cross_entropy(
            model(latents, timesteps).logits,
            torch.cat([work.class_labels, work.class_labels]),
            label_smoothing=objective.label_smoothing,
            reduction="none",
        )
        alpha, _ = model.noise_levels(timesteps)
        loss = F.mse_loss(epsilon, work.noise) + objective.classification_weight * (alpha * cross_entropy).mean()
        return torch.autograd.grad(loss, tuple(model.parameters()))


def attention_step(
    kernel: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Attention alone, differentiated as in training: forward, gradient, and the backward pass of both."""
    inputs = (query, key, value)
    gradients = torch.autograd.grad(kernel(*inputs).square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)


# --- sampling steps: each returns a guided noise prediction (N, C, h, w) --------------------------------------------


@torch.no_grad()
def guided_step(work: Workload, epsilon: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The energy's gradient with the classifier's: 2 units. `epsilon` is the model's method, or that compiled."""
    with work.autocast():
        return epsilon(
            work.noisy_latents, work.timesteps, guidance_labels=work.class_labels, guidance_scale=GUIDANCE_SCALE
        )


def two_pass_guided_step(work: Workload) -> torch.Tensor:
    """The same noise prediction as published, a pass for the energy and one for the classifier: 4 units."""
    with work.autocast():
        latents = work.noisy_latents.detach().requires_grad_()
        (epsilon,) = torch.autograd.grad(work.model(latents, work.timesteps).energy.sum(), latents)
        log_p = F.log_softmax(work.model(latents, work.timesteps).logits, dim=-1)
        (classifier_score,) = torch.autograd.grad(log_p.gather(1, work.class_labels[:, None]).sum(), latents)
        _, sigma = work.model.noise_levels(work.timesteps)
        return epsilon - GUIDANCE_SCALE * sigma[:, None, None, None] * classifier_score


@torch.no_grad()
def classifier_free_step(work: Workload) -> torch.Tensor:
    """Classifier-free guidance of a noise predictor, with and without label as one batch of 2N rows: 2 units."""
    with work.autocast():
        latents, timesteps = (torch.cat([tensor, tensor]) for tensor in (work.noisy_latents, work.timesteps))
        predicted, _ = work.noise_predictor.network(latents, timesteps, None)
        unconditional, conditional = predicted.chunk(2)
        return unconditional + GUIDANCE_SCALE * (conditional - unconditional)


@torch.no_grad()
def classification(work: Workload) -> torch.Tensor:
    """Logits (N, K) of clean latents: 1 unit."""
    with work.autocast():
        return work.model(work.latents, 0).logits


@torch.no_grad()
def plain_forward(work: Workload) -> torch.Tensor:
    """The noise predictor's output (N, C, h, w): 1 unit."""
    with work.autocast():
        return work.noise_predictor.network(work.latents, work.timesteps, None)[0]


# --- the rows -------------------------------------------------------------------------------------------------------


def training_pairs(work: Workload) -> list[Pair]:
    """The energy's training step against a noise predictor's."""
    noise_prediction = Side("noise-prediction training step", partial(noise_prediction_step, work), units=3)
    return [
        Pair(Side("energy training step, denoising part", partial(denoising_step, work), units=6), noise_prediction),
        Pair(Side("energy training step, full", partial(full_step, work, work.objective), units=9), noise_prediction),
    ]


def published_pairs(work: Workload, with_bf16: bool) -> list[Pair]:
    """The full step against the step done as published, which is float32 always."""
    published = Side("step as published, float32", partial(published_step, work), units=12)
    float32 = dataclasses.replace(work, mixed_precision="no")
    pairs = [Pair(Side("full step, float32", partial(full_step, float32, work.objective), units=9), published)]
    if with_bf16:  # not counted in units, which would compare two precisions
        bf16 = dataclasses.replace(work, mixed_precision="bf16")
        pairs.append(Pair(Side("full step, bf16", partial(full_step, bf16, work.objective)), published))
    return pairs


def variant_pairs(work: Workload) -> list[Pair]:
    """The full step compiled, with activation checkpointing and with chunked attention."""
    compiled = torch.compile(work.objective.forward, fullgraph=True, dynamic=False)
    checkpointed = with_checkpointing(work)
    eager = Side("full step, eager", partial(full_step, work, work.objective))
    math_attention = Side("full step, math attention", partial(chunked_step, work, math.inf))
    return [
        Pair(Side("full step, compiled", partial(full_step, work, compiled)), eager),
        Pair(Side("full step, checkpointed", partial(full_step, checkpointed, checkpointed.objective)), eager),
        Pair(Side("full step, chunked attention", partial(chunked_step, work, 1)), math_attention),
    ]


def attention_pair(work: Workload, num_tokens: int) -> Pair:
    """Chunked against math attention, alone, in a training step."""
    num_rows = max(ATTENTION_TOKENS) // num_tokens
    dtype = torch.bfloat16 if work.mixed_precision == "bf16" else torch.float32
    shape = (num_rows, ATTENTION_HEADS, num_tokens, ATTENTION_HEAD_DIM)
    inputs = [torch.randn(shape, device=work.latents.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    return Pair(
        Side(f"chunked attention, {num_tokens} tokens", partial(attention_step, attention.chunked_attention, *inputs)),
        Side(f"math attention, {num_tokens} tokens", partial(attention_step, attention.math_attention, *inputs)),
    )


def sampling_pairs(work: Workload) -> list[Pair]:
    """The guided sampling step against other guidances, and its faster forms against itself."""
    guided = Side("guided sampling step", partial(guided_step, work, work.model.epsilon), units=2)
    classifier_free = Side("classifier-free guidance, noise prediction", partial(classifier_free_step, work), units=2)
    two_passes = Side("guidance in two passes, as published", partial(two_pass_guided_step, work), units=4)
    compiled = torch.compile(work.model.epsilon, fullgraph=True, dynamic=False)
    pairs = [
        Pair(guided, classifier_free),
        Pair(guided, two_passes),
        Pair(Side("guided sampling step, compiled", partial(guided_step, work, compiled)), guided),
    ]
    if isinstance(work.model, EGCUNet):
        model = copy.deepcopy(work.model).to(memory_format=torch.channels_last)
        latents = work.noisy_latents.contiguous(memory_format=torch.channels_last)
        channels_last = dataclasses.replace(work, model=model, noisy_latents=latents)
        side = Side("guided sampling step, channels last", partial(guided_step, channels_last, model.epsilon))
        pairs.append(Pair(side, guided))
    return pairs


def classification_pair(work: Workload) -> Pair:
    """Classification against a plain forward pass."""
    return Pair(
        Side("classification", partial(classification, work), units=1),
        Side("plain forward pass", partial(plain_forward, work), units=1),
    )


def encoding_pair(vae: ModelMixin, batch_size: int, image_size: int) -> Pair:
    """The autoencoder on a batch of random images, beside nothing."""
    pixel_values = torch.rand(batch_size, 3, image_size, image_size, device=vae.device) * 2 - 1
    name = f"encoding {batch_size} images of {image_size} px, {type(vae).__name__}"
    return Pair(Side(name, partial(encode_moments, vae, pixel_values)))


# --- the whole ------------------------------------------------------------------------------------------------------


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


def benchmark(config: Config, repeats: int = 20, device: str = "cpu") -> BenchmarkReport:
    """Measures every row on the configuration's model, batch size, precision and autoencoder.

    Args:
        config: a whole run's configuration; its data are not read.
        repeats: how often each side is timed.
        device: "cpu" or a CUDA device.

    Raises:
        ConfigError: a configuration that cannot be measured, such as a model without classes.
        ValueError: another device, or CUDA where there is none.
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no GPU")
    image_size, batch_size = config.data.image_size, config.training.train_batch_size
    vae = load_autoencoder(config.autoencoder)
    latent_shape(vae, image_size)  # raises where the two do not fit
    work = make_workload(config, place)
    with_bf16 = place.type == "cuda" or work.mixed_precision == "bf16"
    groups = {
        "training step": training_pairs(work),
        "as published": published_pairs(work, with_bf16),
        "variants": variant_pairs(work),
        **{f"{num_tokens} tokens": [attention_pair(work, num_tokens)] for num_tokens in ATTENTION_TOKENS},
        "sampling step": sampling_pairs(work),
        "classification": [classification_pair(work)],
        "encoding": [] if vae is None else [encoding_pair(vae.to(place), batch_size, image_size)],
    }
    for name, pairs in groups.items():
        measure(name, pairs, place, repeats)

    notes = []
    if not with_bf16:
        notes.append("full step, bf16: not measured on a CPU unless training.mixed_precision is bf16")
    if vae is None:
        notes.append("encoding: not measured, autoencoder.path is null (pixel space)")
    for pair in groups["encoding"]:
        if pair.side.median is not None:
            notes.append(f"{pair.side.name}: {batch_size / pair.side.median:.1f} a second")
    pairs = [pair for group in groups.values() for pair in group]
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
        "guidance_scale": GUIDANCE_SCALE,
        "num_warm_up_steps": NUM_WARM_UP_STEPS,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform knows no more than the architecture there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
