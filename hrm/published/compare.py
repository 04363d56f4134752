"""Predicted beside measured for published runs, their errors and their order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hrm.closed_form import Point, batch_seconds
from hrm.costs import Costs
from hrm.estimate import Estimate, estimate
from hrm.formats import Formats
from hrm.hardware import HardwareProfile
from hrm.machines import load_profile
from hrm.model_spec import load_model
from hrm.published.data import TABLE_4, PublishedRun, System
from hrm.published.systems import DTYPE, IMPLEMENTATIONS, policy_of

_Item = TypeVar("_Item")
_Key = TypeVar("_Key")


def machine_name(setup: str) -> str:
    """The profile of a setup with one GPU."""
    return f"paper-{setup.lower()}"


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """A published run and what is predicted for it."""

    run: PublishedRun
    predicted: Estimate

    @property
    def error(self) -> float:
        """Predicted over measured throughput, less 1."""
        return self.predicted.tokens_per_s / self.run.tokens_per_s - 1

    @property
    def step_s(self) -> float:
        """Predicted seconds of a decode step, as a mean."""
        return self.predicted.decode.seconds / self.run.workload.decode_steps

    @property
    def memory_excess_bytes(self) -> dict[str, int]:
        """Levels where the run needs more than our formulas allow, and by how much."""
        plans = (self.predicted.memory.gpu, self.predicted.memory.cpu)
        excess = {plan.name: plan.planned_bytes - plan.capacity_bytes for plan in plans}
        return {name: size for name, size in excess.items() if size > 0}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of several comparisons: mean size, and the one furthest from 0 with its column."""

    count: int
    mean_error: float
    worst_error: float
    worst_column: str


def compare(
    runs: Iterable[PublishedRun] = TABLE_4, machines: dict[str, HardwareProfile] | None = None
) -> list[ComparedRun]:
    """Predict published runs on their machines, by setup; paper-s1 and paper-s2 by default."""
    machines = {} if machines is None else dict(machines)
    found: list[ComparedRun] = []
    for run in runs:
        if run.setup not in machines:
            machines[run.setup] = load_profile(machine_name(run.setup))
        spec = load_model(run.model)
        predicted = estimate(
            spec, policy_of(run, spec), machines[run.setup], run.workload, runtime=IMPLEMENTATIONS[run.system].runtime
        )
        found.append(ComparedRun(run, predicted))
    return found


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """What is predicted for a run without simulating it: about 1 % more, and far quicker."""

    run: PublishedRun
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        """Generation throughput."""
        tokens = self.run.batch_size * self.run.workload.gen_len
        return tokens / (self.prefill_s + self.decode_s)

    @property
    def step_s(self) -> float:
        """Seconds of a decode step, as a mean."""
        return self.decode_s / self.run.workload.decode_steps


def closed_form(run: PublishedRun, profile: HardwareProfile) -> ClosedForm:
    """Predict a published run on a machine in closed form."""
    spec, implementation = load_model(run.model), IMPLEMENTATIONS[run.system]
    policy = policy_of(run, spec)
    prefill_s, decode_s = batch_seconds(
        Costs(spec, profile, Formats.of(DTYPE), implementation.runtime),
        Point.of_policy(policy, spec),
        policy.schedule,
        run.workload,
    )
    return ClosedForm(run, prefill_s, decode_s)


def accuracy(comparisons: Sequence[ComparedRun]) -> Accuracy:
    """Mean and worst error."""
    worst = max(comparisons, key=lambda comparison: abs(comparison.error))
    total = sum(abs(comparison.error) for comparison in comparisons)
    return Accuracy(len(comparisons), total / len(comparisons), worst.error, worst.run.column)


def accuracy_by_system(comparisons: Iterable[ComparedRun]) -> dict[System, Accuracy]:
    """Mean and worst error of each system."""
    of_system = grouped(comparisons, lambda comparison: comparison.run.system)
    return {system: accuracy(its) for system, its in of_system.items()}


def by_column(comparisons: Iterable[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """Comparisons of one workload on one setup together, in the order given."""
    return grouped(comparisons, lambda comparison: comparison.run.column)


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Those of one key together, in the order given."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def order_as_published(column: Sequence[ComparedRun]) -> bool:
    """Whether the systems of a column come out in the order in which they were measured."""

    def order(tokens_per_s: list[float]) -> list[int]:
        return sorted(range(len(column)), key=lambda index: -tokens_per_s[index])

    return order([c.predicted.tokens_per_s for c in column]) == order([c.run.tokens_per_s for c in column])
