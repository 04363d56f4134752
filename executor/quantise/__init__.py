"""Packs the weights of a checkpoint into a narrower format, and says what that costs."""

from executor.quantise.plan import What
from executor.quantise.report import Loss, Report
from executor.quantise.run import QuantiseOptions, quantise

__all__ = ["Loss", "QuantiseOptions", "Report", "What", "quantise"]
