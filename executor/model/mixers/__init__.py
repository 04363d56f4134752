"""The maths of mixers, in which tokens see one another: one file for each kind of block."""

from executor.model.mixers.base import Mixer
from executor.model.mixers.gated_delta import GatedDelta
from executor.model.mixers.grouped_query import GroupedQuery, Temperature
from executor.model.mixers.latent import Latent

__all__ = ["GatedDelta", "GroupedQuery", "Latent", "Mixer", "Temperature"]
