"""Attacks on pixels in [0, 1], end to end through the autoencoder; the attacks are adversarial-robustness-toolbox's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from art.attacks.evasion import (
    AutoAttack,
    AutoProjectedGradientDescent,
    FastGradientMethod,
    ProjectedGradientDescent,
    SquareAttack,
)
from art.estimators.classification import PyTorchClassifier
from torch import nn

from latent_egc.config import ConfigError
from latent_egc.pipelines import EGCPipeline


class PixelClassifier(nn.Module):
    """Images in [0, 1] to logits: autoencoder, then the energy network on clean latents at timestep 0."""

    def __init__(self, pipeline: EGCPipeline) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.energy_model, self.vae = pipeline.energy_model, pipeline.vae  # as submodules: attacks set eval mode

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, K)."""
        return self.energy_model(self.pipeline.encode(2 * images - 1), 0).logits


class DenoisedClassifier(PixelClassifier):
    """Noise the latents, denoise them in one step, classify; probabilities are the mean over fresh draws of noise.

    An attack that differentiates this averages its gradient over the noise: expectation over transformation (Athalye et
    al., ICML 2018), which a defence by randomness must withstand.

    Args:
        pipeline: whose network denoises and classifies.
        timestep: how much noise.
        num_draws: of the noise, in each forward pass.
    """

    def __init__(self, pipeline: EGCPipeline, timestep: int, num_draws: int) -> None:
        super().__init__(pipeline)
        self.timestep, self.num_draws = timestep, num_draws

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, K), the logarithm of the mean probabilities."""
        model = self.energy_model
        latents = self.pipeline.encode(2 * images - 1).repeat_interleave(self.num_draws, dim=0)
        alpha, sigma = model.noise_levels(torch.tensor(self.timestep, device=latents.device))
        noisy = alpha * latents + sigma * torch.randn_like(latents)
        denoised = (noisy - sigma * model.epsilon(noisy, self.timestep)) / alpha
        log_probabilities = model(denoised, 0).logits.log_softmax(dim=1).unflatten(0, (-1, self.num_draws))
        return log_probabilities.logsumexp(dim=1) - np.log(self.num_draws)


@dataclass(frozen=True)
class Threat:
    """How far an attack may move an image.

    Args:
        norm: "linf" or "l2", over all pixels and channels of an image with values in [0, 1].
        eps: the largest norm of the change.
    """

    norm: Literal["linf", "l2"]
    eps: float

    def __str__(self) -> str:
        return f"linf, eps {255 * self.eps:g}/255" if self.norm == "linf" else f"l2, eps {self.eps:g}"

    @property
    def order(self) -> float:
        """The norm as numpy names it."""
        return np.inf if self.norm == "linf" else 2


class Attacker:
    """A classifier under attack: each attack maximises its cross entropy within a threat, AutoAttack also other losses.

    Args:
        network: images (N, 3, H, W) in [0, 1] to logits (N, K).
        shape: (3, H, W).
        num_classes: K.
        device: on which the network stands.

    Raises:
        ConfigError: no gradient reaches the pixels.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, int, int], num_classes: int, device: torch.device) -> None:
        self.network, self.device = network.eval(), device
        self._require_gradient(shape)
        self.classifier = PyTorchClassifier(
            network,
            loss=nn.CrossEntropyLoss(),
            input_shape=shape,
            nb_classes=num_classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )

    def _require_gradient(self, shape: tuple[int, int, int]) -> None:
        """An attack through a step without gradient changes nothing, and the defence would look perfect."""
        images = torch.rand(1, *shape, device=self.device, requires_grad=True)
        with torch.enable_grad():
            logits = self.network(images)
            gradient = None
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(logits.square().sum(), images, allow_unused=True)
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            raise ConfigError(
                "robustness: no usable gradient flows from the logits to the pixels, so that a gradient attack would "
                "prove nothing; some step before the network (rounding, a no_grad, a quantising autoencoder) is not "
                "differentiable"
            )

    def fgsm(self, images: np.ndarray, labels: np.ndarray, threat: Threat) -> np.ndarray:
        """One step along the gradient's sign, or its direction for l2 (Goodfellow et al., ICLR 2015)."""
        attack = FastGradientMethod(self.classifier, norm=threat.order, eps=threat.eps, batch_size=len(images))
        return attack.generate(images, labels)

    def pgd(
        self, images: np.ndarray, labels: np.ndarray, threat: Threat, num_steps: int, num_restarts: int
    ) -> np.ndarray:
        """Projected gradient ascent in steps of 2.5 eps / num_steps (Madry et al., ICLR 2018).

        Args:
            images, labels: (N, 3, H, W) in [0, 1] and (N,).
            threat: where to stay.
            num_steps: of each start.
            num_restarts: random starts, of which each image keeps a successful one; 0 starts at the image itself.
        """
        attack = ProjectedGradientDescent(
            self.classifier,
            norm=threat.order,
            eps=threat.eps,
            eps_step=2.5 * threat.eps / num_steps,
            max_iter=num_steps,
            num_random_init=num_restarts,
            batch_size=len(images),
            verbose=False,
        )
        return attack.generate(images, labels)

    def autoattack(
        self, images: np.ndarray, labels: np.ndarray, threat: Threat, num_steps: int, num_queries: int
    ) -> np.ndarray:
        """APGD on the cross entropy and on the logits' difference ratio, then Square, each on what still stands.

        Croce and Hein (ICML 2020), without FAB and the targeted variant, which the library does not have.
        """
        shared = {"norm": threat.order, "eps": threat.eps, "batch_size": len(images), "verbose": False}
        # The ratio compares the first and the third largest logit.
        losses = ["cross_entropy", "difference_logits_ratio"] if self.classifier.nb_classes > 2 else ["cross_entropy"]
        attacks = [
            AutoProjectedGradientDescent(
                self.classifier, eps_step=2 * threat.eps, max_iter=num_steps, nb_random_init=1, loss_type=loss, **shared
            )
            for loss in losses
        ]
        attacks.append(SquareAttack(self.classifier, max_iter=num_queries, p_init=0.8, **shared))
        attack = AutoAttack(
            self.classifier,
            norm=threat.order,
            eps=threat.eps,
            eps_step=2 * threat.eps,
            attacks=attacks,
            batch_size=len(images),
        )
        return attack.generate(images, labels)

    @torch.no_grad()
    def judge(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each image (N, 3, H, W) is classified right, and its cross entropy in nats; (N,) each."""
        logits = self.network(torch.from_numpy(images).to(self.device)).cpu()
        targets = torch.from_numpy(labels)
        losses = F.cross_entropy(logits, targets, reduction="none")
        return (logits.argmax(dim=1) == targets).numpy(), losses.numpy()


def largest_change(images: np.ndarray, attacked: np.ndarray, threat: Threat) -> float:
    """The largest norm by which any image was moved."""
    change = (attacked - images).reshape(len(images), -1)
    return float(np.linalg.norm(change, ord=threat.order, axis=1).max(initial=0.0))


def threats(linf_eps_255: Sequence[float], l2_eps: Sequence[float]) -> list[Threat]:
    """Every threat of the settings, l_inf first."""
    return [Threat("linf", eps / 255) for eps in linf_eps_255] + [Threat("l2", eps) for eps in l2_eps]
