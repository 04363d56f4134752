"""What `hrm search` shows of many searches: several machines, or what throughput costs."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hrm.cli.console import console
from hrm.cli.machine_choice import MachineChoice
from hrm.cli.tables import TableOutput, print_frame, records, searching, seconds_or_dash
from hrm.cli.texts import given_text, machine_text
from hrm.errors import PolicyError, ProfileError
from hrm.hardware import HardwareProfile
from hrm.scaling import given_resources, resources, with_resource
from hrm.search import Space
from hrm.units import format_bytes, format_number

if TYPE_CHECKING:
    import pandas as pd

    from hrm.analysis.rows import OnPoint

COUNTS: Final = (1, 2, 4, 8, 16)  # of GPUs that --pareto gpus tries


class Front(StrEnum):
    """What is paid for throughput."""

    CPU_MEMORY = "cpu-memory"
    LATENCY = "latency"
    GPUS = "gpus"


@dataclass(frozen=True, slots=True)
class Compared:
    """What is searched on several machines, or asked of one in several ways."""

    choice: MachineChoice
    spaces: list[Space]

    def about(self, where: str) -> str:
        """One line that says what is compared."""
        first = self.spaces[0]
        given = f", {text}" if (text := given_text(first.profile)) else ""
        return f"{first.spec.name} {where}, {first.workload.name}{given}"


def show_machines(compared: Compared, output: TableOutput) -> None:
    """The best policy on every machine, the fastest first."""
    from hrm.analysis import compare_machines

    if output.plot is not None:
        raise PolicyError("--plot", str(output.plot), "goes with --pareto", "leave it out: machines come as a table")
    with searching(len(compared.spaces)) as on_point:
        frame = compare_machines(compared.spaces, on_point=on_point)

    def cells(row: dict[str, Any]) -> list[str]:
        return [row["machine"], "–" if row["reason"] else format_number(row["tokens_per_s_a_gpu"])]

    about = compared.about(f"on {len(compared.spaces)} machines")
    output.show(frame, about, lambda: print_frame(frame, ("machine", "a GPU"), cells))


def show_front(front: Front, compared: Compared, output: TableOutput) -> None:
    """What throughput costs, on one machine or (GPUs) on a family of them."""
    if len(compared.spaces) > 1:
        raise ProfileError(
            "--gpus",
            f"<{len(compared.spaces)} machines>",
            "must be one with --pareto",
            "name one: --pareto gpus changes how many GPUs it has",
        )
    space = compared.spaces[0]
    with searching(None) as on_point:
        frame, cost = _frame(front, space, compared.choice, on_point)
    on_machine = compared.about(f"on {machine_text(space.profile)}")

    def draw(path: Path) -> None:
        from hrm.plots.pareto import plot_pareto

        plot_pareto(frame[frame["reason"] == ""], path, x=cost, title=on_machine)

    about = f"{on_machine}: throughput against {front.value}"
    output.show(frame, about, lambda: _print_front(front, frame, cost), draw, cost=cost)


def _frame(front: Front, space: Space, choice: MachineChoice, on_point: "OnPoint") -> "tuple[pd.DataFrame, str]":
    """The table of a front and the column of what is paid."""
    from hrm import analysis

    match front:
        case Front.CPU_MEMORY:
            return analysis.front_of_cpu_memory(space, on_point=on_point), "cpu_memory_bytes"
        case Front.LATENCY:
            return analysis.front_of_latency(space, on_point=on_point), "latency_s"
        case Front.GPUS:
            family = [found for count in COUNTS if (found := _with_gpus(choice, space.profile, count))]
            spaces = [replace(space, profile=machine) for machine in family]
            return analysis.front_of_gpus(spaces, on_point=on_point), "num_gpus"


def _with_gpus(choice: MachineChoice, machine: HardwareProfile, count: int) -> HardwareProfile | None:
    """The machine with so many of its GPUs; None if its host does not take them.

    What was given of the machine holds for every GPU of it as before.
    """
    changed = choice.with_gpus(count)
    for resource, value in given_resources(machine).items():
        if changed is None or resource not in resources(changed):
            continue
        share = count / machine.num_gpus if resource.grows_with_gpus else 1
        changed = with_resource(changed, resource, share * value, dtype=changed.default_dtype, given=resource.value)
    return changed


def _print_front(front: Front, frame: "pd.DataFrame", cost: str) -> None:
    from hrm.plots.pareto import on_front

    best = dict(zip(frame.index, on_front(frame[cost], frame["tokens_per_s"]), strict=True))
    frame = frame.assign(on_front=[best[index] for index in frame.index])

    def cells(row: dict[str, Any]) -> list[str]:
        mark = "●" if row["on_front"] else " "
        match front:
            case Front.CPU_MEMORY:
                return [mark, format_bytes(row[cost])]
            case Front.LATENCY:
                return [mark, seconds_or_dash(row[cost]), str(row["num_requests"])]
            case Front.GPUS:
                return [mark, str(row[cost])]

    headings = {
        Front.CPU_MEMORY: ("", "host memory"),
        Front.LATENCY: ("", "all answered in", "requests"),
        Front.GPUS: ("", "GPUs"),
    }
    print_frame(frame, headings[front], cells)
    known = [row for row in records(frame) if not row["reason"]]
    if front is Front.CPU_MEMORY and known:
        most = max(row["tokens_per_s"] for row in known)
        enough = min(row[cost] for row in known if row["tokens_per_s"] >= 0.95 * most)
        console.print(f"\n{format_bytes(enough)} are enough for 95 % of the most, {format_number(most)} tokens/s")
