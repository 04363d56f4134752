"""Schedules: pure functions from a model and a policy to the graph that is simulated and run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from hrm.model_spec import ModelSpec
from hrm.placement import Place
from hrm.policy import Policy, ScheduleName
from hrm.schedules import bounds, orders
from hrm.schedules.bounds import StepWork, Terms
from hrm.schedules.hazards import with_positions, with_waits
from hrm.schedules.pipeline import Pipeline
from hrm.tasks import Device, Phase, Task, TaskGraph, TaskId

__all__ = [
    "SCHEDULES",
    "Pipeline",
    "Schedule",
    "StepWork",
    "add_schedule",
    "decode_pipeline",
    "graph",
    "iter_positions",
    "iter_tasks",
    "pages_of",
    "prefill_pipeline",
]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A decode order with its own lower bounds, whether it pages weights, and what the system it is from fixes.

    `terms` are seconds that a step takes at least in this order, beside the work of each lane. `attention`, `ffn`,
    `single_micro_batch` and `kv_on_gpu` bound the search, not the executor: any policy can be run in any order.
    """

    order: Callable[[Pipeline], Iterator[TaskId]]
    terms: Callable[[StepWork], Terms]
    paged: bool = False
    attention: Device | None = None
    ffn: Device | None = None
    single_micro_batch: bool = False
    kv_on_gpu: bool = False


SCHEDULES: Final = {
    ScheduleName.CGOPIPE: Schedule(orders.cgopipe, bounds.cgopipe, paged=True),
    ScheduleName.FLEXGEN: Schedule(orders.flexgen, bounds.flexgen, attention=Device.GPU, ffn=Device.GPU),
    ScheduleName.FLEXGEN_C: Schedule(orders.flexgen, bounds.flexgen, attention=Device.CPU, ffn=Device.GPU),
    ScheduleName.FASTDECODE: Schedule(orders.cgopipe, bounds.fastdecode, attention=Device.CPU, ffn=Device.GPU),
    ScheduleName.DEEPSPEED: Schedule(
        orders.deepspeed,
        bounds.deepspeed,
        attention=Device.GPU,
        ffn=Device.GPU,
        single_micro_batch=True,
        kv_on_gpu=True,
    ),
}


def add_schedule(name: str, schedule: Schedule) -> ScheduleName:
    """Make a schedule of one's own known, which is then searched for, simulated, run and drawn under its name."""
    added = ScheduleName.add(name)
    SCHEDULES[added] = schedule
    return added


def pages_of(policy: Policy) -> int:
    """Pages that a layer's weights move in under the policy."""
    return policy.num_weight_pages if SCHEDULES[policy.schedule].paged else 1


def _with_pages(pipeline: Pipeline, spec: ModelSpec, policy: Policy) -> Pipeline:
    if not SCHEDULES[policy.schedule].paged:
        return pipeline
    if policy.resident_dense:
        return pipeline.with_pages(pages_of(policy))
    # Projections come first in a layer, and are most of one of which the fewest experts stream.
    placement = policy.placement(spec, pipeline.phase)
    layer = ((next(kind for kind in spec.layer_kinds() if kind.has_experts), 1),)
    fewest = placement.bytes_at(Place.STREAMED, layer, max(policy.resident_experts))
    dense = placement.bytes_at(Place.STREAMED, layer, spec.num_experts)
    return pipeline.with_pages(pages_of(policy), dense_share=float(dense / fewest))


def decode_pipeline(spec: ModelSpec, policy: Policy, *, num_steps: int = 1) -> Pipeline:
    """The shape of `num_steps` joined decode steps under the policy."""
    return _with_pages(Pipeline.of_policy(spec, policy, num_steps=num_steps), spec, policy)


def prefill_pipeline(spec: ModelSpec, policy: Policy, *, num_chunks: int) -> Pipeline:
    """The shape of prefill in `num_chunks` chunks of prompts under the policy."""
    return _with_pages(Pipeline.of_prefill(spec, policy, num_chunks=num_chunks), spec, policy)


def iter_tasks(pipeline: Pipeline, schedule: ScheduleName) -> Iterator[Task]:
    """The tasks of a phase in order of issue, made one by one: a long job never holds them all.

    `graph` asserts that the order is topological; consumers of this find out by a missing key.
    """
    return with_waits(pipeline, _order(pipeline, schedule))


def iter_positions(pipeline: Pipeline, schedule: ScheduleName) -> Iterator[tuple[TaskId, tuple[int, ...]]]:
    """The same tasks with the positions of what they wait for, to be simulated: quicker."""
    return with_positions(pipeline, _order(pipeline, schedule))


def _order(pipeline: Pipeline, schedule: ScheduleName) -> Iterator[TaskId]:
    prefill = pipeline.phase is Phase.PREFILL
    return (orders.prefill if prefill else SCHEDULES[schedule].order)(pipeline)


def graph(pipeline: Pipeline, schedule: ScheduleName) -> TaskGraph:
    """The whole graph of a phase, to be printed, drawn or simulated."""
    return TaskGraph(tuple(iter_tasks(pipeline, schedule)))
