"""The energy networks: one base class with the mathematics, one module a backbone."""

from .energy import EnergyModel
from .heads import EnergyOutput
from .potentials import Potential, energy_potential, input_gradient
from .transformer import EGCTransformer
from .unet import EGCUNet

__all__ = [
    "EGCTransformer",
    "EGCUNet",
    "EnergyModel",
    "EnergyOutput",
    "Potential",
    "energy_potential",
    "input_gradient",
]
