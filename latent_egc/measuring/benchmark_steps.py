"""What `latent-egc benchmark` times: the networks and one batch, and one function a step.

A training step returns the gradients of all parameters, a sampling step a guided noise prediction (N, C, h, w).
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latent_egc.config import Config, ConfigError
from latent_egc.models import EnergyModel, attention
from latent_egc.models.energy import NULL_LABEL
from latent_egc.models.noise_schedule import add_noise
from latent_egc.models.numerics import at_least_float32, twice_differentiable
from latent_egc.objective import EGCLosses, EGCObjective
from latent_egc.training.build import build_network, resolve_model

GUIDANCE_SCALE = 2.0


@dataclass(frozen=True)
class Workload:
    """The networks and the one batch of all rows but the attention's and the encoder's.

    Args:
        model: the energy network.
        noise_predictor: the same trunk with another output layer, whose field h is the noise prediction.
        objective: the full training step's loss.
        latents, clean_latents, noise, noisy_latents: (N, C, h, w).
        timesteps, class_labels: (N,) int64.
        label_dropped: (N,) bool, every other row; without effect but on a class embedding.
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
    label_dropped: torch.Tensor
    mixed_precision: str

    def autocast(self) -> torch.autocast:
        """The context in which the forward passes run."""
        return torch.autocast(self.latents.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")


def make_workload(config: Config, device: torch.device, class_embedding: bool = False) -> Workload:
    """The networks of a configuration, with or without a class embedding, and a random batch.

    Raises:
        ConfigError: a model without classes, or arguments that contradict each other.
    """
    section = resolve_model(config.model) | {"class_embedding": class_embedding}
    if section["num_classes"] is None:
        raise ConfigError("model.num_classes must be set: the benchmark compares classification and guidance, too")
    as_noise_predictor = {"head": "inner", "num_classes": None, "energy_channels": None, "gaussian_part": False}
    as_noise_predictor["class_embedding"] = False
    torch.manual_seed(0)
    model = build_network(section).to(device)
    noise_predictor = build_network(section | as_noise_predictor).to(device)
    for parameter in (*model.parameters(), *noise_predictor.parameters()):
        if not parameter.any():  # else whole paths of a fresh network, and their gradients, would be zero
            nn.init.normal_(parameter, std=0.02)

    batch_size, size = config.training.train_batch_size, model.config.sample_size
    latents, clean, noise = torch.randn(3, batch_size, model.config.in_channels, size, size, device=device)
    timesteps = torch.randint(model.config.num_train_timesteps, (batch_size,), device=device)
    return Workload(
        model=model,
        noise_predictor=noise_predictor,
        objective=EGCObjective(model, config.objective.classification_weight, config.objective.label_smoothing),
        latents=latents,
        clean_latents=clean,
        noise=noise,
        noisy_latents=add_noise(latents, noise, model.noise_levels(timesteps)),
        timesteps=timesteps,
        class_labels=torch.randint(model.config.num_classes, (batch_size,), device=device),
        label_dropped=torch.arange(batch_size, device=device) % 2 == 0,
        mixed_precision=config.training.mixed_precision or "no",
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


# --- training steps --------------------------------------------------------------------------------------------------


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
    """The step that training takes: 9 units, 12 with a class embedding. `objective` is the workload's, or another."""
    given = {"noise": work.noise, "timesteps": work.timesteps, "label_dropped": work.label_dropped}
    with work.autocast():
        losses = objective(work.latents, work.class_labels, work.clean_latents, **given)
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
    seen = torch.where(work.label_dropped, NULL_LABEL, work.class_labels) if model.config.class_embedding else None
    with published_kernels():
        noisy_latents = work.noisy_latents.detach().requires_grad_()
        with twice_differentiable(True):
            energy = model.read_at(noisy_latents, work.timesteps, [seen])[0].energy
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


# --- sampling steps and forward passes -------------------------------------------------------------------------------


@torch.no_grad()
def guided_step(work: Workload, epsilon: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The energy's gradient with the classifier's: 2 units, 4 with a class embedding. `epsilon`: the model's method."""
    with work.autocast():
        return epsilon(work.noisy_latents, work.timesteps, work.class_labels, guidance_scale=GUIDANCE_SCALE)


def two_pass_guided_step(work: Workload) -> torch.Tensor:
    """The same noise prediction as published, a pass for the energy and one for the classifier: 4 units."""
    with work.autocast():
        latents = work.noisy_latents.detach().requires_grad_()
        seen = work.class_labels if work.model.config.class_embedding else None
        energy = work.model.read_at(latents, work.timesteps, [seen])[0].energy
        (epsilon,) = torch.autograd.grad(energy.sum(), latents)
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
