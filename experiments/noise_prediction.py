"""The field h of head "inner" as what a diffusion network usually is, a noise predictor: for the other experiments.

    epsilon = h(z, t, c)                        or sigma_t z + alpha_t h with the Gaussian part
    guided  = epsilon(null) + w (epsilon(c) - epsilon(null))            classifier-free guidance

The same weights are an energy too, whose gradient is this epsilon where h is linear and symmetric in z
(`latent_egc/models/heads.py`): so a run of these objectives is saved as an energy network like any other, what is
validated and drawn while it trains is that reading of it, and `model.init_from` goes on from it.
"""

import torch
import torch.nn.functional as F

from latent_egc.models import EnergyModel
from latent_egc.models.energy import NULL_LABEL
from latent_egc.models.heads import EnergyOutput, inner_energy
from latent_egc.models.noise_schedule import add_noise
from latent_egc.objective import UNLABELLED, EGCLosses, EGCObjective


def predicted_noise(
    model: EnergyModel, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embedded_labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Epsilon (N, C, h, w) by the field, at least float32, and the logits (N, K) of that pass. 1 unit.

    Args:
        model: of head "inner".
        noisy_latents: (N, C, h, w), scaled latents at `timesteps`.
        timesteps: (N,) in [0, num_train_timesteps).
        embedded_labels: (N,) int64 in [-1, K), -1 = null; None for a model without class embedding.
    """
    field, logits = model.network(noisy_latents, timesteps, embedded_labels)
    if model.config.gaussian_part:
        alpha, sigma = (level[:, None, None, None] for level in model.noise_levels(timesteps))
        field = sigma * noisy_latents + alpha * field
    return field, logits


def guided_noise(
    model: EnergyModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    *,
    guidance_scale: float = 0.0,
    classifier_free_scale: float = 1.0,
) -> torch.Tensor:
    """What a pipeline asks of `EnergyModel.epsilon`, by classifier-free guidance of the field. 2 units, or 1.

    `guidance_scale` is the w of p(z) p(y | z)^w as it is for an energy network, where p(y | z) is p(z | y) / p(z): 0 is
    without the label, 1 the prediction at the label. At both of these it is 1 unit.

    Args:
        model: of head "inner" with a class embedding.
        noisy_latents: (N, C, h, w).
        timesteps: (N,) or a scalar.
        class_labels: (N,) int64 in [-1, K); None: null.
        guidance_scale: w.
        classifier_free_scale: must be 1, for w says it all.

    Returns:
        (N, C, h, w), the dtype of `noisy_latents`.
    """
    if classifier_free_scale != 1:
        raise ValueError(f"a noise predictor is guided by guidance_scale alone, got {classifier_free_scale=}")
    timesteps = torch.as_tensor(timesteps, device=noisy_latents.device).expand(len(noisy_latents))
    null = torch.full((len(noisy_latents),), NULL_LABEL, device=noisy_latents.device)
    if class_labels is None or guidance_scale in (0, 1):
        labels = null if class_labels is None or guidance_scale == 0 else class_labels
        return predicted_noise(model, noisy_latents, timesteps, labels)[0].to(noisy_latents.dtype)
    inputs = torch.cat([noisy_latents] * 2), torch.cat([timesteps] * 2), torch.cat([null, class_labels])
    at_null, at_label = predicted_noise(model, *inputs)[0].chunk(2)
    return (at_null + guidance_scale * (at_label - at_null)).to(noisy_latents.dtype)


class NoiseObjective(EGCObjective):
    """The mean squared error of the field's epsilon; nothing is classified. 3 units."""

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        *,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        label_dropped: torch.Tensor,
        **unused: torch.Tensor,
    ) -> EGCLosses:
        """As `EGCObjective.forward`."""
        noisy_latents = add_noise(latents, noise, self.energy_model.noise_levels(timesteps))
        labels = None
        if self.energy_model.config.class_embedding:
            labels = torch.where((class_labels == UNLABELLED) | label_dropped, NULL_LABEL, class_labels)
        epsilon, _ = predicted_noise(self.energy_model, noisy_latents, timesteps, labels)
        loss = F.mse_loss(epsilon, noise.to(epsilon.dtype))
        return EGCLosses(loss, loss, torch.zeros_like(loss))


class FieldObjective(EGCObjective):
    """As `EGCObjective`, cross entropy and all, but the noise is the field's and no gradient. 6 units."""

    def _derivatives(
        self,
        embedded_labels: torch.Tensor | None,
        noisy_latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> tuple[torch.Tensor, EnergyOutput, float]:
        epsilon, logits = predicted_noise(self.energy_model, noisy_latents, timesteps, embedded_labels)
        return epsilon, EnergyOutput(inner_energy(noisy_latents, epsilon), logits), 0.0
