"""The policy that options give number by number, and the nearest one that fits if it does not."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import click

from hrm.cli.params import (
    enum_option,
    expert_division_option,
    experts_per_part_option,
    schedule_option,
    staging_option,
    together,
)
from hrm.errors import PolicyError
from hrm.formats import Formats
from hrm.hardware import HardwareProfile
from hrm.layers import ExpertDivision
from hrm.memory import MemoryPlan, plan_memory
from hrm.model_spec import ModelSpec
from hrm.parallel import part_of, tensor_parallel_obstacle
from hrm.placement import experts_of_layers
from hrm.policy import Parallelism, Policy, ScheduleName, kv_tokens_for, prefix_tokens_for
from hrm.tasks import Device
from hrm.workload import Workload

PREFILL_CHUNK_TOKENS = 4096  # unless --prefill-chunk says it, a batch has fewer or one prompt has more


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenPolicy:
    """What the options say of a policy, as they were written."""

    micro_batch_size: int
    num_micro_batches: int
    attention: Device
    ffn: Device
    prefill_ffn: Device
    resident_experts: str
    resident_dense: bool
    experts_per_part: int
    kv_on_gpu: str
    prefill_chunk_tokens: int | None
    schedule: ScheduleName
    staging: bool
    expert_division: ExpertDivision

    def policy(self, spec: ModelSpec, profile: HardwareProfile, workload: Workload, formats: Formats) -> Policy:
        """The policy for a model; on a machine of one level everything lies and is computed there."""
        two_levels = profile.has_accelerator
        division = self.expert_division if profile.num_gpus > 1 else ExpertDivision.INNER
        spec = self._part(spec, profile, division)
        batch_size = self.micro_batch_size * self.num_micro_batches
        if workload.num_requests is not None:
            batch_size = max(min(batch_size, workload.num_requests), self.micro_batch_size)
        num_micro_batches = -(-batch_size // self.micro_batch_size)
        on_gpu = round(_share(self.kv_on_gpu) * num_micro_batches) if two_levels else num_micro_batches
        attention = self.attention if two_levels else Device.GPU
        longest, chunk = workload.max_prompt_len, self.prefill_chunk_tokens
        if chunk is None:
            chunk = max(longest, min(round(batch_size * workload.prompt_len), PREFILL_CHUNK_TOKENS))
        cpu_attention = attention is Device.CPU and on_gpu < num_micro_batches
        policy = Policy(
            schedule=self.schedule,
            expert_division=division,
            batch_size=batch_size,
            micro_batch_size=self.micro_batch_size,
            attention=attention,
            ffn=self.ffn if two_levels else Device.GPU,
            prefill_ffn=self.prefill_ffn if two_levels else Device.GPU,
            resident_experts=_resident_experts(self.resident_experts, spec) if two_levels else experts_of_layers(spec),
            resident_dense=self.resident_dense or not two_levels,
            experts_per_part=self.experts_per_part if two_levels else 0,
            gpu_kv_micro_batches=on_gpu,
            kv_tokens_per_micro_batch=kv_tokens_for(
                self.micro_batch_size, workload.mean_context_len, workload.max_context_len
            ),
            prefill_chunk_tokens=chunk,
            prefix_buffer_tokens=prefix_tokens_for(spec, formats, longest, chunk, cpu_attention=int(cpu_attention)),
            staging=self.staging,
            dtype=formats.compute.name,
            weight_format=formats.weights.name,
            kv_format=formats.kv_cache.name,
        )
        policy.check_model(spec)
        return policy

    @staticmethod
    def _part(spec: ModelSpec, profile: HardwareProfile, division: ExpertDivision) -> ModelSpec:
        """The model whose experts are counted: one rank's, if each has whole ones."""
        if division is ExpertDivision.INNER:
            return spec
        obstacle = tensor_parallel_obstacle(spec, profile.num_gpus, division)
        if obstacle:
            rule = f"cannot be, as {spec.name} is: {obstacle}"
            raise PolicyError("--expert-division", division.value, rule, "leave it out, or ask for other GPUs")
        return part_of(spec, profile, Parallelism.TENSOR, division).spec

    def fitting(self, spec: ModelSpec, profile: HardwareProfile, workload: Workload, formats: Formats) -> Policy:
        """The policy for a model; PolicyError if it does not fit the machine, with what would."""

        def plan(given: GivenPolicy) -> MemoryPlan:
            return plan_memory(spec, given.policy(spec, profile, workload, formats), profile)

        policy = self.policy(spec, profile, workload, formats)
        if not plan(self).fits:
            residents = max(policy.resident_experts) if profile.has_accelerator else 0
            remedy = _smaller(self, lambda given: plan(given).fits, residents)
            if not remedy and policy.prefill_ffn is Device.GPU and not policy.staging:
                most = self._part(spec, profile, policy.expert_division).num_experts
                count = _largest(most, lambda n: plan(replace(self, experts_per_part=n)).fits)
                remedy = f"--experts-per-part {count}" if count and profile.has_accelerator else ""
            plan(self).check_fits(remedy=remedy)
        return policy


_positive = click.IntRange(min=1)
given_policy_options = together(
    "given",
    GivenPolicy,
    click.option("--micro-batch-size", "-u", type=_positive, required=True, help="Requests a micro-batch."),
    click.option("--num-micro-batches", "-n", type=_positive, required=True, help="Micro-batches a batch."),
    enum_option(
        "--attention", kind=Device, default="cpu", show_default=True, help="Where caches on the host are attended over."
    ),
    enum_option(
        "--ffn", kind=Device, default="gpu", show_default=True, help="Where experts that are not resident are computed."
    ),
    enum_option(
        "--prefill-ffn",
        kind=Device,
        default="gpu",
        show_default=True,
        help="Where prefill computes the experts that are not resident; the CPU only if --ffn says so too.",
    ),
    click.option(
        "--resident-experts",
        default="0",
        show_default=True,
        metavar="COUNT[,COUNT…]",
        help="Experts of every layer that stay on the GPU: one count, or one for each layer. Layers "
        "without experts have none.",
    ),
    click.option(
        "--resident-dense/--stream-dense",
        default=True,
        show_default=True,
        help="Whether projections, norms and routers stay on the GPU.",
    ),
    experts_per_part_option,
    click.option(
        "--kv-on-gpu",
        is_flag=False,
        flag_value="1",
        default="0",
        show_default=True,
        metavar="[SHARE]",
        help="Share of the KV cache that lives on the GPU; all without a number.",
    ),
    click.option(
        "--prefill-chunk",
        "prefill_chunk_tokens",
        type=int,
        help="Prompt tokens prefilled at a time; longer prompts are split  [default: the batch's, "
        f"of at most {PREFILL_CHUNK_TOKENS} or one prompt].",
    ),
    schedule_option,
    staging_option,
    expert_division_option(
        default="inner",
        show_default=True,
        help="Whether each of several GPUs has a part of every expert's inner size, or whole experts; those that "
        "stay or stream are then counted among its own.",
    ),
)


def _smaller(given: GivenPolicy, fits: Callable[[GivenPolicy], bool], residents: int) -> str:
    """The options of the largest batch that fits, in smaller or fewer micro-batches; or empty.

    Of so many resident experts a layer some are given up only if nothing fits beside all, and no more than must be.
    """

    def told(changed: GivenPolicy, options: str) -> str:
        if changed.resident_experts == given.resident_experts:
            return options
        most = _largest(residents, lambda count: fits(replace(changed, resident_experts=str(count))))
        return f"{options} --resident-experts {most}".strip()

    kept = [given]
    if residents:
        kept.append(replace(given, resident_experts="0"))
    for changed in kept:
        size = _largest(changed.micro_batch_size, lambda u, of=changed: fits(replace(of, micro_batch_size=u)))
        number = _largest(changed.num_micro_batches, lambda n, of=changed: fits(replace(of, num_micro_batches=n)))
        if size == changed.micro_batch_size:
            return told(changed, "")
        if number * given.micro_batch_size > size * given.num_micro_batches:
            return told(replace(changed, num_micro_batches=number), f"-n {number}")
        if size:
            return told(replace(changed, micro_batch_size=size), f"-u {size}")
    least = replace(kept[-1], num_micro_batches=1)
    size = _largest(given.micro_batch_size, lambda u: fits(replace(least, micro_batch_size=u)))
    return told(replace(least, micro_batch_size=size), f"-u {size} -n 1") if size else ""


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits if all smaller ones do; 0 if 1 does not."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _resident_experts(text: str, spec: ModelSpec) -> tuple[int, ...]:
    """Resident experts of every layer; one count is that of every layer which has experts."""
    there_are = experts_of_layers(spec)
    remedy = f"give one count, or one for each of the {spec.num_layers} layers"
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PolicyError("--resident-experts", text, "must be integers separated by commas", remedy) from None
    if len(counts) == 1 and 0 <= counts[0] <= spec.num_experts:
        return tuple(min(counts[0], most) for most in there_are)
    if len(counts) != spec.num_layers or not 0 <= min(counts) <= max(counts) <= spec.num_experts:
        rule = f"must be counts of at most the {spec.num_experts} experts of {spec.name}"
        raise PolicyError("--resident-experts", text, rule, remedy)
    for layer, (count, most) in enumerate(zip(counts, there_are, strict=True)):
        if count > most:
            raise PolicyError(
                f"--resident-experts of layer {layer}", count, "the layer has no experts", "give 0 for it"
            )
    return counts


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise PolicyError("--kv-on-gpu", text, "must be a share between 0 and 1", "give 0.5, or no number for all")
    return share
