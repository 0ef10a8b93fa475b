"""The energy networks: one base class with the mathematics, one module a backbone."""

from .energy import EnergyModel, EnergyOutput
from .unet import EGCUNet

__all__ = ["EGCUNet", "EnergyModel", "EnergyOutput"]
