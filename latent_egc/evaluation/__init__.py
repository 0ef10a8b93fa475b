"""Measuring one pipeline: suites of metrics with stated settings, gathered in one report."""

from latent_egc.evaluation.evaluate import SUITES, evaluate
from latent_egc.evaluation.report import Report
from latent_egc.evaluation.results import Figure, Metric, SuiteResult, Table, bootstrapped
from latent_egc.evaluation.settings import EvaluationSettings, parse_settings

__all__ = [
    "SUITES",
    "EvaluationSettings",
    "Figure",
    "Metric",
    "Report",
    "SuiteResult",
    "Table",
    "bootstrapped",
    "evaluate",
    "parse_settings",
]
