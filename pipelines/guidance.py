"""What guides a step: a label, scales, where they act, and a weaker model, as one potential and as its epsilon.

    U                                               the energy, at the label if the class embedding sees it
    + (s - 1) (U - U at the null label)             classifier-free guidance, `classifier_free_scale` s
    - w sigma_t log p(y | z, t)                     the classifier's gradient, `guidance_scale` w, or w(noise level)
    U_weak + s (U - U_weak)                         autoguidance, `auto_guidance_scale` s

They act where the noise level, the timestep's share of all timesteps, lies in `guidance_interval`; elsewhere a step is
unguided. `guidance_rescale` changes the length of epsilon, so that it is no potential's gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.guiders.guider_utils import rescale_noise_cfg

from latent_egc.models.potentials import Potential

# A weight, or one for each noise level in [0, 1].
GuidanceScale = float | Callable[[float], float]


def scale_at(scale: GuidanceScale, noise_level: float) -> float:
    """A scale's value at a noise level in [0, 1]."""
    return float(scale(noise_level)) if callable(scale) else scale


@dataclass(frozen=True)
class Guidance:
    """The guidance of the steps of N images; the arguments are those of `EGCPipeline.__call__`, checked there.

    Args:
        energy_model: what is guided.
        class_labels: (N,) int64, or None.
        guidance_scale: of the noise level; asked at every step, so that a callback may change what it says.
        classifier_free_scale, guidance_interval, guidance_rescale, auto_guidance_model, auto_guidance_scale: see there.
    """

    energy_model: ModelMixin
    class_labels: torch.Tensor | None
    guidance_scale: GuidanceScale
    classifier_free_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    auto_guidance_model: Any = None
    auto_guidance_scale: float = 1.0

    def potential(self, timestep: torch.Tensor) -> Potential:
        """U(z, t) at a scheduler's timestep, without the rescale.

        Its gradient costs 2 units, 4 where both the label and the null label are read; a weaker model adds its own 2
        or 4.
        """
        scales = self._scales(timestep)
        return self._with_weaker(lambda model: model.potential(self.class_labels, **scales), timestep)

    def epsilon(self, noisy_latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The potential's gradient (N, C, h, w), rescaled. The rescale adds 2 units in the interval, none outside."""
        scales = self._scales(timestep)
        epsilon = self._with_weaker(
            lambda model: model.epsilon(noisy_latents, timestep, self.class_labels, **scales), timestep
        )
        if self.guidance_rescale == 0 or not self._acts(timestep):
            return epsilon
        unguided = self.energy_model.epsilon(noisy_latents, timestep, self.class_labels, **self._unguided)
        return rescale_noise_cfg(epsilon, unguided, self.guidance_rescale)

    def _noise_level(self, timestep: torch.Tensor) -> float:
        return float(timestep / self.energy_model.config.num_train_timesteps)

    def _acts(self, timestep: torch.Tensor) -> bool:
        return self.guidance_interval[0] <= self._noise_level(timestep) <= self.guidance_interval[1]

    @property
    def _unguided(self) -> dict[str, float]:
        """Scales at which a network is the energy that sees the label, if it was to see one at all."""
        return {"guidance_scale": 0.0, "classifier_free_scale": float(self.classifier_free_scale != 0)}

    def _scales(self, timestep: torch.Tensor) -> dict[str, float]:
        if not self._acts(timestep):
            return self._unguided
        scale = scale_at(self.guidance_scale, self._noise_level(timestep))
        return {"guidance_scale": scale, "classifier_free_scale": self.classifier_free_scale}

    def _with_weaker(self, of_model: Callable[[ModelMixin], Any], timestep: torch.Tensor) -> Any:
        """What a function gives of the network, a potential or a tensor, led away from what it gives of a weaker one.

        Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024.
        """
        own = of_model(self.energy_model)
        if self.auto_guidance_model is None or not self._acts(timestep):
            return own
        weaker = of_model(network_of(self.auto_guidance_model))
        return (1 - self.auto_guidance_scale) * weaker + self.auto_guidance_scale * own


def network_of(model: Any) -> ModelMixin:
    """The energy network itself, of a pipeline or of one that is given as it is."""
    return getattr(model, "energy_model", model)


def candidate_scores(
    energy_model: ModelMixin, latents: torch.Tensor, class_labels: torch.Tensor | None, select_by: str
) -> torch.Tensor:
    """How good clean latents are, (N,): log p(y | z), log p(z) up to a constant, or their sum log p(z, y).

    One forward pass at timestep 0 and the null label, the published convention of classifying.

    Args:
        energy_model: what judges.
        latents: (N, C, h, w), clean and scaled.
        class_labels: (N,) int64 in [0, K), y; for "density" they may be None.
        select_by: "classifier", "density" or "both".
    """
    timestep = torch.tensor(0, device=latents.device)
    output = energy_model(latents, timestep)
    scores = torch.zeros_like(output.energy)
    if select_by != "classifier":
        scores = scores - output.energy / energy_model.noise_levels(timestep)[1]
    if select_by != "density":
        scores = scores + output.logits.log_softmax(dim=1).gather(1, class_labels[:, None]).squeeze(1)
    return scores
