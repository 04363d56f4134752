"""The command line of executor: parse, call, print."""

import click

from hrm.cli.program import LazyGroup, run_program
from hrm.contract.openmp import spin_briefly

_COMMANDS = {
    "run": ("executor.cli.run", "Run a file of requests under a policy."),
    "bench": ("executor.cli.bench", "Compare schedules on one policy and synthetic prompts."),
    "quantise": ("executor.cli.quantise", "Pack a checkpoint's weights into a narrower format."),
}


@click.group(cls=LazyGroup, lazily=_COMMANDS)
@click.version_option(package_name="moe-hrm", prog_name="executor")
def cli() -> None:
    """Run mixture-of-experts models whose weights do not fit the GPU, under a policy of hrm's.

    `hrm search --out policy.json` makes the policy; `hrm validate` compares a run with it.
    """


def main(args: list[str] | None = None) -> None:
    """Run a command line and exit; `run_program` says with which code."""
    spin_briefly()
    run_program(cli, "executor", args, interrupted="interrupted; what was finished is kept")
