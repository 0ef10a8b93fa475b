"""Attacks on pixels in [0, 1], end to end through the autoencoder; the attacks are adversarial-robustness-toolbox's.

That library takes seconds to import, and the other suites do without it: it is imported by the first attacker.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from latent_egc.config import ConfigError
from latent_egc.methods.denoised_classification import denoised_log_probabilities
from latent_egc.models import energy_potential
from latent_egc.pipelines import EGCPipeline

Attack = Callable[[np.ndarray, np.ndarray], np.ndarray]  # images (N, 3, H, W) in [0, 1], labels (N,) -> attacked images


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
    """Noise the latents to `timestep`, denoise them in one step, classify.

    Probabilities are the mean over `num_draws` fresh draws of noise in each forward pass.
    """

    def __init__(self, pipeline: EGCPipeline, timestep: int, num_draws: int) -> None:
        super().__init__(pipeline)
        self.timestep, self.num_draws = timestep, num_draws

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, K), the logarithm of the mean probabilities."""
        model, latents = self.energy_model, self.pipeline.encode(2 * images - 1)
        shape = (len(latents), self.num_draws, *latents.shape[1:])
        noise = torch.randn(shape, device=latents.device, dtype=latents.dtype)
        return denoised_log_probabilities(energy_potential(model), model, latents, noise, self.timestep)


@dataclass(frozen=True)
class Threat:
    """How far an attack may move an image with values in [0, 1]."""

    norm: Literal["l_inf", "l_2"]  # over all pixels and channels
    eps: float  # the largest norm of the change

    @property
    def eps_text(self) -> str:
        """The size as the field writes it: 4/255 for l_inf, 0.5 for l_2."""
        return f"{255 * self.eps:g}/255" if self.norm == "l_inf" else f"{self.eps:g}"

    def __str__(self) -> str:
        return f"{self.norm} {self.eps_text}"

    @property
    def order(self) -> float:
        """The norm as numpy names it."""
        return np.inf if self.norm == "l_inf" else 2


class Attacker:
    """A classifier under attack: attacks maximise its cross entropy within a threat, AutoAttack also other losses.

    Args:
        network: images (N, 3, H, W) in [0, 1] to logits (N, K), on `device`.
        shape: (3, H, W).
        num_classes: K.

    Raises:
        ConfigError: no gradient reaches the pixels, or the library is not installed.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, int, int], num_classes: int, device: torch.device) -> None:
        self.network, self.device = network.eval(), device
        self._require_gradient(shape)
        try:
            from art.attacks import evasion
            from art.estimators.classification import PyTorchClassifier
        except ModuleNotFoundError as error:
            message = f"--suite robustness needs one more package ({error}): pip install 'latent-egc[eval]'"
            raise ConfigError(message) from error
        self.attacks = evasion
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

    @torch.no_grad()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """(N,) the most probable class of each image (N, 3, H, W)."""
        return self.network(torch.from_numpy(images).to(self.device)).argmax(dim=1).cpu().numpy()

    def first_success(self, images: np.ndarray, labels: np.ndarray, attacks: Sequence[Attack]) -> np.ndarray:
        """Tries attacks in turn, each only on the images that are still classified right.

        Args:
            images, labels: (N, 3, H, W) in [0, 1] and (N,).
            attacks: weaker ones first. Each starts from `images`, whatever the ones before it did.

        Returns:
            (N,): -1 for an image that is wrong without attack, else the number of the attack that succeeded, or
            len(attacks) where none did.
        """
        found = np.where(self.predict(images) == labels, len(attacks), -1)
        for number, attack in enumerate(attacks):
            standing = np.flatnonzero(found == len(attacks))
            if len(standing) > 0:
                predicted = self.predict(attack(images[standing], labels[standing]))
                found[standing[predicted != labels[standing]]] = number
        return found

    # --- the attacks: images (N, 3, H, W) in [0, 1] and labels (N,) to images of the same shape -----------------------

    def fgsm(self, images: np.ndarray, labels: np.ndarray, threat: Threat) -> np.ndarray:
        """One step along the gradient's sign, or its direction for l_2 (Goodfellow et al., ICLR 2015)."""
        shared = {"norm": threat.order, "eps": threat.eps, "batch_size": len(images)}
        return self.attacks.FastGradientMethod(self.classifier, **shared).generate(images, labels)

    def pgd(
        self, images: np.ndarray, labels: np.ndarray, threat: Threat, num_steps: int, random_start: bool = True
    ) -> np.ndarray:
        """Projected gradient ascent in steps of 2.5 eps / num_steps, from one start (Madry et al., ICLR 2018).

        Without `random_start` it starts at the image itself.
        """
        attack = self.attacks.ProjectedGradientDescent(
            self.classifier,
            norm=threat.order,
            eps=threat.eps,
            eps_step=2.5 * threat.eps / num_steps,
            max_iter=num_steps,
            num_random_init=int(random_start),
            batch_size=len(images),
            verbose=False,
        )
        return attack.generate(images, labels)

    def autoattack(
        self, images: np.ndarray, labels: np.ndarray, threat: Threat, num_steps: int, num_queries: int
    ) -> np.ndarray:
        """APGD on the cross entropy and on the logits' difference ratio, then Square, each on what still stands.

        Croce and Hein (ICML 2020), without FAB and the targeted variant of APGD, which the library does not have. A
        tenth of the steps come before the whole number, for the many images that need no more.
        """
        shared = {"norm": threat.order, "eps": threat.eps, "batch_size": len(images), "verbose": False}
        schedule = [("cross_entropy", max(1, num_steps // 10)), ("cross_entropy", num_steps)]
        if self.classifier.nb_classes > 2:  # the ratio compares the first and the third largest logit
            schedule.append(("difference_logits_ratio", num_steps))
        attacks = [
            self.attacks.AutoProjectedGradientDescent(
                self.classifier, eps_step=2 * threat.eps, max_iter=steps, nb_random_init=1, loss_type=loss, **shared
            )
            for loss, steps in schedule
        ]
        attacks.append(self.attacks.SquareAttack(self.classifier, max_iter=num_queries, p_init=0.8, **shared))
        del shared["verbose"]
        return self.attacks.AutoAttack(self.classifier, attacks=attacks, **shared).generate(images, labels)
