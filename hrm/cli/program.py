"""What both command lines are built on: commands imported when called, and how a program ends.

A mistake in the input is one line and exit code 2. Ctrl-C, SIGTERM and SIGHUP end a command in good
order. A reader that has seen enough (`hrm models | head -1`) is no mistake.
"""

import os
import re
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, Final, NoReturn

import click

from hrm.cli.interrupts import Interrupts
from hrm.errors import HrmError, closest, meant, one_line

_HYPHEN: Final = "\N{NON-BREAKING HYPHEN}"  # at which no line is broken


class Interrupted(click.Abort):
    """Ctrl-C or a signal, with the line that says what is kept."""


class _ReaderGone(Exception):  # noqa: N818 - no error: somebody has seen enough
    """A pipe that is written to was closed at its other end; click would exit with 1."""


class _Help(click.HelpFormatter):
    """Help whose lines never end within a word, such as `--gen-len`."""

    def write_text(self, text: str) -> None:
        super().write_text(_unbroken(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(term, _unbroken(said)) for term, said in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-")


def _unbroken(text: str) -> str:
    return text.replace("-", _HYPHEN)


class _Context(click.Context):
    """A command called with its options, which have the names of the fields that they give."""

    formatter_class = _Help

    def invoke(self, callback: Any, /, *args: Any, **given: Any) -> Any:
        """What the command returns; HrmError naming what was typed for a mistake in a field that an option gives."""
        try:
            return super().invoke(callback, *args, **given)
        except HrmError as error:
            options = (each for each in self.command.params if isinstance(each, click.Option))
            told = error.of_options({each.name: parameter_name(each) for each in options if each.name})
            if told is error:
                raise
            raise told from error


def _check_once(command: click.Command, parent: click.Context, args: list[str]) -> None:
    """Raise HrmError for an option with two values, of which click would take the last."""
    with suppress(click.UsageError):  # which is told when the command is called
        parser = command.make_parser(click.Context(command, parent=parent, resilient_parsing=True))
        _, _, given = parser.parse_args(list(args))
        for option in given:
            alone = isinstance(option, click.Option) and not (option.multiple or option.is_flag)
            if alone and given.count(option) > 1:
                raise HrmError(parameter_name(option), "<given twice>", "may be given once only", "leave one out")


class CommandGroup(click.Group):
    """Commands that tell a mistake with the command it was made in and the word that was perhaps meant."""

    context_class = _Context

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is called; HrmError if there is none of that name."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            remedy = meant(name, self.list_commands(ctx), f"see {ctx.command_path} --help")
            rule = f"must be one of {', '.join(self.list_commands(ctx))}"
            raise HrmError(f"COMMAND of {ctx.command_path}", name, rule, remedy)
        found, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            command.context_class = _Context
            _check_once(command, ctx, rest)
        return found, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """What the command returns."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if error.ctx is None:  # click does not say whose option lacks a value
                error.ctx = click.Context(self, parent=ctx, info_name=ctx.invoked_subcommand)
            raise


class LazyGroup(CommandGroup):
    """Commands whose modules are imported when they are called, so that --help stays quick.

    `lazily` maps each to its module and the line that --help has for it.
    """

    def __init__(self, *args: Any, lazily: Mapping[str, tuple[str, str]], **options: Any) -> None:
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        super().__init__(*args, context_settings=settings, **options)
        self._lazily = lazily

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in the order of --help."""
        return list(self._lazily)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None if there is none."""
        if cmd_name not in self._lazily:
            return None
        module, _ = self._lazily[cmd_name]
        commands = import_module(module)
        # `map` is Python's, so its command has a longer name there.
        return getattr(commands, f"{cmd_name}_command", None) or getattr(commands, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what --help says of the commands, none of which is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazily.items()])

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """What click makes of the arguments; --help prints here already."""
        with _telling_of_readers():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """What the command returns, when all that it prints is out."""
        with _telling_of_readers():
            result = super().invoke(ctx)
            sys.stdout.flush()  # else the rest would fail at exit, where no error can be told
            return result


@contextmanager
def _telling_of_readers() -> Generator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _ReaderGone from error
    except SystemExit as error:  # rich makes this of a broken pipe
        if isinstance(error.__context__, BrokenPipeError):
            raise _ReaderGone from error
        raise


def run_program(cli: click.Command, name: str, args: list[str] | None, *, interrupted: str = "interrupted") -> None:
    """Run a command line and exit if anything but success is to be told.

    2 after a mistake in the input or where a file or the output cannot be written, 1 if a task
    failed, 130 on Ctrl-C, 143 on SIGTERM and 129 on SIGHUP, all of which end a command as cleanly.
    `interrupted` is what is said then.
    """
    _open_standard_streams()
    interrupts = Interrupts(interrupted)
    try:
        with interrupts.raised():
            cli.main(args=args, prog_name=name, standalone_mode=False)
    except (click.Abort, KeyboardInterrupt) as error:
        _end(128 + interrupts.received, str(error) or interrupted)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        _end(2, f"error: {usage_mistake(error, name)}")
    except click.ClickException as error:
        _end(error.exit_code, f"error: {one_line(error.format_message())}")
    except HrmError as error:
        chart = getattr(error, "chart", None)  # of a task that failed: no mistake of the user's
        _end(2 if chart is None else 1, f"error: {error}", chart)
    except _ReaderGone:
        _forget_output()
        sys.exit(0)
    except OSError as error:
        where = "the output" if error.filename is None else str(error.filename)
        _forget_output()
        _end(2, f"error: {where} is <{error.strerror}>: must be usable; make room or check the path")


def _end(code: int, text: str, chart: str | None = None) -> NoReturn:
    """Exit after a line on standard error, if that still has a reader."""
    with suppress(OSError):
        click.echo(" ".join(text.split()), err=True)
        if chart:
            click.echo(chart, err=True)
    sys.exit(code)


def _open_standard_streams() -> None:
    """Connect standard streams that were closed to /dev/null, or files opened later take their place.

    `hrm models >&-` then prints to nowhere instead of into whatever is opened first.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _forget_output() -> None:
    """Discard what is still to be printed, so that Python does not fail on it at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


_EXTRA: Final = re.compile(r"Got unexpected extra arguments? \((?P<value>\S+?)[ )]")
_REFUSED: Final = re.compile(r"(?:\w+ )?'?(?P<value>[^']*?)'? (?P<rule>(?:is|does) .*?)\.?", re.DOTALL)


def usage_mistake(error: click.UsageError, program: str) -> HrmError:
    """What click found wrong with the arguments, as `where is value: rule; remedy`."""
    command = error.ctx.command_path if error.ctx is not None else program
    remedy = f"see {command} --help"
    match error:
        case click.NoSuchOption():
            # Without their dashes, by which all options are alike.
            words = {option.strip("-"): option for option in error.possibilities or ()}
            close = closest(error.option_name.strip("-"), words)
            guess = f"did you mean {words[close]}?" if close else remedy
            return HrmError(error.option_name, "<unknown>", f"must be an option of {command}", guess)
        case click.MissingParameter():
            name = parameter_name(error.param)
            return HrmError(name or command, "<missing>", "must be given", remedy)
        case click.BadParameter():
            return _bad_value(error, command, remedy)
        case click.BadOptionUsage() if "does not take" in error.message:
            return HrmError(error.option_name, "<given a value>", "must stand alone", remedy)
        case click.BadOptionUsage():
            return HrmError(error.option_name, "<incomplete>", "must have a value", remedy)
        case _ if extra := _EXTRA.match(error.message):
            return HrmError(f"{command}: argument", extra["value"], "must not be there", f"leave it out, or {remedy}")
        case _:
            said = " ".join(error.format_message().split()).rstrip(".")
            return HrmError(command, "<misused>", said[:1].lower() + said[1:], remedy)


def _bad_value(error: click.BadParameter, command: str, remedy: str) -> HrmError:
    """A value that its option does not take, and what it does take."""
    said = " ".join(error.message.split())
    refused = _REFUSED.fullmatch(said)
    value, rule = refused.groups() if refused else ("<refused>", said.rstrip("."))
    match error.param.type if error.param is not None else None:
        case click.Choice() as kind:
            choices = [str(choice) for choice in kind.choices]
            rule, remedy = f"must be one of {', '.join(choices)}", meant(value, choices, remedy)
        case click.IntRange(min=least, max=most):
            ends = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
            rule = f"must be a whole number of {' and '.join(ends)}"
        case click.types.IntParamType():
            rule = "must be a whole number"
        case click.types.FloatParamType():
            rule = "must be a number"
        case click.Path(file_okay=False) if rule == "is a file":
            rule, remedy = "must be a folder, not a file", "name a folder"
        case click.Path(dir_okay=False) if rule == "is a directory":
            rule, remedy = "must be a file, not a folder", "name a file"
        case _:
            pass
    return HrmError(parameter_name(error.param) or command, value, rule, remedy)


def parameter_name(parameter: click.Parameter | None) -> str:
    """What the user writes for a parameter: `--gen-len`, or `RUN`."""
    if parameter is None:
        return ""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.make_metavar(click.Context(click.Command(None))).strip("[]")
