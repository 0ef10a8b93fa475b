"""The energy networks: one base class with the mathematics, one module a backbone."""

from .energy import EnergyModel
from .heads import EnergyOutput
from .noise_schedule import add_noise
from .potentials import (
    Potential,
    classifier_free_potential,
    classifier_potential,
    energy_potential,
    input_gradient,
)
from .transformer import EGCTransformer
from .unet import EGCUNet

__all__ = [
    "EGCTransformer",
    "EGCUNet",
    "EnergyModel",
    "EnergyOutput",
    "Potential",
    "add_noise",
    "classifier_free_potential",
    "classifier_potential",
    "energy_potential",
    "input_gradient",
]
