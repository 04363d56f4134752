"""What `hrm plot timeline` draws: a plan in several orders, or a run and its prediction."""

from dataclasses import replace
from pathlib import Path

from hrm.cli.simulate import simulate_plan, steps_of
from hrm.cli.texts import machine_text
from hrm.costs import Costs
from hrm.errors import TraceError
from hrm.memory import plan_memory
from hrm.parallel import ranks_of
from hrm.phases import decode_work, simulate_work
from hrm.policy import Policy, ScheduleName, spread_experts
from hrm.policy_file import PolicyFile
from hrm.run_record import RunRecord, read_run
from hrm.scaling import paced
from hrm.schedules import SCHEDULES
from hrm.tasks import Phase
from hrm.trace import Trace, read_chrome_trace
from hrm.units import counted


def of_schedules(
    plan: PolicyFile, schedules: tuple[ScheduleName, ...], phase: Phase, steps: int | None, *, searched: bool
) -> tuple[str, dict[str, Trace]]:
    """The same policy in the order of every schedule, with attention where the schedule has it."""
    names = list(schedules) or [plan.policy.schedule]
    if searched:
        plan = replace(plan, policy=fitting_all(plan, names))
    plans = {name.value: replace(plan, policy=in_order(plan.policy, name)) for name in names}
    for other in plans.values():
        plan_memory(plan.model, other.policy, plan.profile).check_fits()
    policy = plan.policy
    parts = counted(policy.num_micro_batches, "micro-batch")
    title = f"{plan.model.name} on {machine_text(plan.profile)}: {parts} of {policy.micro_batch_size}"
    traces = {
        f"{name}, attention on the {other.policy.attention.words}, predicted": simulate_plan(
            other, phase, num_steps=steps
        )
        for name, other in plans.items()
    }
    return title, traces


def in_order(policy: Policy, schedule: ScheduleName) -> Policy:
    """The policy in another schedule's order, with attention on the device that it is known for."""
    attention = SCHEDULES[schedule].attention
    changed = replace(policy, schedule=schedule)
    return changed if attention is None else replace(changed, attention=attention)


def fitting_all(plan: PolicyFile, schedules: list[ScheduleName]) -> Policy:
    """The plan's policy with as many of its resident experts as leave room for every schedule.

    Attention on the GPU needs buffers there. If not even none of the experts leaves enough, the
    policy is the plan's with none.
    """

    def fits(policy: Policy) -> bool:
        return all(plan_memory(plan.model, in_order(policy, name), plan.profile).fits for name in schedules)

    if plan.policy.stage_lengths:
        return plan.policy  # which schedule fits is told when they are drawn
    spec = plan.part.spec
    for total in range(sum(plan.policy.resident_experts), 0, -1):
        fewer = replace(plan.policy, resident_experts=spread_experts(spec, total))
        if fits(fewer):
            return fewer
    return replace(plan.policy, resident_experts=spread_experts(spec, 0))


def of_run(folder: Path, phase: Phase, steps: int | None) -> tuple[str, dict[str, Trace]]:
    """What a run's first batch did, and what is predicted for a batch of its size and lengths."""
    run = read_run(folder)
    given = run.policy_file
    of_rank, (spec, profile) = ranks_of(given.policy, given.model, given.profile)[0]  # whose spans those of a run are
    plan = replace(
        given,
        model=spec,
        profile=paced(profile, run.accelerator.h2d_bytes_per_s, run.accelerator.d2h_bytes_per_s),
        policy=replace(of_rank.for_batch(run.batches[0].requests), gpus=(), schedule=ScheduleName(run.schedule)),
        workload=replace(run.policy_file.workload, prompt_len=run.workload.prompt_len),
    )
    measured = read_chrome_trace(folder / "trace.json").of_phase(phase).of_batch(0)
    if phase is Phase.DECODE:
        steps = steps_of(steps, max(1, measured.num_steps - 1))  # without the first, unless it is the only one
        first, measured = measured_steps(folder, measured, steps)
        context = run.workload.prompt_len + first + 1 + steps / 2
        costs = Costs(*plan.part, plan.policy.formats)
        # One step more on either side: as in the run, the step before them loads their first
        # weights, and they load those of the step after them.
        count = min(steps + 2, run.batches[0].decode_steps)
        predicted = simulate_work(decode_work(costs, plan.policy, context, num_steps=count))
        _, predicted = measured_steps(folder, predicted, steps)
    else:
        predicted = simulate_plan(plan, phase, num_steps=steps)
    if not measured.spans:
        raise _nothing(folder, phase)
    title = f"{given.model.name}, {run.schedule}, {run.accelerator.description}"
    return title, {f"measured, {_ran_on(run)}": measured, "predicted": predicted}


def _ran_on(run: RunRecord) -> str:
    return "emulated accelerator" if run.accelerator.emulated else run.accelerator.name


def measured_steps(run: Path, trace: Trace, num_steps: int) -> tuple[int, Trace]:
    """Steps of a trace after its first one, counted from 0, and which the first of them was.

    Raises TraceError if there are none.
    """
    begin = min(1, max((span.id.step for span in trace.spans), default=0))
    spans = tuple(
        span._replace(id=span.id._replace(step=span.id.step - begin))
        for span in trace.spans
        if begin <= span.id.step < begin + num_steps
    )
    if not spans:
        raise _nothing(run, Phase.DECODE)
    return begin, Trace(spans)


def _nothing(run: Path, phase: Phase) -> TraceError:
    return TraceError(str(run), f"<no {phase.value} steps>", "must hold a run that did this phase", "run the job again")
