"""How much longer tasks take because of others: at the host's memory, and on cores that lanes share.

Others use both at random times, as many as they are in the time that the phase takes in the end. So that time and
what tasks take in it follow from one another: the longer the phase takes, the less its tasks are in one another's way.
"""

from collections.abc import Callable
from math import inf, sqrt
from typing import Final, NamedTuple

from hrm.tasks import Act

_NEARLY_NOTHING: Final = 1e-12  # of a phase
_SETTLED: Final = 1e-11  # of a phase, between what it takes and what its tasks were stretched for
_MOST_ROUNDS: Final = 60


class Stretch(NamedTuple):
    """What tasks take because of others: times what they would on cores of their own, and what the memory needs.

    Of the host's memory they have one part in `at_memory`; 0 leaves it out.
    """

    at_memory: float = 0.0
    on_cores: float = 1.0

    def seconds(self, act: Act, alone_s: float, at_memory_s: float) -> float:
        """A task of the act; by itself it takes `alone_s`, and the host's memory needs so long for what it accesses."""
        longer_s = self.on_cores * alone_s if act.computes else alone_s
        return max(longer_s, self.at_memory * at_memory_s)


ALONE: Final = Stretch()


class Contention(NamedTuple):
    """What a phase has of what its tasks share, in seconds.

    `contended_s` is how much more the host's memory has to do for all lanes than for the one that has most of it done,
    and `running_s` what the cores take for running tasks, whatever these do. The phase takes `least_s` whatever its
    tasks take.
    """

    contended_s: float = 0.0
    running_s: float = 0.0
    least_s: float = 0.0

    def stretch(self, phase_s: float) -> Stretch:
        """That of tasks in a phase of so long: others leave them the rest of it."""
        return Stretch(_times(phase_s, self.contended_s), _times(phase_s, self.running_s))

    def settled(self, seconds_of: Callable[[Stretch], float], first_s: float) -> tuple[Stretch, float]:
        """The stretch over the time that the phase then takes, and what `seconds_of` makes of it.

        That has to be no more for a smaller stretch. The first guess is `first_s`.
        """
        phase_s = max(first_s, self.least_s)
        stretch = self.stretch(phase_s)
        found_s = seconds_of(stretch)
        if not (self.contended_s or self.running_s):
            return stretch, found_s
        low_s, high_s, before, next_s = 0.0, inf, (stretch, found_s), max(found_s, self.least_s)
        for _ in range(_MOST_ROUNDS):
            then_s = max(found_s, self.least_s)
            if abs(then_s - phase_s) <= _SETTLED * phase_s:
                break
            low_s, high_s = (phase_s, high_s) if then_s > phase_s else (low_s, phase_s)
            if not low_s < next_s < high_s:
                next_s = (low_s + high_s) / 2 if high_s < inf else then_s
            before, phase_s = (stretch, found_s), next_s
            stretch = self.stretch(phase_s)
            found_s = seconds_of(stretch)
            next_s = self._on_a_line(before, (stretch, found_s))
        return stretch, found_s

    def _on_a_line(self, first: tuple[Stretch, float], second: tuple[Stretch, float]) -> float:
        """Where a phase takes as long as it is stretched for, if it takes longer in proportion to the stretch."""
        which = 0 if self.contended_s else 1
        (one, one_s), (other, other_s) = first, second
        shared_s = self[which]
        if one[which] == other[which]:
            return max(other_s, self.least_s)
        slope = (other_s - one_s) / (other[which] - one[which])
        # T = apart + slope * T / (T - shared).
        apart = other_s - slope * other[which]
        half = (apart + slope + shared_s) / 2
        return max(half + sqrt(max(half**2 - apart * shared_s, 0.0)), self.least_s)


UNSHARED: Final = Contention()


def _times(phase_s: float, others_s: float) -> float:
    """How much longer it takes what has only the rest of a phase."""
    return phase_s / max(phase_s - others_s, _NEARLY_NOTHING * phase_s) if phase_s > 0 else 1.0
