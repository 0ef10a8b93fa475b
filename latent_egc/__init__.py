"""One energy network in the latent space of an autoencoder: it classifies by its output, it samples by its gradient."""

from latent_egc.models import EGCTransformer, EGCUNet, EnergyModel, EnergyOutput
from latent_egc.objective import EGCLosses, EGCObjective
from latent_egc.pipelines import EGCClassificationOutput, EGCPipeline

__all__ = [
    "EGCClassificationOutput",
    "EGCLosses",
    "EGCObjective",
    "EGCPipeline",
    "EGCTransformer",
    "EGCUNet",
    "EnergyModel",
    "EnergyOutput",
]
__version__ = "0.1.0"
