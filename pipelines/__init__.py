"""The diffusers pipeline that samples and classifies."""

import latent_egc.models  # noqa: F401  (diffusers loads components of modules that are imported already, no others)

from .pipeline_egc import EGCClassificationOutput, EGCPipeline

__all__ = ["EGCClassificationOutput", "EGCPipeline"]
