"""`hrm search --fleet`: machines of several kinds that share a job, and what they cost."""

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from hrm.cli.compare import Compared, Front
from hrm.cli.console import console
from hrm.cli.machine_choice import MOST_MACHINES, MachineChoice
from hrm.cli.params import once_option, together
from hrm.cli.tables import TableOutput, print_frame, searching
from hrm.errors import PolicyError, ProfileError
from hrm.hardware import HardwareProfile
from hrm.policy import PAPER_SYMBOLS
from hrm.units import counted, format_number, format_seconds

if TYPE_CHECKING:
    from hrm.analysis.fleet import Fleet

MOST_OF_A_KIND: Final = 10**6
FLEET_CELLS: Final = ("tokens/s", PAPER_SYMBOLS, "limited by")  # of the plan of one machine
_KIND: Final = re.compile(r"(?:([0-9]{1,9})x)?\(([^()]+)\)|([^()]+)")
_BETWEEN: Final = re.compile(r",(?![^(]*\))")  # a comma outside brackets


@dataclass(frozen=True, slots=True)
class FleetChoice:
    """What the options say of the fleet: its kinds of machine, how many of each, and prices by kind."""

    counts: dict[str, int]
    prices: dict[str, float]

    def machines(self, choice: MachineChoice, pareto: Front | None) -> list[HardwareProfile]:
        """One machine of every kind, with the host and the changes that were given to all.

        Raises ProfileError if a kind is not known, or another option does not go with a fleet.
        """
        for option, value in (("--gpus", choice.gpus), ("--profile", choice.profile), ("--pareto", pareto)):
            if value is not None:
                raise ProfileError(option, str(value), "does not go with --fleet", "leave one of them out")
        return [_machine(kind, choice) for kind in self.counts]


def _machine(kind: str, choice: MachineChoice) -> HardwareProfile:
    try:
        return replace(choice, gpus=kind).machine()
    except ProfileError as error:
        where = "--fleet" if error.where == "--gpus" else error.where
        raise ProfileError(where, error.value, error.rule, error.remedy) from error


def _fleet_of(*, fleet: str | None, prices: str | None) -> FleetChoice | None:
    if fleet is None:
        if prices is not None:
            raise ProfileError("--prices", prices, "goes with --fleet only", "leave it out, or name a fleet")
        return None
    counts: dict[str, int] = {}
    for item in _BETWEEN.split(fleet):
        match = _KIND.fullmatch(item.strip())
        count = int(match[1] or 1) if match else 0
        if match is None or not 1 <= count <= MOST_OF_A_KIND or "," in (match[2] or ""):
            raise ProfileError(
                "--fleet",
                item,
                f"must be 1 to {MOST_OF_A_KIND:,} machines of one kind",
                "write it like 3x(4xT4),2x(1xL4): so many machines, and the GPUs of each",
            )
        kind = (match[2] or match[3]).strip()
        counts[kind] = counts.get(kind, 0) + count
    if len(counts) > MOST_MACHINES:
        rule = f"must be at most {MOST_MACHINES}"
        raise ProfileError("--fleet", f"<{len(counts):,} kinds of machine>", rule, "name fewer kinds")
    return FleetChoice(counts, {} if prices is None else _prices(prices, counts))


def _prices(text: str, kinds: dict[str, int]) -> dict[str, float]:
    """What a machine of every kind costs an hour; ProfileError unless all kinds have one price."""
    prices: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        kind = name.strip().removeprefix("(").removesuffix(")")
        try:
            price = float(value)
        except ValueError:
            price = math.nan
        if kind not in kinds or kind in prices or not 0 < price < math.inf:
            raise ProfileError(
                "--prices",
                item,
                f"must be a price above 0 for one of {', '.join(kinds)}, each once",
                "write it like 4xT4=2.40,1xL4=0.70: an hour of one machine, in any currency",
            )
        prices[kind] = price
    if missing := kinds.keys() - prices.keys():
        raise ProfileError("--prices", text, f"must have every kind, {min(missing)} too", "add what is missing")
    return prices


fleet_options = together(
    "fleet",
    _fleet_of,
    once_option(
        "--fleet",
        metavar="3x(4xT4),2x(1xL4)",
        help="Machines that share the job: so many of each kind, and in brackets what --gpus would say of one.",
    ),
    once_option(
        "--prices",
        metavar="4xT4=2.4,1xL4=0.7",
        help="What a machine of each kind of --fleet costs an hour, in any one currency.",
    ),
)


def show_fleet(choice: FleetChoice, compared: Compared, output: TableOutput) -> None:
    """Show a row for every kind of machine, and what all do together."""
    from hrm.analysis.fleet import MachineKind, plan_fleet

    if output.plot is not None:
        raise PolicyError("--plot", str(output.plot), "goes with --pareto", "leave it out: a fleet comes as a table")
    kinds = [
        MachineKind(kind, count, space, choice.prices.get(kind))
        for (kind, count), space in zip(choice.counts.items(), compared.spaces, strict=True)
    ]
    with searching(None) as on_point:
        fleet = plan_fleet(kinds, on_point=on_point)
    about = compared.about(f"on a fleet of {counted(fleet.num_machines, 'machine')}")
    output.show(
        fleet.rows,
        about,
        lambda: _print_fleet(fleet),
        num_machines=fleet.num_machines,
        tokens_per_s=fleet.tokens_per_s,
        seconds=fleet.seconds,
        price_per_hour=fleet.price_per_hour,
        tokens_per_price=fleet.tokens_per_price,
    )


def _print_fleet(fleet: "Fleet") -> None:
    ends, priced = fleet.seconds is not None, fleet.price_per_hour is not None

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            f"{row['count']} × {row['kind']}",
            f"{row['share']:.1%}",
            *([f"{row['num_requests']}"] if ends else []),
            format_number(row["tokens_per_s_of_all"]),
            *([f"{row['tokens_per_price']:,.0f}"] if priced else []),
        ]

    headings = [
        "machines",
        "share",
        *(["requests of each"] if ends else []),
        "together",
        *(["tokens for each 1 paid"] if priced else []),
    ]
    print_frame(fleet.rows, headings, cells, FLEET_CELLS)
    total = [f"{format_number(fleet.tokens_per_s)} tokens/s"]
    if fleet.seconds is not None:
        total.append(f"all answered in {format_seconds(fleet.seconds)}")
    if fleet.price_per_hour is not None and fleet.tokens_per_price is not None:
        rate = f"{fleet.tokens_per_price:,.0f} tokens for each 1 paid"
        total.append(f"at {format_number(fleet.price_per_hour)} an hour, {rate}")
    if fleet.price is not None:
        total.append(f"{format_number(fleet.price)} to pay for the job")
    console.print(f"\nthe fleet: {'; '.join(total)}")
