"""The energy networks: one base class with the mathematics, one module a backbone."""

from .energy import EnergyModel, EnergyOutput
from .transformer import EGCTransformer
from .unet import EGCUNet

__all__ = ["EGCTransformer", "EGCUNet", "EnergyModel", "EnergyOutput"]
