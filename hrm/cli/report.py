"""How a plan is shown: for people as tables, for scripts as one JSON object."""

import math
from dataclasses import asdict
from typing import Any

from hrm.cli.console import as_is, console, plain_table
from hrm.cli.limits import launches_json, launches_text, limits_json, written_out_text
from hrm.cli.search_report import gpus_text, print_search, print_ways
from hrm.cli.texts import formats_text, given_text, latency_text, range_text, warning_text
from hrm.estimate import Estimate, PhaseEstimate
from hrm.hardware import HardwareProfile
from hrm.layers import ExpertDivision
from hrm.memory import LevelPlan
from hrm.model_spec import ModelSpec
from hrm.parallel import used_of
from hrm.placement import experts_of_layers
from hrm.policy import PAPER_SYMBOLS, Parallelism, Policy
from hrm.ranges import ThroughputRange, throughput_range
from hrm.roofline import TurningPoints, attention_turning_points, ffn_turning_points
from hrm.scaling import given_resources
from hrm.search.result import SearchResult
from hrm.tasks import Device
from hrm.units import counted, format_bytes, format_count, format_number, format_seconds
from hrm.workload import Workload


def policy_json(estimate: Estimate) -> dict[str, Any]:
    """The policy's fields and the paper's six numbers."""
    policy = estimate.policy
    six = estimate.paper_tuple._asdict()
    fields = {name: getattr(policy, name) for name in Policy.__dataclass_fields__}
    return {**fields, "num_micro_batches": policy.num_micro_batches, "paper_tuple": six}


def predicted_json(estimate: Estimate) -> dict[str, Any]:
    """Predicted throughput and times of the job, its bound, and the bottleneck of each phase."""
    return {
        "tokens_per_s": estimate.tokens_per_s,
        "prefill_s": estimate.prefill.seconds,
        "decode_s": estimate.decode.seconds,
        "bound_tokens_per_s": estimate.bound_tokens_per_s,
        "bottleneck": {
            "prefill": estimate.limits.prefill.cause.value,
            "decode": estimate.limits.decode.cause.value if estimate.decode.seconds else None,
        },
        "limits": limits_json(estimate),
        "launches": launches_json(estimate),
        "lane_s": {
            phase: {lane.value: seconds for lane, seconds in of_phase.lane_s.items()}
            for phase, of_phase in (("prefill", estimate.prefill), ("decode", estimate.decode))
        },
        "host_memory_s": {"prefill": estimate.prefill.work.host_memory_s, "decode": estimate.decode.work.host_memory_s},
        "all_reduce_s": {"prefill": estimate.prefill.work.all_reduce_s, "decode": estimate.decode.work.all_reduce_s},
        "ttft_s": {"mean": estimate.latency.mean_ttft_s, "last": estimate.latency.last_ttft_s},
        "time_per_output_token_s": estimate.latency.tpot_s,
        "requests": estimate.num_requests,
        "batches": estimate.num_batches,
    }


def memory_json(plan: LevelPlan) -> dict[str, Any]:
    """Capacity and planned bytes by purpose at one level."""
    return {"capacity_bytes": plan.capacity_bytes, "planned_bytes": {**plan.purposes, "total": plan.planned_bytes}}


def plan_json(
    estimate: Estimate,
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    search: SearchResult | None = None,
) -> dict[str, Any]:
    """Everything about one plan."""
    levels = {plan.name: memory_json(plan) for plan in estimate.memory.levels}
    points = _turning_points(estimate, workload)
    predicted = predicted_json(estimate)
    predicted["tokens_per_s_range"] = throughput_range(spec, estimate.policy, profile, workload)
    content: dict[str, Any] = {
        "policy": policy_json(estimate),
        "predicted": predicted,
        "memory": levels,
        "turning_points": {name: {**asdict(point), "verdict": point.verdict} for name, point in points.items()},
        "machine": profile.name,
        "machine_given": {resource.column: value for resource, value in given_resources(profile).items()},
        "model": spec.name,
        "workload": workload,
    }
    if search is not None:
        content["search"] = {
            "solver": search.solver,
            "seconds": search.seconds,
            "evaluations": search.evaluations,
            "outcome": search.outcome.name.lower(),
            "gap": None if math.isinf(search.bound_tokens_per_s) else search.gap,
            "bound_tokens_per_s": search.bound_tokens_per_s,
            "regions": search.regions,
            "simulated": search.simulated,
        }
        content["parallelism"] = [
            {
                "parallelism": way.parallelism.value,
                "expert_division": way.expert_division.value,
                "gpus": way.gpus,
                "tokens_per_s": None if way.best is None else way.best.tokens_per_s,
                "at_most_tokens_per_s": way.at_most_tokens_per_s or None,
                "obstacle": way.obstacle,
            }
            for way in search.ways
        ]
        content["runner_ups"] = [{"policy": policy_json(e), "predicted": predicted_json(e)} for e in search.runner_ups]
    return content


def _turning_points(estimate: Estimate, workload: Workload) -> dict[str, TurningPoints]:
    spec, profile = estimate.part
    if not profile.has_accelerator:
        return {}
    policy = estimate.policy
    context = workload.prompt_len + workload.gen_len / 2
    return {
        "attention": attention_turning_points(profile, spec, policy.formats, context=context),
        "ffn": ffn_turning_points(
            profile, spec, policy.formats, batch_size=policy.batch_size, micro_batch_size=policy.micro_batch_size
        ),
    }


def print_plan(
    estimate: Estimate,
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    search: SearchResult | None = None,
) -> None:
    """Print a plan for people."""
    policy = estimate.policy
    console.print(
        f"[bold]{as_is(spec.name)}[/] ({format_count(spec.parameters)} parameters, "
        f"{formats_text(spec, policy.formats)}) on [bold]{as_is(profile.name)}[/]{_kind_of_machine(profile)}"
    )
    if given := given_text(profile):
        console.print(given)
    if warning := warning_text(profile):
        console.print(warning)
    requests = "without end" if workload.num_requests is None else str(workload.num_requests)
    console.print(
        f"workload {as_is(workload.name)}: prompts of {format_number(workload.prompt_len)} tokens on average and "
        f"{workload.max_prompt_len} at most, {workload.gen_len} generated, requests {requests}\n"
    )
    _print_policy(estimate, spec, workload, profile)
    ends = throughput_range(spec, estimate.policy, profile, workload)
    _print_prediction(estimate, workload, ends, has_gpu=profile.has_gpu)
    if estimate.stages:
        _print_stages(estimate)
    _print_memory(estimate)
    _print_turning_points(_turning_points(estimate, workload), estimate)
    if search is not None:
        print_ways(search)
        print_search(search)


def _kind_of_machine(profile: HardwareProfile) -> str:
    match profile.accelerator:
        case "catalog":
            return " (from the catalog: not measured)"
        case "emulated":
            return " (the accelerator is emulated)"
        case _:
            return ""


def _print_policy(estimate: Estimate, spec: ModelSpec, workload: Workload, profile: HardwareProfile) -> None:
    policy = estimate.policy
    console.print(f"[bold]policy[/]  {PAPER_SYMBOLS} = {estimate.paper_tuple}, schedule {policy.schedule.value}")
    batches = f"{counted(policy.num_micro_batches, 'micro-batch')} of {policy.micro_batch_size}"
    console.print(f"  {counted(policy.batch_size, 'request')} a batch in {batches}")
    num_gpus = used_of(profile, policy).num_gpus
    if policy.gpus:
        console.print(f"  on {gpus_text(policy.gpus)} of {profile.num_gpus} GPUs: the others would make it no faster")
    if estimate.stages:
        lengths = " + ".join(map(str, policy.stage_lengths))
        console.print(f"  in a pipeline of stages of {lengths} layers, as many batches at once as stages; the slowest:")
    elif policy.parallelism is Parallelism.PIPELINE:
        stage = f"{len(policy.resident_experts)} of {spec.num_layers} layers"
        console.print(f"  in each stage of a pipeline ({stage}), as many batches at once as stages")
    elif num_gpus > 1:
        console.print(f"  in each of {num_gpus} ranks, which have a part of every layer and sum up twice in each")
        whole = policy.expert_division is ExpertDivision.WHOLE
        here = f": {estimate.part.spec.num_experts} of {spec.num_experts}" if whole else ""
        console.print(f"  {policy.expert_division.words}{here}")
    if not profile.has_accelerator:
        console.print(
            "  everything is held once, in unified memory, and computed on the GPU"
            if profile.unified_memory
            else "  everything is held and computed on the CPU: there is no accelerator"
        )
        _print_chunks(policy, workload)
        return
    console.print(f"  attention on the {policy.attention.words}; {_kv_cache(policy)}")
    dense = "projections on the GPU" if policy.resident_dense else "projections streamed"
    too = ", in prefill too" if policy.prefill_ffn is Device.CPU else ""
    in_prefill = " in prefill" if policy.ffn is Device.CPU else ""
    parts = f", streamed{in_prefill} {policy.experts_per_part} at a time" if policy.experts_per_part else ""
    console.print(
        f"  experts on the {policy.ffn.words}{too}{parts}; {_residents(estimate, spec)} stay on the GPU, "
        f"{dense}{', staged through pinned memory' if policy.staging else ''}"
    )
    _print_chunks(policy, workload)


def _print_chunks(policy: Policy, workload: Workload) -> None:
    splits = policy.prefill_chunk_tokens < workload.max_prompt_len
    console.print(
        f"  prompts are prefilled {policy.prefill_chunk_tokens} tokens at a time"
        f"{', longer ones in parts' if splits else ''}\n"
    )


def _kv_cache(policy: Policy) -> str:
    """Where the KV cache lies, and in which format if it is not the dtype."""
    on_gpu, number = policy.gpu_kv_micro_batches, policy.num_micro_batches
    form = f", in {policy.other_kv_format}" if policy.other_kv_format else ""
    if 0 < on_gpu < number:
        return f"the KV cache of {on_gpu} of {number} micro-batches on the GPU{form}"
    return f"the KV cache in {'GPU' if on_gpu else 'host'} memory{form}"


def _residents(estimate: Estimate, spec: ModelSpec) -> str:
    """How many experts of a layer are resident: `2 or 3 of 16 a layer`."""
    pairs = zip(estimate.part_policy.resident_experts, experts_of_layers(estimate.part.spec), strict=True)
    counts, most = sorted({count for count, there_are in pairs if there_are}), estimate.part.spec.num_experts
    if counts == [most]:
        return f"all {most} a layer"
    few = len(counts) <= 2
    shown = " or ".join(map(str, counts)) if few else f"{counts[0]} to {counts[-1]}"
    which = "a layer" if spec.num_expert_layers == spec.num_layers else "a layer with experts"
    return f"{shown} of {most} {which}"


def _print_prediction(estimate: Estimate, workload: Workload, ends: ThroughputRange | None, *, has_gpu: bool) -> None:
    share = estimate.tokens_per_s / estimate.bound_tokens_per_s
    what = "batch" if workload.num_requests is None else "job"
    console.print(
        f"[bold]predicted[/]  [bold green]{format_number(estimate.tokens_per_s)} tokens/s[/] generated, "
        f"{share:.0%} of {format_number(estimate.bound_tokens_per_s)}, the bound of this policy, if nothing waited"
    )
    if ends is not None and not ends.is_narrow:
        console.print(f"  {range_text(ends)}")
    phases = [("prefill", estimate.prefill, estimate.limits.prefill)]
    if workload.decode_steps:
        phases.append(("decode", estimate.decode, estimate.limits.decode))
    for name, phase, limit in phases:
        console.print(
            f"  {name:8}{format_seconds(phase.seconds):>12} a {what}, limited by "
            f"{limit.cause.phrase}{_lane_shares(phase) if has_gpu else ''}"
        )
    for line in (*launches_text(estimate), *written_out_text(estimate)):
        console.print(f"  [dim]{line}[/]")
    console.print(f"  {latency_text(estimate.latency)}")
    console.print()


def _lane_shares(phase: PhaseEstimate) -> str:
    seconds = max(phase.seconds, 1e-12)
    shares = [f"{lane.value} {s / seconds:.0%}" for lane, s in phase.lane_s.items() if s > 0]
    if phase.work.host_memory_s > 0.05 * seconds:
        shares.append(f"host memory {phase.work.host_memory_s / seconds:.0%}")
    return f"  [dim](busy: {', '.join(shares)})[/]"


def _print_stages(estimate: Estimate) -> None:
    """The stages of a pipeline that are planned one by one."""
    table = plain_table("stage", "layers", "busy", "weights on the GPU", "GPU memory")
    for stage in estimate.stages:
        gpu = stage.memory.gpu
        table.add_row(
            stage.part.profile.top.processor.name,
            str(stage.part.spec.num_layers),
            f"{stage.seconds / estimate.seconds:.0%}",
            f"{stage.policy.weight_share_on_gpu(stage.part.spec):.0%}",
            f"{format_bytes(gpu.planned_bytes)} of {format_bytes(gpu.capacity_bytes)}",
        )
    console.print(table)
    console.print()


def _print_memory(estimate: Estimate) -> None:
    of_stage = estimate.policy.parallelism is Parallelism.PIPELINE
    name = "memory of a stage" if of_stage else "memory of a rank" if estimate.part.spec.ranks > 1 else "memory"
    table = plain_table(name, "planned", "capacity", "share", "for")
    for plan in estimate.memory.levels:
        largest = sorted(plan.purposes.items(), key=lambda item: -item[1])
        parts = [f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in largest[:4]]
        more = ["…"] if len(largest) > 4 else []
        table.add_row(
            plan.name,
            format_bytes(plan.planned_bytes),
            format_bytes(plan.capacity_bytes),
            f"{plan.planned_bytes / plan.capacity_bytes:.1%}",
            ", ".join(parts + more),
        )
    console.print(table)
    console.print()


def _print_turning_points(points: dict[str, TurningPoints], estimate: Estimate) -> None:
    if not points:
        return
    policy = estimate.policy
    shares = {
        "attention": policy.kv_share_on_gpu,
        "ffn": float(estimate.part_policy.resident_experts == experts_of_layers(estimate.part.spec)),
    }
    table = plain_table("turning points", "intensity", "P1", "P2", "balance", "")
    for name, point in points.items():
        numbers = (point.intensity, point.p1, point.p2, point.balance)
        verdict = "all of its data lies on the GPU" if shares[name] == 1 else point.verdict
        table.add_row(name, *(format_number(number) for number in numbers), verdict)
    console.print(table)
    console.print("[dim]  FLOPs a byte of the data that lies on the host[/]\n")
