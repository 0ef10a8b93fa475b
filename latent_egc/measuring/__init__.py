"""Measuring: suites of numbers with stated settings, of a pipeline or of a denoiser's features, in one report."""

from latent_egc.measuring.denoisers import load_denoiser
from latent_egc.measuring.report import Report, draw_page
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table, bootstrapped
from latent_egc.measuring.study import EVALUATION, PROBING, EvaluationSettings, ProbeSettings, evaluate, probe

__all__ = [
    "EVALUATION",
    "PROBING",
    "EvaluationSettings",
    "Figure",
    "Metric",
    "ProbeSettings",
    "Report",
    "SuiteResult",
    "Table",
    "bootstrapped",
    "draw_page",
    "evaluate",
    "load_denoiser",
    "probe",
]
