"""Measuring one pipeline: suites of metrics with stated settings, gathered in one report."""

from latent_egc.measuring.report import Report
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table, bootstrapped
from latent_egc.measuring.settings import EvaluationSettings, parse_settings
from latent_egc.measuring.study import SUITES, evaluate

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
