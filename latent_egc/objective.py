"""The training loss: denoise with the energy's gradient, classify with its logits.

    denoising_loss      = mean over elements of (epsilon(z_t, t) - eps)^2
    classification_loss = mean over the 2N rows [(z_t, t, y); (z_0', 0, y)] of alpha_t * cross entropy
    loss                = denoising_loss + classification_weight * classification_loss
                          + time_score_weight * mean over rows of (dF / d log s - (d - |eps|^2))^2 / (2 d)

dF / d log s is the time score, see `methods/density.py`, left out where its weight is 0. z_0' is another, stronger
augmentation of the same image. Source: EGC (ICCV 2023); the paper's gamma is our classification_weight, 0.005 for
ImageNet.

What a step costs, in forward passes of a batch through the trunk: the denoising part 6 (forward 1, input gradient 1,
the backward pass of both 4), an ordinary pass of classification 3.

    no class embedding      9    the noisy rows' logits come from the very pass whose energy was differentiated
    with one, "all"        12    they must not see the label that the energy sees: a pass of their own at the null label
    with one, "dropped"     9    they are read off the rows whose label is dropped, which saw the null label anyway
    clean_fraction f       - 3 (1 - f)
"""

import warnings
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from latent_egc.methods.density import time_score
from latent_egc.models.energy import NULL_LABEL, EnergyModel
from latent_egc.models.heads import EnergyOutput
from latent_egc.models.noise_schedule import add_noise
from latent_egc.models.potentials import energy_potential, input_and_time_gradient, input_gradient

UNLABELLED = -1


class EGCLosses(NamedTuple):
    """Scalars, at least float32; `loss` is what to differentiate."""

    loss: torch.Tensor
    denoising_loss: torch.Tensor
    classification_loss: torch.Tensor


class EGCObjective(nn.Module):
    """The loss as a module: DDP must wrap this, for the input gradient is taken inside its forward.

    Args:
        energy_model: the network to train.
        classification_weight: gamma >= 0.
        label_smoothing: of the cross entropy, in [0, 1).
        label_drop: the probability with which labels are dropped; needed by "dropped" only.
        noisy_classification: whose noisy latents are classified, for a model with a class embedding: "all" rows', or
            those of "dropped" rows, each weighted by 1 / label_drop. The expectation is the same: the sum is divided by
            a fixed number, never by how many were dropped.
        time_score_weight: at least 0, of the time score's part in `loss`, whose derivative comes from the same backward
            pass as epsilon. Rows whose label is seen train p(z | c), others p(z).

    Raises:
        ValueError: an argument out of range, or "dropped" where nothing is dropped.
    """

    def __init__(
        self,
        energy_model: EnergyModel,
        classification_weight: float = 0.005,
        label_smoothing: float = 0.0,
        label_drop: float = 0.0,
        noisy_classification: Literal["all", "dropped"] = "all",
        time_score_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if classification_weight < 0:
            raise ValueError(f"classification_weight must not be negative, got {classification_weight}")
        if time_score_weight < 0:
            raise ValueError(f"time_score_weight must not be negative, got {time_score_weight}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if noisy_classification not in ("all", "dropped"):
            raise ValueError(f"noisy_classification must be 'all' or 'dropped', got {noisy_classification!r}")
        if noisy_classification == "dropped" and not (energy_model.config.class_embedding and 0 < label_drop <= 1):
            raise ValueError(
                "noisy_classification='dropped' needs a class_embedding and a label_drop in (0, 1], "
                f"got class_embedding={energy_model.config.class_embedding}, label_drop={label_drop}"
            )
        self.energy_model = energy_model
        self.classification_weight = classification_weight
        self.label_smoothing = label_smoothing
        self.label_drop = label_drop
        self.noisy_classification = noisy_classification
        self.time_score_weight = time_score_weight

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        clean_latents: torch.Tensor | None = None,
        *,
        clean_labels: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        label_dropped: torch.Tensor | None = None,
    ) -> EGCLosses:
        """Losses of one batch.

        Args:
            latents: (N, C, h, w), scaled and clean; noise is added here.
            class_labels: (N,) int64 in [-1, K); -1 = unlabelled: such a row adds 0 to the classification loss, which
                still divides by all rows. None: unlabelled data; required by a model with classes.
            clean_latents: (M, C, h, w), the other augmentation z_0' of all rows or of a fixed number of them,
                classified at timestep 0 with weight N / M; required by a model with classes.
            clean_labels: theirs, (M,) int64, or (M, K) the share of each class in a row, which may sum to less than 1
                where the rest has no label: that rest adds 0 to the classification loss. None: `class_labels`.
            noise: (N, C, h, w); None: standard normal.
            timesteps: (N,); None: uniform integers in [0, num_train_timesteps).
            label_dropped: (N,) bool, rows whose class embedding sees the null label; None: none. Their classification
                target stays. Without effect on a model without class embedding.

        Returns:
            `EGCLosses`; classification_loss is 0 for a model without classes. What `loss` has beyond the two is the
            time score's.

        Raises:
            ValueError: labels or clean_latents missing, or out of range, for a model with classes.
        """
        model = self.energy_model
        num_rows, num_classes = len(latents), model.config.num_classes
        if noise is None:
            noise = torch.randn_like(latents)
        if timesteps is None:
            timesteps = torch.randint(model.config.num_train_timesteps, (num_rows,), device=latents.device)
        if num_classes is not None:
            if class_labels is None or clean_latents is None:
                raise ValueError("a model with classes needs class_labels and clean_latents")
            model.check_labels("class_labels", class_labels, num_rows, lowest=UNLABELLED)
            clean_labels = class_labels if clean_labels is None else clean_labels
            if clean_labels.ndim == 1:
                model.check_labels("clean_labels", clean_labels, len(clean_latents), lowest=UNLABELLED)
            elif clean_labels.shape != (len(clean_latents), num_classes) or not clean_labels.is_floating_point():
                raise ValueError(
                    f"clean_labels must be ({len(clean_latents)},) int64 or ({len(clean_latents)}, {num_classes}) "
                    f"floats, got {tuple(clean_labels.shape)} {clean_labels.dtype}"
                )

        levels = alpha, _ = model.noise_levels(timesteps)
        noisy_latents = add_noise(latents, noise, levels)
        embedded_labels = None
        if model.config.class_embedding:
            seen = class_labels != UNLABELLED
            if label_dropped is not None:
                seen = seen & ~label_dropped
            embedded_labels = torch.where(seen, class_labels, NULL_LABEL)
        epsilon, output, time_score_part = self._derivatives(embedded_labels, noisy_latents, noise, timesteps)
        denoising_loss = F.mse_loss(epsilon, noise.to(epsilon.dtype))
        if num_classes is None:
            return EGCLosses(denoising_loss + time_score_part, denoising_loss, torch.zeros_like(denoising_loss))

        clean_timesteps = class_labels.new_zeros(len(clean_latents))
        clean_alpha, _ = model.noise_levels(clean_timesteps)
        # Of the noisy and of the clean rows, so that their mean over 2N is what it is where all rows are classified.
        noisy_weights = alpha
        clean_weights = clean_alpha * (num_rows / len(clean_labels))
        if model.config.class_embedding and self.noisy_classification == "all":
            # What the classifier sees needs no second derivative.
            all_latents = torch.cat([noisy_latents, clean_latents])
            logits = model(all_latents, torch.cat([timesteps, clean_timesteps])).logits  # (N + M, K)
            noisy_logits, clean_logits = logits.split([num_rows, len(clean_latents)])
        else:
            noisy_logits, clean_logits = output.logits, model(clean_latents, clean_timesteps).logits
            if model.config.class_embedding:
                dropped = torch.zeros_like(class_labels) if label_dropped is None else label_dropped
                noisy_weights = noisy_weights * dropped / self.label_drop
        noisy_part = noisy_weights * cross_entropy(noisy_logits, class_labels, self.label_smoothing)
        clean_part = clean_weights * cross_entropy(clean_logits, clean_labels, self.label_smoothing)
        classification_loss = torch.cat([noisy_part, clean_part]).sum() / (2 * num_rows)
        loss = denoising_loss + self.classification_weight * classification_loss + time_score_part
        return EGCLosses(loss, denoising_loss, classification_loss)

    def _derivatives(
        self,
        embedded_labels: torch.Tensor | None,
        noisy_latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> tuple[torch.Tensor, EnergyOutput, torch.Tensor | float]:
        """Epsilon, the output that it is the gradient of, and the time score's part of the loss, 0.0 without one."""
        model = self.energy_model
        potential = energy_potential(model, embedded_labels)
        if self.time_score_weight == 0:
            epsilon, (output,) = input_gradient(potential, noisy_latents, timesteps)
            return epsilon, output, 0.0
        timesteps = timesteps.to(model.alphas_cumprod.dtype)  # a derivative needs floats
        epsilon, by_time, (output,) = input_and_time_gradient(potential, noisy_latents, timesteps)
        by_log_ratio = by_time / model.log_ratio_slopes(timesteps)
        found = time_score(output.energy, epsilon, by_log_ratio, noisy_latents, model.noise_levels(timesteps))
        num_dimensions = noise[0].numel()
        target = num_dimensions - noise.square().sum(dim=(1, 2, 3))
        return epsilon, output, self.time_score_weight * (found - target).square().mean() / (2 * num_dimensions)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """The cross entropy of each row, (N,), as far as the row is labelled.

    Args:
        logits: (N, K).
        labels: (N,) int64 in [-1, K), -1 = unlabelled, which gives 0; or (N, K), the share of each class in a row, of
            which the same is true for what is missing to a sum of 1.
        label_smoothing: in [0, 1); the smoothed one-hot labels are what is mixed, as in timm.
    """
    if labels.ndim == 1:
        options: dict[str, Any] = {"ignore_index": UNLABELLED, "label_smoothing": label_smoothing, "reduction": "none"}
        return F.cross_entropy(logits, labels, **options)
    smoothed = (1 - label_smoothing) * labels + label_smoothing * labels.mean(dim=1, keepdim=True)
    return -(smoothed * F.log_softmax(logits, dim=1)).sum(dim=1)


class CompiledForward:
    """The forward of an objective, compiled whole: the loss, its input gradient, and the backward pass of both.

    Assigned to `objective.forward`, so that no parameter changes its name and DDP may wrap the objective. Where the
    compiler fails there is one warning, and the plain forward from then on.

    Args:
        objective: the objective; gradients come from the compiled step.
        **options: to `torch.compile`, such as backend="aot_eager".
    """

    def __init__(self, objective: EGCObjective, **options: Any) -> None:
        self.plain, self.model = objective.forward, objective.energy_model
        self.compiled = torch.compile(self.plain, fullgraph=True, dynamic=False, **options)

    def __call__(self, *arguments: Any, **named_arguments: Any) -> EGCLosses:
        """As `EGCObjective.forward`."""
        _ = self.model.alphas_cumprod  # is kept; built while tracing, it would make the next call compile anew
        try:
            with (
                # DDP would have the graph split by its gradient buckets, and a part cannot be differentiated twice.
                torch._dynamo.config.patch(optimize_ddp=False),
                # A backward pass that does not compile is found by the forward, where something can be fallen back to.
                torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            ):
                return self.compiled(*arguments, **named_arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self.compiled is self.plain:
                raise
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"training.compile: the compiler failed, training goes on without it: {reason}", stacklevel=2)
            self.compiled = self.plain
            return self.plain(*arguments, **named_arguments)
