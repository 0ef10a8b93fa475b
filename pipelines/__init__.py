"""The diffusers pipeline that samples, classifies and edits."""

import latent_egc.models  # noqa: F401  (diffusers loads components of modules that are imported already, no others)

from .certification import EGCCertificationOutput, EGCClassificationOutput
from .counterfactual import EGCCounterfactualOutput
from .pipeline_egc import EGCPipeline

__all__ = ["EGCCertificationOutput", "EGCClassificationOutput", "EGCCounterfactualOutput", "EGCPipeline"]
