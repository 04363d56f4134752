"""How options are declared: what kinds of values they take, and how several make one argument."""

import os
from collections.abc import Callable
from enum import StrEnum
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any, Final

import click

from hrm.errors import HrmError, ProfileError
from hrm.files import check_writable
from hrm.layers import ExpertDivision
from hrm.policy import ScheduleName
from hrm.tasks import Phase

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class _OutFile(click.Path):
    """A path to write to; HrmError if it cannot be written, before any work is done for it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if str(path) == "-":
            raise HrmError(param.opts[0] if param else "path", "-", "must be a file", "name one, or /dev/stdout")
        check_writable(path, remedy=f"choose another {param.opts[0] if param else 'path'}")
        return path


OUT_FILE: Final = _OutFile(path_type=Path, dir_okay=False)


class _Member(click.Choice[str]):
    """A member of an enum by its value, which may be one that was added to those that are listed."""

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__([each.value for each in kind])
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> StrEnum:
        try:
            return self.kind(value)
        except ValueError:
            return self.kind(super().convert(value, param, ctx))  # which says what there is


def enum_option(*names: str, kind: type[StrEnum], **options: Any) -> Decorator:
    """An option that takes the values of an enum and gives its members."""
    return click.option(*names, type=_Member(kind), **options)


def _once(_: click.Context, option: click.Parameter, given: tuple[str, ...]) -> str | None:
    """The one value of an option; ProfileError for two, of which click would take the last."""
    if len(given) > 1:
        raise ProfileError(
            option.opts[0], f"<{' and '.join(given)}>", "may be given once only", "leave one of them out"
        )
    return given[0] if given else None


once_option = partial(click.option, multiple=True, callback=_once)


def all_of(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order that --help lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def together(name: str, make: Callable[..., object], *options: Decorator) -> Decorator:
    """Hand a command one argument, `name`: what `make` returns for the values of several options.

    The arguments of `make` are named as the options are.
    """
    taken = tuple(signature(make).parameters)

    def decorate(command: Command) -> Command:
        @all_of(*options)
        @wraps(command)
        def wrapper(*args: Any, **given: Any) -> Any:
            made = make(**{key: given.pop(key) for key in taken})
            return command(*args, **{name: made}, **given)

        return wrapper

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
schedule_option = enum_option(
    "--schedule",
    kind=ScheduleName,
    default=ScheduleName.CGOPIPE.value,
    show_default=True,
    help="The order in which tasks are issued.",
)
phase_option = enum_option("--phase", kind=Phase, default=Phase.DECODE.value, show_default=True, help="What is drawn.")
staging_option = click.option(
    "--staging", is_flag=True, help="Host weights are in pageable memory, staged through pinned."
)
experts_per_part_option = click.option(
    "--experts-per-part",
    type=click.IntRange(min=0),
    default=0,
    help="Experts that stream to the GPU at a time, twice as many of which have room there  [default: a layer's].",
)
expert_division_option = partial(enum_option, "--expert-division", kind=ExpertDivision)
policy_option = click.option(
    "--policy",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A policy file (hrm search --out); without one, a policy is searched for.",
)
