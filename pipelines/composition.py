"""Sampling what classes and networks have in common, in either of them, or not."""

from collections.abc import Callable
from typing import Any

import torch

from latent_egc.methods.composition import all_classes, any_class, either_of, no_class
from latent_egc.methods.correctors import Corrector
from latent_egc.models.potentials import Potential, energy_potential, input_gradient

from .class_names import ClassLabels, label_ids
from .energy_pipeline import EnergyPipeline
from .schedulers import check_scheduler

CLASS_TERMS = {"all_of": all_classes, "any_of": any_class, "none_of": no_class}


def epsilon_of(potential: Potential) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """From noisy latents and a timestep to the potential's gradient: one forward and one backward pass."""
    return lambda noisy_latents, timestep: input_gradient(potential, noisy_latents, timestep)[0]


class ComposingPipeline(EnergyPipeline):
    """An `EnergyPipeline` that samples AND, OR and NOT of its classes, and potentials of several networks."""

    # For who has a pipeline by the code in its folder, and no latent_egc to import them from.
    Corrector = Corrector
    either_of = staticmethod(either_of)

    def composed_potential(
        self,
        all_of: ClassLabels | None = None,
        any_of: ClassLabels | None = None,
        none_of: ClassLabels | None = None,
        guidance_scale: float | None = None,
    ) -> Potential:
        """The energy without labels, and the classifier's terms for classes; `__call__` samples its density.

        Whatever is asked for, one gradient of it is one forward and one backward pass of N rows. Of two networks on the
        same latent space, `first + second` is what both say, and `either_of(first, second, log_weight)` their mixture:

            both = digits.composed_potential(any_of=["3", "8"]) + other.composed_potential()
            images = digits(potential=both, num_images_per_label=8, corrector="mala").images

        Args:
            all_of: ids or names, one or many: the classes that an image is to be of at once, each p(y | z) a factor.
            any_of: of which it is to be one; exactly the summed joint at scale 1.
            none_of: of which it is to be none; the factor is bounded, see `latent_egc/methods/composition.py`.
            guidance_scale: the power of these factors, positive. None: the value stored with the pipeline.

        Raises:
            ValueError: naming the argument, an unknown class, a model without classes, all classes in one, a class that
                is wanted and not, or a scale that is not positive or given without classes.
        """
        named = {"all_of": all_of, "any_of": any_of, "none_of": none_of}
        ids = {
            name: label_ids(classes, self.id2label, name).tolist()
            for name, classes in named.items()
            if classes is not None
        }
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        elif not ids:
            raise ValueError(f"guidance_scale={guidance_scale} needs classes in all_of, any_of or none_of, got none")
        if not 0 < guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be finite and positive, got {guidance_scale}")
        for name in ("all_of", "any_of"):
            contradiction = set(ids.get(name, ())) & set(ids.get("none_of", ()))
            if contradiction:
                raise ValueError(f"none_of excludes classes of {name}: {[self.id2label[i] for i in contradiction]}")
        potential = energy_potential(self.energy_model)
        for name, classes in ids.items():
            if len(set(classes)) == len(self.id2label):
                raise ValueError(f"{name} must leave out a class, got all {len(self.id2label)}")
            potential = potential + CLASS_TERMS[name](self.energy_model, classes, guidance_scale)
        return potential

    def compose(
        self,
        all_of: ClassLabels | None = None,
        any_of: ClassLabels | None = None,
        none_of: ClassLabels | None = None,
        num_images: int = 1,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> Any:
        """Samples images of all, any or none of some classes.

            pipeline.compose(all_of=["3", "8"], num_images=8, corrector="mala").images

        A step costs one forward and one backward pass, a corrector what `Corrector` says on top.

        Args:
            all_of, any_of, none_of, guidance_scale: as for `composed_potential`.
            num_images: how many.
            options: `num_inference_steps`, `corrector`, `generator` and what else `__call__` takes but labels and
                scales.

        Returns:
            As `__call__`.

        Raises:
            ValueError: as `composed_potential` and `__call__`.
        """
        potential = self.composed_potential(all_of, any_of, none_of, guidance_scale)
        return self(potential=potential, num_images_per_label=num_images, **options)

    def _check_potential(
        self, potential: Potential | None, class_labels: ClassLabels | None, guidance_interval: tuple[float, float]
    ) -> None:
        """Raises ValueError for a potential that this pipeline cannot sample, or what cannot be given beside one."""
        if potential is None:
            return
        excluded = {"class_labels": class_labels is not None, "guidance_interval": tuple(guidance_interval) != (0, 1)}
        for name, given in excluded.items():
            if given:
                raise ValueError(f"potential and {name} exclude each other: what is sampled is the potential's density")
        own = self.energy_model
        for model, _ in potential.readings:
            if model.config.in_channels != own.config.in_channels:
                raise ValueError(
                    f"potential: its networks need one latent space, got {model.config.in_channels} and "
                    f"{own.config.in_channels} channels"
                )
            check_scheduler(self.scheduler, model)
