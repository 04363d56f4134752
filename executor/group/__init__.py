"""The processes of one machine that run a model together, a rank each, and what they tell one another."""

from executor.group.base import Alone, Group, LostRankError, share_of

__all__ = ["Alone", "Group", "LostRankError", "share_of"]
