"""The command line of hrm: parse, call, print. Exit code 2 is a mistake in the input."""

import gc
from typing import Final

import click

from hrm.cli.program import LazyGroup, run_program

# Searches make tasks by the hundred thousand and no cycles of them: collections by Python's defaults take a twentieth.
_ALLOCATED_BEFORE_COLLECTION: Final = 50_000
_COMMANDS = {
    "profile": ("hrm.cli.profile", "Measure this machine into a hardware profile."),
    "profiles": ("hrm.cli.profiles", "List the GPUs, hosts and machines that are known, show one, or compare two."),
    "models": ("hrm.cli.models", "List the built-in models, or show one model's sizes."),
    "search": ("hrm.cli.plan", "Find the policy with the highest throughput that fits."),
    "whatif": ("hrm.cli.analysis", "Say which upgrade pays: some more of each resource."),
    "map": ("hrm.cli.analysis", "Map which kind of policy is best over two swept resources."),
    "estimate": ("hrm.cli.plan", "Predict what one given policy will do."),
    "simulate": ("hrm.cli.simulate", "Draw what each lane does under a policy; write a Chrome trace."),
    "plot": ("hrm.cli.plot", "Draw the machine's roofline or a policy's timeline as a picture."),
    "paper": ("hrm.published.command", "Predict published runs and lay them beside what was measured."),
    "validate": ("hrm.cli.validate", "Lay a run's measurements beside the prediction."),
}


@click.group(cls=LazyGroup, lazily=_COMMANDS)
@click.version_option(package_name="moe-hrm", prog_name="hrm")
def cli() -> None:
    """Plan mixture-of-experts inference on a machine whose GPU memory is smaller than the model.

    Measure a machine (profile), find the best policy for it (search), run that policy with
    `executor run`, and check the prediction against the run (validate).
    """


def main(args: list[str] | None = None) -> None:
    """Run a command line and exit; `run_program` says with which code."""
    gc.set_threshold(_ALLOCATED_BEFORE_COLLECTION, *gc.get_threshold()[1:])
    run_program(cli, "hrm", args)
