"""How the published systems run, read in their public code: schedule, placement, and what it costs.

MoE-Lightning's artifact is github.com/caoshiyi/artifacts; its authors' port of FlexGen to mixtures
of experts is github.com/lynnliu030/FlexGen. What is modelled is what their code executes, which is
less than what they planned: FlexGen's 7 to 14 % of weights on the GPU are rounded to no expert and
no projection, MoE-Lightning keeps `int(8 × share)` = 0 experts a layer.
"""

from dataclasses import dataclass
from typing import Final

from hrm.costs import Runtime
from hrm.model_spec import ModelSpec
from hrm.policy import Policy, ScheduleName, kv_tokens_for
from hrm.published.data import PublishedRun, System
from hrm.tasks import Device

DTYPE: Final = "float16"

# A byte of the float16 cache that FlexGen(c) attends over: it is copied into a float32 workspace
# (1 read, 2 written), there repeated for each of the 4 query heads that share a key or value head
# (2 read, 8 written), and multiplied (8 read).
FLEXGEN_ATTENTION_PASSES: Final = 1 + 2 + 2 + 8 + 8
# FlexGen waits for the whole device after every layer and micro-batch; assumed, not measured.
FLEXGEN_WAIT_S: Final = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One system in words (`says`), its order of tasks, where things lie and run, its runtime."""

    says: str
    schedule: ScheduleName
    attention: Device
    runtime: Runtime
    resident_dense: bool = False
    kv_on_gpu: bool = False
    staging: bool = False


IMPLEMENTATIONS: Final = {
    System.MOE_LIGHTNING: Implementation(
        says="CGOPipe; projections on the GPU, all experts streamed through pinned pages",
        schedule=ScheduleName.CGOPIPE,
        attention=Device.CPU,
        runtime=Runtime(whole_last_layer=True),
        resident_dense=True,
        staging=True,
    ),
    System.FLEXGEN: Implementation(
        says="attention on the GPU; all weights and the cache cross from pageable memory"
        " (pin_weight and pin_memory are off, a pinned relay is made for every copy); 100 µs of"
        " waiting for the device after each task, assumed",
        schedule=ScheduleName.FLEXGEN,
        attention=Device.GPU,
        runtime=Runtime(
            weights_link="pageable", kv_link="pageable", synchronise_s=FLEXGEN_WAIT_S, whole_last_layer=True
        ),
    ),
    System.FLEXGEN_C: Implementation(
        says="attention on the CPU, in turn with the GPU, moving"
        f" {FLEXGEN_ATTENTION_PASSES} bytes a byte of cache: copied to float32, repeated for each"
        " query head, multiplied; weights and waiting as FlexGen",
        schedule=ScheduleName.FLEXGEN_C,
        attention=Device.CPU,
        runtime=Runtime(
            weights_link="pageable",
            attention_passes=FLEXGEN_ATTENTION_PASSES,
            synchronise_s=FLEXGEN_WAIT_S,
            whole_last_layer=True,
        ),
    ),
    System.DEEPSPEED: Implementation(
        says="one batch, its cache on the GPU; all weights cross from pinned memory",
        schedule=ScheduleName.DEEPSPEED,
        attention=Device.GPU,
        runtime=Runtime(whole_last_layer=True),
        kv_on_gpu=True,
    ),
}


def policy_of(run: PublishedRun, spec: ModelSpec) -> Policy:
    """The policy that a published run executed; a micro-batch is prefilled in one piece."""
    system, workload = IMPLEMENTATIONS[run.system], run.workload
    number = -(-run.batch_size // run.micro_batch_size)
    return Policy(
        schedule=system.schedule,
        batch_size=run.batch_size,
        micro_batch_size=run.micro_batch_size,
        attention=system.attention,
        resident_experts=(0,) * spec.num_layers,
        resident_dense=system.resident_dense,
        gpu_kv_micro_batches=number if system.kv_on_gpu else 0,
        kv_tokens_per_micro_batch=kv_tokens_for(
            run.micro_batch_size, workload.mean_context_len, workload.max_context_len
        ),
        prefill_chunk_tokens=round(run.micro_batch_size * workload.prompt_len),
        staging=system.staging,
        dtype=DTYPE,
    )
