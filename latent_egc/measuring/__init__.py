"""Measuring: suites of numbers with stated settings in one report; what a training step costs."""
