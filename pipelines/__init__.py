"""The diffusers pipeline that samples and classifies."""

from .pipeline_egc import EGCClassificationOutput, EGCPipeline

__all__ = ["EGCClassificationOutput", "EGCPipeline"]
