"""`executor run`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from executor.cli.options import accelerator_options
from hrm.cli.params import enum_option
from hrm.policy import ScheduleName
from hrm.tasks import Phase
from hrm.units import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from executor.job.machine import AcceleratorOptions
    from executor.job.sampling_defaults import SamplingSource
    from hrm.run_record import RunRecord

_folder = click.Path(path_type=Path, file_okay=False)
_file = click.Path(path_type=Path, dir_okay=False)


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
@click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Share the requests out over the workers of a Ray cluster [without an address: over workers here].",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1, max=10_000),
    help="Of --ray [default: 2 here, or one on every node of a cluster].",
)
@click.option(
    "--own-plans",
    is_flag=True,
    help="With --ray, have every node measure itself, in a minute, once, and solve the policy's workload for itself.",
)
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def run(
    *,
    model: str,
    revision: str | None,
    policies: Sequence[Path],
    input_: str,
    output_dir: Path,
    accelerator: "AcceleratorOptions",
    gpus: int | None,
    schedule: ScheduleName | None,
    seed: int,
    sampling_defaults: "SamplingSource",
    max_requests: int | None,
    resume: bool,
    ray_address: str | None,
    workers: int | None,
    own_plans: bool,
    quiet: bool,
) -> None:
    """Run a file of requests under a policy.

    Each request is appended to OUTPUT_DIR/outputs.jsonl as it ends; one that cannot be run, or goes
    wrong, gets a line with its error and the others run. run.json says what was done and how fast;
    trace.json opens in Perfetto.

    Parquet (extra parquet) has a row for each request, with the columns of a batch line (custom_id, url and body, a
    struct or a text in JSON) or those of a body (prompt or messages, max_tokens, ...) beside a custom_id. An input may
    be a URL of s3, gs, abfs or hdfs, read piece by piece by pyarrow.fs with the credentials of your environment.

    Temperature, top_p, top_k and min_p that a request does not give are those of the model's
    generation_config.json, if it has any.

    A chat without max_tokens gets as many tokens as its share of the policy's cache leaves beside
    the prompt, but no fewer than the --gen-len of the policy; a completion gets 16.

    --resume goes on where a run was cut short, with what is not answered yet, errors included: they
    are tried again. Model, dtype, --seed and the requests answered must be the same as then.

    A policy for several GPUs in tensor parallel is run by a process for each, on its share of the cores,
    which are started here, or by torchrun --no-python --nproc-per-node N executor run .... --accelerator cuda:0,2
    names the devices of the ranks; those that share one, as with cuda:0,0, sum up through the host. When one of
    them fails, or does not come to where the others wait for it within EXECUTOR_RANK_TIMEOUT seconds,
    30 by default, all end, and what was finished is kept.

    With --ray every worker holds an engine of its own, or as many processes as its policy is for GPUs, and must see
    the model under the same name. Of several policies it runs the one that is best on its node: that for the node's
    GPUs, or else for a host like it, with the highest prediction; a node that can run none is left out. Answers come
    here as they end, each once, and workers that die are replaced. A request with which two engines died, the second
    time alone, is left out. run.json holds what every worker did, which hrm validate compares.

    Of a model on the Hub only what is needed is fetched, once, into the Hub's own cache, as HF_HOME,
    HF_TOKEN and HF_HUB_OFFLINE say.

    EXECUTOR_NATIVE=0 in the environment leaves attention and the experts on the CPU to torch;
    avx2 (say) takes the native kernels for those instructions. Up to which sizes they are faster than
    torch is measured once, for a second, and kept in the user's cache folder; EXECUTOR_NATIVE_UP_TO=N
    sets it. EXECUTOR_SYNCHRONISE=1 waits for every task on a GPU, so that an error names the task
    that it is of.
    """
    from executor.cli.progress import live_progress, say
    from executor.download import locate
    from executor.errors import RunError
    from executor.group.cores import is_another_rank
    from executor.job import JobOptions, JobProgress, run_job
    from executor.job.input_file import input_named

    if is_another_rank():
        from executor.job.rank import JobRank
        from executor.ranks.worker import serve

        serve(JobRank)
    if gpus is not None and ray_address is not None:
        raise RunError(
            "--gpus", gpus, "are those of one machine: workers have what their policy is for", "leave it out"
        )
    if workers is not None and ray_address is None:
        raise RunError("--workers", workers, "goes with --ray only", "leave it out, or add --ray")
    if own_plans and ray_address is None:
        raise RunError("--own-plans", True, "goes with --ray only", "leave it out, or use hrm profile and hrm search")
    if len(policies) > 1 and ray_address is None:
        raise RunError("--policy", str(policies[1]), "is a second one, which goes with --ray only", "give one alone")

    progress = JobProgress(tell=say)
    with live_progress(progress, quiet=quiet):
        located = locate(model, revision, progress.fetched)
        options = JobOptions(
            model=located.folder,
            model_name=located.name,
            policy=policies[0],
            input=input_named(input_),
            output_dir=output_dir,
            accelerator=accelerator,
            gpus=gpus,
            schedule=schedule,
            seed=seed,
            sampling_defaults=sampling_defaults,
            max_requests=max_requests,
            resume=resume,
        )
        if ray_address is None:
            record = run_job(options, progress)
            told = None if record is None else summary(record, output_dir)
        else:
            from executor.ray.fleet import run_fleet
            from executor.ray.fleet import summary as summary_of_fleet
            from executor.ray.options import FleetOptions

            fleet = FleetOptions(
                address=ray_address, workers=workers, model=located.name, policies=policies, own_plans=own_plans
            )
            made = run_fleet(options, fleet, progress)
            told = None if made is None else summary_of_fleet(made, output_dir)
    if told is not None and not quiet:
        click.echo(told)


def summary(record: "RunRecord", output_dir: Path) -> str:
    """What a run did, in a few lines."""
    totals = record.totals
    sampling = ", ".join(f"{name} {value:g}" for name, value in record.sampling_defaults.items())
    lines = [
        f"accelerator  {record.accelerator.description}",
        f"CPU kernels  {record.accelerator.cpu_kernels}",
        f"requests     {totals.requests} in {counted(totals.batches, 'batch')}"
        + (f", {totals.rejected_requests} rejected" if totals.rejected_requests else "")
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
