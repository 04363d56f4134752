"""`executor bench`."""

from typing import TYPE_CHECKING, Any

import click

from executor.cli.options import accelerator_options
from hrm.cli.params import json_option, policy_option
from hrm.errors import PolicyError, meant
from hrm.policy import ScheduleName
from hrm.units import counted, format_seconds

if TYPE_CHECKING:
    from executor.bench import Bench, BenchRow


def _schedules(_: click.Context, option: click.Parameter, text: str | None) -> tuple[ScheduleName, ...] | None:
    """Schedules by their names between commas; PolicyError for a name of none, or for no name."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(_schedule(name, option) for name in names or [text])


def _schedule(name: str, option: click.Parameter) -> ScheduleName:
    try:
        return ScheduleName(name)
    except ValueError:
        rule = f"must be one of {', '.join(ScheduleName)}"
        raise PolicyError(option.opts[0], name, rule, meant(name, ScheduleName, "correct it")) from None


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="NAME-or-PATH",
    help="A checkpoint folder, org/name on the Hub, or a built-in name, which gets random weights.",
)
@click.option("--layers", "num_layers", type=click.IntRange(min=1), help="Only so many layers of the model.")
@policy_option
@click.option(
    "--profile",
    metavar="FILE-or-NAME",
    help="The machine to search a policy for [default: this one, measured in under a minute].",
)
@click.option(
    "--schedules",
    metavar="A,B,…",
    callback=_schedules,
    help="Schedules to compare with the first [default: "
    f"{', '.join(ScheduleName)}; the policy's alone on a machine of one level].",
)
@click.option("--prompt-len", type=click.IntRange(min=1), help="Tokens of a prompt [default: the policy's, or 64].")
@click.option(
    "--max-prompt-len",
    type=click.IntRange(min=1),
    help="The longest prompt; lengths then vary with the mean --prompt-len [default: all alike].",
)
@click.option(
    "--gen-len", type=click.IntRange(min=1), help="Tokens generated a request [default: the policy's, or 32]."
)
@click.option(
    "--requests",
    "num_requests",
    type=click.IntRange(min=1),
    help="Number of requests [default: a batch of the policy's, or one for every stage; without one 32].",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="So many of the accelerator, a process each [default: as the policy or the profile says, or 1].",
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each.")
@click.option("--seed", default=0, show_default=True, help="Of prompts and random weights.")
@accelerator_options
@json_option
def bench(*, as_json: bool, **asked: Any) -> None:
    """Run a policy on prompts of random tokens, under several schedules, and compare them.

    The first schedule's run is laid beside its prediction.
    """
    from executor.bench import Bench, BenchOptions
    from executor.cli.progress import live_progress, say
    from executor.job import JobProgress

    options = BenchOptions(**asked)
    progress = JobProgress()
    with Bench(options, say, progress.loading) as ready:

        def row(schedule: ScheduleName) -> "BenchRow":
            progress.stage = f"running {schedule.value}"
            with live_progress(progress, quiet=False):
                return ready.row(schedule)

        if as_json:
            from hrm.cli.console import print_json

            rows = [row(schedule).to_json() for schedule in ready.schedules]
            print_json({**plan_json(ready), "repeats": options.repeats, "rows": rows})
            return
        click.echo(headline(ready, options.repeats))
        shown: list[BenchRow] = []
        for schedule in ready.schedules:
            shown.append(row(schedule))
            click.echo(line_of(shown[-1]))
    from hrm.cli.validate import print_validation

    click.echo()
    print_validation(shown[0].validation)


def headline(bench: "Bench", repeats: int) -> str:
    """What is run, under which policy, and the head of the table."""
    plan, spec = bench.policy_file, bench.spec
    policy, workload = plan.policy, plan.workload
    residents = sum(policy.resident_experts) / spec.num_layers
    return (
        f"model     {spec.name}, {counted(spec.num_layers, 'layer')}, {policy.dtype}\n"
        f"machine   {plan.profile.name}\n"
        f"policy    batch of {policy.batch_size} in micro-batches of {policy.micro_batch_size},"
        f" attention {policy.attention.value}, experts {policy.ffn.value},"
        f" {residents:.3g} of {spec.num_experts} resident\n"
        f"workload  {workload.num_requests} × ({workload.prompt_len:.0f} prompt + "
        f"{workload.gen_len} new tokens), median of {counted(repeats, 'repeat')}\n\n"
        f"{'schedule':<11} {'tokens/s':>9} {'spread':>13} {'predicted':>9} {'bound':>9} "
        f"{'prefill/s':>9} {'decode/s':>9} {'step':>8} {'ratio':>5}  busy in decode"
    )


def line_of(row: "BenchRow") -> str:
    """One line of the table."""
    busy = " ".join(f"{lane} {share:.0%}" for lane, share in row.decode_busy_share.items())
    spread = f"{row.least_tokens_per_s:.1f}–{row.most_tokens_per_s:.1f}"
    return (
        f"{row.schedule:<11} {row.tokens_per_s:>9.1f} {spread:>13} "
        f"{row.predicted_tokens_per_s:>9.1f} {row.bound_tokens_per_s:>9.1f} "
        f"{row.prefill_tokens_per_s:>9.1f} {row.decode_tokens_per_s:>9.1f} "
        f"{format_seconds(row.decode_step_s.median):>8} {row.ratio:>5.2f}  {busy}"
    )


def plan_json(bench: "Bench") -> dict[str, Any]:
    """What is run and what is predicted of it at these lengths."""
    from hrm.cli.report import policy_json, predicted_json

    plan = bench.policy_file
    return {
        "model": bench.spec,
        "machine": plan.profile.name,
        "workload": plan.workload,
        "policy": policy_json(bench.predicted),
        "predicted": predicted_json(bench.predicted),
    }
