"""Schedules: pure functions from a model and a policy to the graph that is simulated and run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from hrm.model_spec import ModelSpec
from hrm.policy import Policy, ScheduleName
from hrm.schedules import bounds, orders
from hrm.schedules.bounds import StepWork, Terms
from hrm.schedules.hazards import with_waits
from hrm.schedules.pipeline import Pipeline
from hrm.tasks import Device, Phase, Task, TaskGraph, TaskId

__all__ = [
    "SCHEDULES",
    "Pipeline",
    "Schedule",
    "StepWork",
    "decode_pipeline",
    "graph",
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


def pages_of(policy: Policy) -> int:
    """Pages that a layer's weights move in under the policy."""
    return policy.num_micro_batches if SCHEDULES[policy.schedule].paged else 1


def _with_pages(pipeline: Pipeline, spec: ModelSpec, policy: Policy) -> Pipeline:
    if not SCHEDULES[policy.schedule].paged:
        return pipeline
    dense = spec.dense_parameters
    streamed_experts = spec.num_experts - max(policy.resident_experts)
    streamed = dense + (
        streamed_experts * spec.expert_parameters if pipeline.phase is Phase.PREFILL or policy.ffn is Device.GPU else 0
    )
    return pipeline.with_pages(pages_of(policy), dense_share=dense / streamed)


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
    prefill = pipeline.phase is Phase.PREFILL
    order = orders.prefill if prefill else SCHEDULES[schedule].order
    yield from with_waits(pipeline, order(pipeline))


def graph(pipeline: Pipeline, schedule: ScheduleName) -> TaskGraph:
    """The whole graph of a phase, to be printed, drawn or simulated."""
    return TaskGraph(tuple(iter_tasks(pipeline, schedule)))
