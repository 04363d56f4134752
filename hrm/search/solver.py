"""What a solver of the policy search is: a class in a file of its own, and a row in `SOLVERS`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, ClassVar, Final

from hrm.errors import PolicyError
from hrm.estimate import Estimate
from hrm.policy import Policy
from hrm.search.space import Space


def _no_more() -> Iterator[Estimate]:
    yield from ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found in a space.

    `ranked` are policies that were simulated and meet the limits, the chosen one first; `more`
    simulates others, one at a time, for whoever wants to see them. `greatest_tokens_per_s` is the
    greatest closed-form throughput that is known. `evaluations` policies were looked at, and
    `simulated` of them simulated, if only in part: those that this showed to be `slower` are not among the ranked.
    `overshoot` are factors by which policies that were simulated and left out missed the limits on
    waiting times.
    """

    ranked: tuple[Estimate, ...] = ()
    more: Callable[[], Iterator[Estimate]] = _no_more
    greatest_tokens_per_s: float = 0.0
    evaluations: int = 0
    simulated: int = 0
    slower: tuple[Policy, ...] = ()
    overshoot: tuple[float, float] = (1.0, 1.0)
    interrupted: bool = False

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the chosen policy; 0 if there is none."""
        return self.ranked[0].tokens_per_s if self.ranked else 0.0

    @staticmethod
    def best_of(parts: Iterable["Found"]) -> "Found":
        """The one with the highest throughput, with the work that all of them took."""
        parts = list(parts) or [Found()]
        return replace(
            max(parts, key=lambda part: part.tokens_per_s),
            greatest_tokens_per_s=max(part.greatest_tokens_per_s for part in parts),
            evaluations=sum(part.evaluations for part in parts),
            simulated=sum(part.simulated for part in parts),
            interrupted=any(part.interrupted for part in parts),
        )


class Solver(ABC):
    """How a space is searched; fields of a subclass are the options that it takes.

    `evaluates` says in words what its `evaluations` count. A solver need not polish what it finds,
    nor bound it or say what to change where nothing fits: `hrm.search.search` does so for all.
    """

    name: ClassVar[str]
    evaluates: ClassVar[str]

    @abstractmethod
    def find(self, space: Space) -> Found:
        """The best policies of the space that this solver finds."""


SOLVERS: Final[dict[str, str]] = {
    "exhaustive": "hrm.search.exhaustive:Exhaustive",
    "milp": "hrm.search.milp:Milp",
    "optuna": "hrm.search.bayesian:Optuna",
}


def solver_named(name: str, **options: Any) -> Solver:
    """The solver of that name, with its options.

    Raises PolicyError if there is none, or if an option is another solver's.
    """
    if name not in SOLVERS:
        raise PolicyError("--solver", name, f"must be one of {', '.join(SOLVERS)}", "choose one of them")
    solver = _solver_class(name)
    for option, value in options.items():
        takers = [other for other in SOLVERS if option in _options_of(_solver_class(other))]
        if name not in takers:
            flag = f"--{option.replace('_', '-')}"
            rule = f"goes with --solver {' or '.join(takers)} only" if takers else "is no option of any solver"
            raise PolicyError(flag, value, rule, "leave it out or add that" if takers else "leave it out")
    return solver(**options)


def _solver_class(name: str) -> type[Solver]:
    module, _, attribute = SOLVERS[name].partition(":")
    return getattr(import_module(module), attribute)


def _options_of(solver: type[Any]) -> set[str]:
    return {field.name for field in fields(solver)}
