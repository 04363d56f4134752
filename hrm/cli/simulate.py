"""`hrm simulate`: what each lane does under a policy, as text, as a chart and as a Chrome trace."""

from pathlib import Path
from typing import Final

import click

from hrm.acts import NAMES
from hrm.cli.console import as_is, console, plain_table, print_json
from hrm.cli.options import plan_options
from hrm.cli.params import OUT_FILE, json_option, phase_option
from hrm.cli.texts import given_text, warning_text
from hrm.costs import Costs
from hrm.errors import PolicyError
from hrm.phases import decode_work, prefill_work, simulate_work
from hrm.policy_file import PolicyFile
from hrm.tasks import Lane, Phase
from hrm.trace import Trace, lane_chart, write_chrome_trace
from hrm.units import counted, format_seconds

TEXT_TASKS = 24
USUAL_STEPS: Final = 2
MOST_PARTS: Final = 30_000  # that are drawn: micro-batches or chunks, times layers and steps

steps_option = click.option(
    "--steps", type=click.IntRange(1, 64), help=f"Decode steps, joined  [default: {USUAL_STEPS}, if there are]."
)


@click.command()
@plan_options
@phase_option
@steps_option
@click.option("--layers", type=click.IntRange(1), help="Draw only up to this layer [default: all].")
@click.option("--width", type=click.IntRange(20, 400), default=100, show_default=True, help="Columns of the chart.")
@click.option("--trace", type=OUT_FILE, help="Write a Chrome trace (open it in ui.perfetto.dev).")
@json_option
def simulate(
    plan: PolicyFile, phase: Phase, steps: int | None, layers: int | None, width: int, trace: Path | None, as_json: bool
) -> None:
    """Walk a policy's task graph in virtual time and draw what each lane does."""
    simulated = simulate_plan(plan, phase, num_steps=steps)
    if layers is not None and layers > simulated.num_layers:
        rule = f"must be at most {simulated.num_layers}, as many as are simulated"
        raise PolicyError("--layers", layers, rule, "give fewer, or leave it out")
    if trace is not None:
        write_chrome_trace(trace, predicted=simulated)
    shown = simulated if layers is None else simulated.up_to_layer(layers)
    if as_json:
        print_json(
            {
                "phase": phase.value,
                "makespan_s": simulated.makespan_s,
                "busy_s": {lane.value: s for lane, s in simulated.busy_s().items()},
                "utilisation": {lane.value: s for lane, s in simulated.utilisation().items()},
                "seconds_by_kind": simulated.seconds_by_kind(),
                "lanes": {lane.value: lane_text(simulated, lane, None) for lane in Lane},
            }
        )
        return
    what = counted(simulated.num_steps, "decode step") if phase is Phase.DECODE else "prefill of one batch"
    console.print(
        f"[bold]{as_is(plan.model.name)}[/] on [bold]{as_is(plan.profile.name)}[/], "
        f"{plan.policy.schedule.value}, {what}: {format_seconds(simulated.makespan_s)} simulated"
    )
    if warning := warning_text(plan.profile):
        console.print(warning)
    console.print(f"{given}\n" if (given := given_text(plan.profile)) else "")
    if not plan.profile.has_accelerator:
        why = "memory is unified" if plan.profile.unified_memory else ("there is no accelerator: lane GPU is the CPU")
        console.print(f"[dim]{why}, and nothing moves[/]\n")
    for lane in Lane:
        text = lane_text(shown, lane, TEXT_TASKS)
        if text:
            console.print(f"{lane.value:>5}  {text}")
    console.print(f"\n{lane_chart(shown, width=width)}\n")
    letters = ", ".join(f"{letter} {name.lower().replace('_', ' ')}" for name, letter in NAMES.items())
    console.print(f"[dim]{letters}[/]\n")
    table = plain_table("lane", "busy", "share")
    shares = simulated.utilisation()
    for lane, busy_s in simulated.busy_s().items():
        table.add_row(lane.value, format_seconds(busy_s), f"{shares[lane]:.1%}")
    console.print(table)


def lane_text(trace: Trace, lane: Lane, limit: int | None) -> str:
    """The lane's tasks in issue order, at most `limit` of them."""
    names = [str(span.id) for span in trace.spans if span.lane is lane]
    if limit is not None and len(names) > limit:
        return " ".join(names[:limit]) + f" … ({len(names)} tasks)"
    return " ".join(names)


def steps_of(asked: int | None, there_are: int) -> int:
    """How many decode steps are drawn, of so many; PolicyError if there are none, or fewer than are asked for."""
    if not there_are:
        rule = "has no step where all requests get their only token of prefill"
        raise PolicyError("--phase", Phase.DECODE.value, rule, f"give --phase {Phase.PREFILL.value}")
    if asked is not None and asked > there_are:
        raise PolicyError("--steps", asked, f"must be at most {there_are}, as many as there are", "give fewer")
    return min(USUAL_STEPS, there_are) if asked is None else asked


def simulate_plan(plan: PolicyFile, phase: Phase, *, num_steps: int | None) -> Trace:
    """The simulated trace of one phase of a plan's batch, in the middle of its decoding.

    Raises PolicyError if that has more tasks than can be drawn, or fewer steps of decode.
    """
    requests = plan.workload.requests_or(plan.policy.batch_size)
    of_part, part = plan.share
    policy = of_part.for_batch(requests)
    costs = Costs(*part, policy.formats)
    parts = max(policy.parts(costs.spec, phase))
    if phase is Phase.PREFILL:
        chunks = int(plan.workload.chunks(policy.batch_size, policy.prefill_chunk_tokens))
        _check_length(chunks, "chunk", costs.spec.num_layers)
        _check_length(chunks * parts, "part of experts", costs.spec.num_layers)
        return simulate_work(prefill_work(costs, policy, plan.workload))
    num_steps = steps_of(num_steps, plan.workload.decode_steps)
    _check_length(policy.num_micro_batches, "micro-batch", costs.spec.num_layers * num_steps)
    _check_length(policy.num_weight_pages, "weight page", costs.spec.num_layers * num_steps)
    _check_length(policy.num_micro_batches * parts, "part of experts", costs.spec.num_layers * num_steps)
    context = plan.workload.prompt_len + plan.workload.gen_len / 2
    return simulate_work(decode_work(costs, policy, context, num_steps=num_steps))


def _check_length(count: int, what: str, times: int) -> None:
    if count * times > MOST_PARTS:
        raise PolicyError(
            f"policy: {what} count",
            count,
            f"times layers and steps must be at most {MOST_PARTS:,} to be drawn task by task",
            "draw a smaller batch or fewer --steps; hrm estimate predicts any",
        )
