"""`hrm search` and `hrm estimate`: find a policy, or predict a given one."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import click

from hrm.cli.compare import Compared, Front, show_front, show_machines
from hrm.cli.console import console, print_json
from hrm.cli.fleet import FleetChoice, fleet_options, show_fleet
from hrm.cli.given_policy import GivenPolicy, given_policy_options
from hrm.cli.machine_choice import MachineChoice, machine_options, machines_options
from hrm.cli.options import ChosenModel, limits_options, model_options, workload_options
from hrm.cli.params import (
    OUT_FILE,
    enum_option,
    expert_division_option,
    experts_per_part_option,
    json_option,
    schedule_option,
    staging_option,
    together,
)
from hrm.cli.report import plan_json, print_plan
from hrm.cli.tables import TableOutput, table_output_options
from hrm.cli.texts import run_text
from hrm.errors import PolicyError
from hrm.estimate import Estimate
from hrm.estimate import estimate as predict
from hrm.hardware import HardwareProfile
from hrm.latency import LatencyLimits
from hrm.layers import ExpertDivision
from hrm.parallel import used_of
from hrm.policy import Parallelism, ScheduleName
from hrm.policy_file import policy_file_of, save_policy_file
from hrm.search import SOLVERS, SearchResult, Solver, solver_named
from hrm.search import search as best_policy
from hrm.tasks import Device
from hrm.units import format_number
from hrm.workload import Workload

DEFAULT_SOLVER: Final = "exhaustive"
_out = click.option("--out", type=OUT_FILE, help="Write the policy file here.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the options ask of every policy that is searched."""

    schedule: ScheduleName
    staging: bool
    attention: Device | None
    ffn: Device | None
    prefill_ffn: Device | None
    experts_per_part: int
    parallelism: Parallelism | None
    expert_division: ExpertDivision | None


def _solver(*, solver: str, trials: int | None, storage: str | None, seed: int | None) -> Solver:
    """The solver that is asked for, with what is given of its own options."""
    given = {"trials": trials, "storage": storage, "seed": seed}
    return solver_named(solver, **{name: value for name, value in given.items() if value is not None})


@click.command()
@machines_options
@fleet_options
@model_options
@workload_options
@limits_options
@together(
    "wanted",
    Wanted,
    schedule_option,
    staging_option,
    enum_option("--attention", kind=Device, help="Only policies with attention there."),
    enum_option("--ffn", kind=Device, help="Only policies with the experts there."),
    enum_option("--prefill-ffn", kind=Device, help="Only policies with the experts there in prefill."),
    experts_per_part_option,
    enum_option("--parallelism", kind=Parallelism, help="Only policies that share several GPUs like that."),
    expert_division_option(
        help="Only policies of tensor parallelism that divide each expert by its inner size, or give each GPU whole "
        "ones  [default: whichever is faster]."
    ),
)
@together(
    "solver",
    _solver,
    click.option(
        "--solver",
        type=click.Choice(list(SOLVERS)),
        default=DEFAULT_SOLVER,
        show_default=True,
        help="exhaustive; milp solves mixed-integer programs; optuna tries the simulation.",
    ),
    click.option("--trials", type=click.IntRange(1), help="Of optuna [default: 200]."),
    click.option(
        "--storage",
        metavar="FILE-or-URL",
        help="Keep optuna's trials here, to go on later and share them: a file, or sqlite:///FILE.",
    ),
    click.option("--seed", type=int, help="Of optuna [default: 0]."),
)
@enum_option(
    "--pareto", kind=Front, help="What throughput costs in host memory, in time to the last answer, or in GPUs."
)
@table_output_options
@_out
def search(
    model: ChosenModel,
    choice: MachineChoice,
    fleet: FleetChoice | None,
    workload: Workload,
    limits: LatencyLimits,
    wanted: Wanted,
    solver: Solver,
    pareto: Front | None,
    output: TableOutput,
    out: Path | None,
) -> None:
    """Find the policy with the highest job throughput that fits every memory level.

    Of policies that are as fast to a thousandth, it is the one with the smallest batch.
    With several machines (--gpus 1xT4,4xT4,1xL4) they are compared in one table, and with --fleet
    they share the job, each kind in proportion to its throughput, so that all end together.
    """
    spaces = [
        model.space(profile, workload, limits=limits, **asdict(wanted))
        for profile in (choice.machines() if fleet is None else fleet.machines(choice, pareto))
    ]
    if pareto is not None or fleet is not None or len(spaces) > 1:
        several = "--fleet" if fleet is not None else "--pareto" if pareto is not None else "several machines"
        for flag, given in (("--solver", solver.name if solver.name != DEFAULT_SOLVER else None), ("--out", out)):
            if given is not None:
                rule = f"is for one search, and does not go with {several}"
                raise PolicyError(flag, str(given), rule, "leave it out, or ask for one search")
        compared = Compared(choice, spaces)
        if pareto is not None:
            show_front(pareto, compared, output)
        elif fleet is not None:
            show_fleet(fleet, compared, output)
        else:
            show_machines(compared, output)
        return
    if output.csv is not None or output.plot is not None:
        raise PolicyError(
            "--csv" if output.csv else "--plot",
            str(output.csv or output.plot),
            "goes with --pareto, and --csv with several machines",
            "leave it out; hrm plot draws",
        )
    (space,) = spaces
    with _trials_bar(solver) as shown:
        result = best_policy(space, shown)
    _show(result.require(), model, space.profile, workload, result, as_json=output.as_json, out=out)


@contextmanager
def _trials_bar(solver: Solver) -> Generator[Solver]:
    """The solver with a progress bar on standard error, from the first on, if it tries one policy after the other."""
    if solver.name != "optuna":
        yield solver
        return
    from rich.console import Console
    from rich.progress import Progress

    from hrm.search.bayesian import Optuna

    assert isinstance(solver, Optuna)
    bar = Progress(console=Console(stderr=True), transient=True)
    shown = bar.add_task("trials", total=solver.trials)

    def advance(number: int, best: float) -> None:
        bar.start()
        bar.update(shown, completed=number, description=f"best {format_number(best)} tokens/s")

    try:
        yield replace(solver, progress=advance)
    finally:
        if bar.live.is_started:
            bar.stop()


@click.command()
@machine_options
@model_options
@workload_options
@limits_options
@given_policy_options
@json_option
@_out
def estimate(
    model: ChosenModel,
    profile: HardwareProfile,
    workload: Workload,
    limits: LatencyLimits,
    given: GivenPolicy,
    as_json: bool,
    out: Path | None,
) -> None:
    """Predict what one given policy will do.

    A policy that does not fit, or that misses a limit on waiting times, is refused with what would
    be enough.
    """
    policy = given.fitting(model.spec, profile, workload, model.formats_on(profile))
    predicted = predict(model.spec, policy, profile, workload)
    limits.check(predicted.latency)
    _show(predicted, model, profile, workload, None, as_json=as_json, out=out)


def _show(
    predicted: Estimate,
    model: ChosenModel,
    profile: HardwareProfile,
    workload: Workload,
    result: SearchResult | None,
    *,
    as_json: bool,
    out: Path | None,
) -> None:
    """Show a plan, and write its file if one is asked for."""
    if out is not None:
        save_policy_file(out, policy_file_of(predicted, model.spec, profile, workload))
    if as_json:
        print_json(plan_json(predicted, model.spec, profile, workload, result))
        return
    print_plan(predicted, model.spec, profile, workload, result)
    way = predicted.policy.parallelism
    used = used_of(profile, predicted.policy)
    told = run_text(model.argument, out, spec=model.spec, stored=model.stored, profile=used, parallelism=way)
    console.print(f"\n{told}")
