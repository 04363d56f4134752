"""Packs the weights of a checkpoint into a narrower format, and says what that costs."""

from executor.quantise.perplexity import perplexity, texts_of
from executor.quantise.report import Loss, Perplexity, Report
from executor.quantise.run import QuantiseOptions, quantise
from hrm.model_spec import What

__all__ = ["Loss", "Perplexity", "QuantiseOptions", "Report", "What", "perplexity", "quantise", "texts_of"]
