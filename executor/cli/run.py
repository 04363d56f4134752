"""`executor run`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from executor.cli.options import accelerator_options
from hrm.cli.params import enum_option, together
from hrm.policy import ScheduleName
from hrm.tasks import Phase
from hrm.units import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from executor.job import JobOptions, JobProgress
    from executor.ray.options import FleetOptions
    from hrm.run_record import RunRecord

_folder = click.Path(path_type=Path, file_okay=False)


def _fleet(*, ray_address: str | None, workers: int | None, own_plans: bool) -> "FleetOptions | None":
    """The fleet that the options ask for, if they do; RunError for those that go with one only."""
    from executor.errors import RunError

    if ray_address is not None:
        from executor.ray.options import FleetOptions

        return FleetOptions(address=ray_address, workers=workers, own_plans=own_plans)
    if workers is not None:
        raise RunError("--workers", workers, "goes with --ray only", "leave it out, or add --ray")
    if own_plans:
        raise RunError("--own-plans", True, "goes with --ray only", "leave it out, or use hrm profile and hrm search")
    return None


fleet_options = together(
    "fleet",
    _fleet,
    click.option(
        "--ray",
        "ray_address",
        is_flag=False,
        flag_value="local",
        metavar="[ADDRESS]",
        help="Share the requests out over the workers of a Ray cluster [without an address: over workers here].",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1, max=10_000),
        help="Of --ray [default: 2 here, or one on every node of a cluster].",
    ),
    click.option(
        "--own-plans",
        is_flag=True,
        help="With --ray, have every node measure itself, in a minute, once, and solve the policy's workload for "
        "itself.",
    ),
)


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="FOLDER-or-HUB-ID",
    help="A checkpoint folder (safetensors), or org/name[@revision] on the Hugging Face Hub.",
)
@click.option("--revision", metavar="REV", help="The branch, tag or commit on the Hub [default: main].")
@click.option(
    "--policy",
    "policies",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A policy file (hrm search --out). With --ray it may be repeated, or be a folder of them.",
)
@click.option(
    "--input",
    "input_",
    required=True,
    metavar="FILE-or-URL",
    help="Requests: OpenAI batch lines (JSONL), or rows with the same fields (parquet).",
)
@click.option("--output-dir", required=True, type=_folder, help="Where outputs.jsonl, run.json and trace.json go.")
@accelerator_options
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="GPUs of this machine, a process each [default: as many as the policy was solved for].",
)
@enum_option("--schedule", kind=ScheduleName, help="Run the policy in this order [default: the policy's].")
@click.option("--seed", default=0, show_default=True, help="For requests without one.")
@click.option(
    "--sampling-defaults",
    type=click.Choice(["model", "openai"]),
    default="model",
    show_default=True,
    help="What requests that do not say are sampled with: the model's generation_config.json, or temperature 1.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    help="Stop after so many requests; those of earlier runs do not count.",
)
@click.option("--resume", is_flag=True, help="Go on with a directory that holds outputs.")
@fleet_options
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def run(
    *,
    model: str,
    revision: str | None,
    policies: Sequence[Path],
    input_: str,
    output_dir: Path,
    gpus: int | None,
    fleet: "FleetOptions | None",
    quiet: bool,
    **asked: Any,
) -> None:
    """Run a file of requests under a policy.

    Each request is appended to OUTPUT_DIR/outputs.jsonl as it ends; one that cannot be run, or goes
    wrong, gets a line with its error and the others run. run.json says what was done and how fast;
    trace.json opens in Perfetto. --resume goes on where a run was cut short, with what is not answered yet or has an
    error: model, dtype, --seed and the requests answered must be the same as then.

    Parquet (extra parquet) has a row for each request, with the columns of a batch line or those of its body beside a
    custom_id. An input may be a URL of s3, gs, abfs or hdfs, read with the credentials of your environment.

    What of temperature, top_p, top_k and min_p a request does not give is as in the model's
    generation_config.json, if it has any. A chat without max_tokens gets as many tokens as its share of the
    policy's cache leaves beside the prompt, but no fewer than the --gen-len of the policy; a completion gets 16.

    A policy for several GPUs is run by a process for each, on its share of the cores, which are started here, or by
    torchrun --no-python --nproc-per-node N executor run .... --accelerator cuda:0,2 names their devices. If one of
    them fails, all end, and what was finished is kept.

    With --ray every worker holds an engine of its own and must see the model under the same name. Of several policies
    it runs the one that is best on its node. Workers that die are replaced.

    In the environment, EXECUTOR_NATIVE=0 leaves attention and the experts on the CPU to torch, and
    EXECUTOR_SYNCHRONISE=1 waits for every task on a GPU, so that an error names the task that it is of.
    """
    from executor.cli.progress import live_progress, say
    from executor.download import locate
    from executor.job import JobOptions, JobProgress
    from executor.job.input_file import input_named

    _serve_another_rank()
    _check_alone(gpus, policies, fleet)
    progress = JobProgress(tell=say)
    with live_progress(progress, quiet=quiet):
        located = locate(model, revision, progress.fetched)
        options = JobOptions(
            model=located.folder,
            model_name=located.name,
            policy=policies[0],
            input=input_named(input_),
            output_dir=output_dir,
            gpus=gpus,
            **asked,
        )
        if fleet is not None:
            fleet = replace(fleet, model=located.name, policies=policies)
        told = _told_of(options, fleet, progress)
    if told is not None and not quiet:
        click.echo(told)


def _serve_another_rank() -> None:
    """End here as a rank other than 0, if torchrun started this process as one."""
    from executor.group.cores import is_another_rank

    if is_another_rank():
        from executor.job.rank import JobRank
        from executor.ranks.worker import serve

        serve(JobRank)


def _check_alone(gpus: int | None, policies: Sequence[Path], fleet: "FleetOptions | None") -> None:
    """Raise RunError for options that go with a fleet only, or not with one."""
    from executor.errors import RunError

    if gpus is not None and fleet is not None:
        rule = "are those of one machine: workers have what their policy is for"
        raise RunError("--gpus", gpus, rule, "leave it out")
    if len(policies) > 1 and fleet is None:
        raise RunError("--policy", str(policies[1]), "is a second one, which goes with --ray only", "give one alone")


def _told_of(options: "JobOptions", fleet: "FleetOptions | None", progress: "JobProgress") -> str | None:
    """What is told of the job once it is done; None if nothing was left to be run."""
    if fleet is None:
        from executor.job import run_job

        record = run_job(options, progress)
        return None if record is None else summary(record, options.output_dir)
    from executor.ray.fleet import run_fleet
    from executor.ray.fleet import summary as summary_of_fleet

    made = run_fleet(options, fleet, progress)
    return None if made is None else summary_of_fleet(made, options.output_dir)


def summary(record: "RunRecord", output_dir: Path) -> str:
    """What a run did, in a few lines."""
    totals = record.totals
    sampling = ", ".join(f"{name} {value:g}" for name, value in record.sampling_defaults.items())
    lines = [
        f"accelerator  {record.accelerator.description}",
        f"CPU kernels  {record.accelerator.cpu_kernels}",
        f"requests     {totals.requests} in {counted(totals.batches, 'batch')}"
        + (f", {totals.rejected_requests} rejected (why is in outputs.jsonl)" if totals.rejected_requests else "")
        + (f", {totals.failed_requests} failed" if totals.failed_requests else ""),
        *([f"sampling     {sampling} where requests do not say"] if sampling else []),
        f"tokens       {totals.prompt_tokens} prompt, {totals.generated_tokens} generated",
        f"throughput   {totals.tokens_per_s:.1f} tokens/s generated over prefill and decode",
    ]
    for phase, rate in ((Phase.PREFILL, totals.prefill_tokens_per_s), (Phase.DECODE, totals.decode_tokens_per_s)):
        of_phase = record.phase(phase)
        busy = ", ".join(f"{lane} {item.busy_share:.0%}" for lane, item in of_phase.lanes.items())
        seconds = format_seconds(of_phase.seconds)
        lines.append(f"{phase.value:<12} {seconds}, {rate:.1f} tokens/s; busy: {busy or '-'}")
    for name, level in record.memory.items():
        peak, planned = format_bytes(level.peak_total_bytes), format_bytes(level.planned_total_bytes)
        lines.append(f"{name + ' memory':<12} {peak} used of {planned} planned")
    trace = ", trace.json" if record.trace is not None and record.trace.spans else ""
    return "\n".join([*lines, f"wrote        {output_dir}/outputs.jsonl, run.json{trace}"])
