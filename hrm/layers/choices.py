"""How tokens choose among routed experts: how many of these they reach, and how unevenly ranks share the choices.

Ranks that hold whole experts wait for the one that most choices fall on. Any `n` of a rank's experts are, whichever
they are, as likely to be chosen as any other rank's, so what falls on them differs from rank to rank by as much as
n·(v - c), where v is the variance of one expert and c the covariance of two; the greatest of so many ranks is taken
to lie above the mean as that of normal variables does. Where some experts are favoured, which rank has them is
taken to be by chance.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Final

from hrm.numeric import Number, maximum, minimum, power

_REACH, _STEPS = 9.0, 900  # of the integral: standard deviations, and trapezia
_MOST_TRIES: Final = 256  # with so many there is one on the busiest in any case
_NORMAL: Final = NormalDist()


@lru_cache(maxsize=64)
def greatest_of(count: int) -> tuple[float, float]:
    """Of the greatest of so many independent standard normal variables, what is expected of it and of its square."""
    width, mean, square = _REACH / _STEPS, 0.0, 0.0
    for step in range(_STEPS):
        x = (step + 0.5) * width
        above, below = 1 - _NORMAL.cdf(x) ** count, _NORMAL.cdf(-x) ** count  # that it is so far from 0
        mean += width * (above - below)
        square += width * 2 * x * (above + below)
    return mean, square


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Every token goes to `per_token` different experts; of those that it chooses from, `idle` compute nothing.

    There are `experts` others, an equal part on each of `ranks`. `frequencies` are the shares of tokens that go
    to them; without any, all are as likely to be chosen. Tokens choose independently of one another.
    """

    experts: int
    per_token: int
    idle: int = 0
    ranks: int = 1
    frequencies: tuple[float, ...] = field(default=(), repr=False)

    @property
    def probability(self) -> float:
        """That a token goes to an expert, as a mean over experts."""
        return self.per_token / (self.experts + self.idle)

    @property
    def computed_per_token(self) -> float:
        """Of the experts that a token goes to, those that compute anything, on average."""
        if not self.idle:
            return self.per_token
        return self.per_token * self.experts / (self.experts + self.idle)

    def reached(self, tokens: Number, experts: Number) -> Number:
        """How many of so many experts of a rank are expected to be chosen at all, on the rank where most are."""
        per_rank = self.experts / self.ranks
        mean = experts / per_rank * (self._hit(tokens) / self.ranks)
        if self.ranks == 1:
            return mean
        at_least_one = maximum(tokens, 1)
        share = self._hit(at_least_one) / self.experts
        most = self._on_busiest(tokens, experts, mean, self._hit_spread(at_least_one), share)
        return minimum(most, experts)

    def fallen_on(self, tokens: Number, experts: Number) -> Number:
        """How many choices are expected to fall on so many experts of a rank, on the rank where it is most."""
        per_rank = self.experts / self.ranks
        mean = experts / per_rank * (self.computed_per_token / self.ranks) * tokens
        if self.ranks == 1:
            return mean
        most = self._on_busiest(tokens, experts, mean, self._count_spread(maximum(tokens, 1)), self.probability)
        return minimum(most, tokens * minimum(experts, self.per_token))

    def _on_busiest(self, tokens: Number, experts: Number, mean: Number, spread: Number, share: Number) -> Number:
        """The expected greatest of all ranks, for v - c of an expert that counts with that probability.

        Small counts are skewed, as those of rare events are. It is no less than the probability that any of the
        ranks has one. Fewer than one token, or expert, means that in some cases there is none, and else one.
        """
        greatest, square = greatest_of(self.ranks)
        at_all = minimum(tokens, 1) * minimum(experts, 1)
        of_all = maximum(experts, 1) / (self.experts + self.idle)
        skew = maximum(1 - 2 * share, 0) * maximum(1 - 2 * of_all, 0)
        above = greatest * (maximum(experts, 1) * spread) ** 0.5 + skew * (square - 1) / 6
        missed = 1 - minimum(self.ranks * of_all, 1)
        tries = minimum(maximum(tokens, 1) * self.per_token, _MOST_TRIES)
        return maximum(mean + at_all * above, at_all * (1 - missed**tries))

    def _hit(self, tokens: Number) -> Number:
        """Expected number of different experts that so many tokens go to."""
        if not self.frequencies:
            return self.experts * (1 - power(1 - self.computed_per_token / self.experts, tokens))
        if isinstance(tokens, (int, float)):
            return sum(1 - (1 - share) ** tokens for share in self.frequencies)
        return self.experts - self._missed(tokens)[0]

    def _missed(self, tokens: Number) -> tuple[Number, Number]:
        """The sum over all experts of the probability that no token goes to them, and that of its square."""
        if isinstance(tokens, (int, float)):
            misses = [(1 - share) ** tokens for share in self.frequencies]
            return sum(misses), sum(miss * miss for miss in misses)
        import numpy as np

        distinct, of_each = np.unique(tokens, return_inverse=True)
        powers = np.power.outer(1 - np.array(self.frequencies), distinct)
        first, second = powers.sum(0), (powers * powers).sum(0)
        return first[of_each].reshape(np.shape(tokens)), second[of_each].reshape(np.shape(tokens))

    @cached_property
    def _two_missed(self) -> float:
        """The probability that a token goes to neither of two experts, all being alike."""
        there_are = self.experts + self.idle
        left = there_are - self.per_token
        return left * (left - 1) / (there_are * (there_are - 1))

    def _hit_spread(self, tokens: Number) -> Number:
        """V - c of whether an expert is reached."""
        missed = 1 - self.probability
        if not self.frequencies or missed <= 0:
            return power(missed, tokens) - power(self._two_missed, tokens)
        count, (first, second) = self.experts, self._missed(tokens)
        # Of different experts tokens miss both more seldom than if they chose each by itself.
        together = power(self._two_missed / missed**2, tokens)
        return maximum(first / count - together * (first * first - second) / (count * (count - 1)), 0)

    def _count_spread(self, tokens: Number) -> Number:
        """V - c of how many tokens go to an expert."""
        there_are = self.experts + self.idle
        of_token = self.probability * (there_are - self.per_token) / (there_are - 1)
        return tokens * of_token + tokens * (tokens - 1) * self._frequency_variance

    @cached_property
    def _frequency_variance(self) -> float:
        """The variance of the frequencies."""
        if not self.frequencies:
            return 0.0
        mean = sum(self.frequencies) / self.experts
        return sum((share - mean) ** 2 for share in self.frequencies) / (self.experts - 1)
