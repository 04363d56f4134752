"""The entrance to the search: one function for every solver and any number of GPUs."""

from enum import StrEnum
from functools import partial
from typing import Any

from hrm.errors import PolicyError
from hrm.hardware import HardwareProfile
from hrm.latency import NO_LIMITS, LatencyLimits
from hrm.model_spec import ModelSpec
from hrm.policy import ScheduleName
from hrm.search import exhaustive
from hrm.search.result import SearchResult
from hrm.search.space import Space
from hrm.search.ways import search_ways
from hrm.tasks import Device
from hrm.workload import Workload


class Solver(StrEnum):
    """How the space is searched."""

    EXHAUSTIVE = "exhaustive"
    MILP = "milp"
    OPTUNA = "optuna"


def solve(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    *,
    solver: Solver = Solver.EXHAUSTIVE,
    dtype: str = "bfloat16",
    schedule: ScheduleName = ScheduleName.CGOPIPE,
    staging: bool = False,
    attention: Device | None = None,
    ffn: Device | None = None,
    limits: LatencyLimits = NO_LIMITS,
    **options: Any,
) -> SearchResult:
    """The policy with the highest job throughput that fits, by any solver.

    `options` are the solver's own: `trials`, `storage`, `seed` and `progress` of OPTUNA. With
    several GPUs, tensor parallelism and a pipeline are searched one after the other. Only
    EXHAUSTIVE honours `limits` on waiting times; PolicyError for the others.
    """
    check_knows_limits(solver, limits)
    space = Space(
        spec=spec,
        profile=profile,
        workload=workload,
        dtype=dtype,
        schedule=schedule,
        staging=staging,
        attention=attention,
        ffn=ffn,
        limits=limits,
    )
    search_space: Any
    match solver:
        case Solver.EXHAUSTIVE:
            search_space = exhaustive.search_space
        case Solver.MILP:
            from hrm.search import milp

            search_space = milp.search_space
        case Solver.OPTUNA:
            from hrm.search import bayesian

            search_space = bayesian.search_space
    return search_ways(space, partial(search_space, **options))


def check_knows_limits(solver: Solver, limits: LatencyLimits) -> None:
    """Raise PolicyError if there are limits on waiting times and the solver does not know them."""
    if limits != NO_LIMITS and solver is not Solver.EXHAUSTIVE:
        flag = "--max-tpot" if limits.max_ttft_s is None else "--max-ttft"
        raise PolicyError(
            f"{flag} with --solver",
            solver.value,
            "knows no limits on waiting times",
            "leave out --solver: the exhaustive one does",
        )
