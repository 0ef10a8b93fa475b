"""One energy network in the latent space of an autoencoder: it classifies by its output, it samples by its gradient."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_egc.exchange.image_classification import EGCForImageClassification
    from latent_egc.methods.composition import either_of
    from latent_egc.methods.correctors import Corrector
    from latent_egc.models import EGCTransformer, EGCUNet, EnergyModel, EnergyOutput
    from latent_egc.objective import EGCLosses, EGCObjective
    from latent_egc.pipelines import EGCCertificationOutput, EGCClassificationOutput, EGCPipeline

__all__ = [
    "Corrector",
    "EGCCertificationOutput",
    "EGCClassificationOutput",
    "EGCForImageClassification",
    "EGCLosses",
    "EGCObjective",
    "EGCPipeline",
    "EGCTransformer",
    "EGCUNet",
    "EnergyModel",
    "EnergyOutput",
    "either_of",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for: the command line's help need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'latent_egc' has no attribute {name!r}")
    homes = dict.fromkeys(("EGCCertificationOutput", "EGCClassificationOutput", "EGCPipeline"), "pipelines")
    homes |= {"Corrector": "methods.correctors", "either_of": "methods.composition"}
    homes |= {"EGCForImageClassification": "exchange.image_classification"}
    homes |= {"EGCLosses": "objective", "EGCObjective": "objective"}
    return getattr(import_module(f"latent_egc.{homes.get(name, 'models')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
