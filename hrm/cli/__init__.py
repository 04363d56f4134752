"""The command line of hrm: parse, call, print. Exit code 2 is a mistake in the input."""

import re
import sys
from typing import Final

import click

from hrm.errors import HrmError


class _LazyGroup(click.Group):
    """Commands whose modules are imported when they are called, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        from importlib import import_module

        module, _ = _COMMANDS[cmd_name]
        commands = import_module(module)
        # `map` is Python's, so its command has a longer name there.
        return getattr(commands, f"{cmd_name}_command", None) or getattr(commands, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


_COMMANDS = {
    "profile": ("hrm.cli.profile", "Measure this machine into a hardware profile."),
    "profiles": (
        "hrm.cli.catalog",
        "List the GPUs, hosts and machines that are known, or show one.",
    ),
    "models": ("hrm.cli.models", "List the built-in models, or show one model's sizes."),
    "search": ("hrm.cli.plan", "Find the policy with the highest throughput that fits."),
    "whatif": ("hrm.cli.analysis", "Say which upgrade pays: some more of each resource."),
    "map": ("hrm.cli.analysis", "Map which kind of policy is best over two swept resources."),
    "estimate": ("hrm.cli.plan", "Predict what one given policy will do."),
    "simulate": (
        "hrm.cli.simulate",
        "Draw what each lane does under a policy; write a Chrome trace.",
    ),
    "plot": ("hrm.cli.plot", "Draw the machine's roofline or a policy's timeline as a picture."),
    "paper": ("hrm.cli.paper", "Predict published runs and lay them beside what was measured."),
    "validate": ("hrm.cli.validate", "Lay a run's measurements beside the prediction."),
}


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moe-hrm", prog_name="hrm")
def cli() -> None:
    """Plan mixture-of-experts inference on a machine whose GPU memory is smaller than the model.

    Measure a machine (profile), find the best policy for it (search), run that policy with
    `executor run`, and check the prediction against the run (validate).
    """


_REFUSED: Final = re.compile(
    r"(?:\w+ )?'?(?P<value>[^']*?)'? (?P<rule>(?:is|does) .*?)\.?", re.DOTALL
)


def usage_mistake(error: click.UsageError) -> HrmError:
    """What click found wrong with the arguments, as `where is value: rule; remedy`."""
    command = error.ctx.command_path if error.ctx is not None else "hrm"
    remedy = f"see {command} --help"
    match error:
        case click.NoSuchOption():
            close = error.possibilities or ()
            guess = f"did you mean {close[0]}?" if close else remedy
            return HrmError(error.option_name, "<unknown>", f"is no option of {command}", guess)
        case click.MissingParameter():
            name = _parameter(error.param)
            return HrmError(name or command, "<missing>", "must be given", remedy)
        case click.BadParameter():
            said = " ".join(error.message.split())
            refused = _REFUSED.fullmatch(said)
            value, rule = refused.groups() if refused else ("<refused>", said.rstrip("."))
            return HrmError(_parameter(error.param) or command, value, rule, remedy)
        case click.BadOptionUsage():
            said = error.message.rstrip(".")
            return HrmError(error.option_name, "<incomplete>", said[:1].lower() + said[1:], remedy)
        case _:
            said = " ".join(error.format_message().split()).rstrip(".")
            return HrmError(command, "<misused>", said[:1].lower() + said[1:], remedy)


def _parameter(parameter: click.Parameter | None) -> str:
    """What the user writes for a parameter: `--gen-len`, or `RUN`."""
    if parameter is None:
        return ""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.make_metavar(click.Context(cli)).strip("[]")


def main(args: list[str] | None = None) -> None:
    """Run a command line and exit: 0, 2 after a mistake in the input, or 130 on Ctrl-C."""
    try:
        cli.main(args=args, prog_name="hrm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        click.echo(f"error: {usage_mistake(error)}", err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except HrmError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
