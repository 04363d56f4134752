"""`executor run --ray`: a job on many workers, from its options to what is told of it."""

from pathlib import Path

from executor.job.options import JobOptions
from executor.job.outputs import OUTPUTS
from executor.job.progress import JobProgress
from executor.job.run import RUN_JSON, TRACE_JSON, run_job_on
from executor.ray.members import DIED
from executor.ray.options import FleetOptions
from executor.ray.plans import read_plans
from executor.ray.work import FleetWork
from hrm.run_record import FleetRecord


def run_fleet(options: JobOptions, fleet: FleetOptions, progress: JobProgress | None = None) -> FleetRecord | None:
    """Run a job on many workers; answers, resuming and mistakes are as those of `run_job`.

    Returns what run.json then holds, None if nothing was left to be run. Raises PolicyError if policies do not go
    together, and RunError if Ray cannot be had, no worker can run the job, or workers die again and again.
    """
    plans = read_plans(fleet.policies or [options.policy])
    work = FleetWork(options, fleet, plans)
    return run_job_on(work, options, progress, [plan.file for plan in plans])


def summary(record: FleetRecord, output_dir: Path) -> str:
    """What a fleet did, in a few lines."""
    died = sum(worker.outcome == DIED for worker in record.workers)
    lines = [
        f"workers      {len(record.workers) - died}{f', {died} died and were replaced' if died else ''}",
        f"requests     {record.requests} answered"
        + (f", {record.failed_requests} failed" if record.failed_requests else "")
        + (f", left out: {', '.join(record.given_up)}" if record.given_up else ""),
        f"tokens       {record.generated_tokens} generated",
        f"throughput   {record.tokens_per_s:.1f} tokens/s generated from the first request to the last answer",
    ]
    for worker in record.workers:
        rate = f", {worker.run.totals.tokens_per_s:.1f} tokens/s" if worker.run is not None else ""
        lines.append(
            f"{f'worker {worker.worker}':<12} {worker.node}, {Path(worker.policy).name}: {worker.requests} requests,"
            f" {worker.generated_tokens} tokens{rate}{', died' if worker.outcome == DIED else ''}"
        )
    return "\n".join([*lines, f"wrote        {output_dir / OUTPUTS}, {RUN_JSON}, {TRACE_JSON}"])
