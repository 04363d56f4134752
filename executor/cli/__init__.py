"""The command line of executor: parse, call, print."""

import signal
import sys

import click

from hrm.errors import HrmError
from hrm.openmp import spin_briefly

_COMMANDS = {
    "run": ("executor.cli.run", "Run a file of requests under a policy."),
    "bench": ("executor.cli.bench", "Compare schedules on one policy and synthetic prompts."),
}


class _LazyGroup(click.Group):
    """Commands whose modules are imported when they are called, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        from importlib import import_module

        return getattr(import_module(_COMMANDS[cmd_name][0]), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moe-hrm", prog_name="executor")
def cli() -> None:
    """Run mixture-of-experts models whose weights do not fit the GPU, under a policy of hrm's.

    `hrm search --out policy.json` makes the policy; `hrm validate` compares a run with it.
    """


def main(args: list[str] | None = None) -> None:
    """Run a command line and exit.

    0; 2 after a mistake in the input; 1 if a task failed; 130 on Ctrl-C, 143 on SIGTERM and 129 on
    SIGHUP, which end a run as cleanly. A SIGHUP that is ignored, as under nohup, stays so.
    """
    spin_briefly()
    received = signal.SIGINT

    def terminate(number: int, _: object) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, terminate)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, terminate)
    try:
        cli.main(args=args, prog_name="executor", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; what was finished is kept", err=True)
        sys.exit(128 + received)
    except HrmError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        chart = getattr(error, "chart", None)
        if chart is not None:  # a task failed: no mistake of the user's
            click.echo(chart, err=True)
        sys.exit(2 if chart is None else 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
