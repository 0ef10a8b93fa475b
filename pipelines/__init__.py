"""The diffusers pipeline that samples, classifies and edits."""

import latent_egc.models  # noqa: F401  (diffusers loads components of modules that are imported already, no others)

from .counterfactual import EGCCounterfactualOutput
from .pipeline_egc import EGCClassificationOutput, EGCPipeline

__all__ = ["EGCClassificationOutput", "EGCCounterfactualOutput", "EGCPipeline"]
