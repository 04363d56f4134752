"""How a plan is shown: for people as tables, for scripts as one JSON object."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from hrm.cli.console import console
from hrm.estimate import LIMIT_WORDS, Estimate, PhaseEstimate
from hrm.hardware import HardwareProfile
from hrm.memory import LevelPlan
from hrm.model_spec import ModelSpec
from hrm.policy import Parallelism, Policy
from hrm.roofline import TurningPoints, attention_turning_points, ffn_turning_points
from hrm.search.result import SearchResult
from hrm.tasks import Device
from hrm.units import counted, format_bytes, format_count, format_seconds
from hrm.workload import Workload

_EVALUATED = {
    "exhaustive": "policies in closed form",
    "milp": "corners of boxes in closed form",
    "optuna": "trials in the study",
    "none": "policies",
}


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object and nothing else."""
    print(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())


def policy_json(policy: Policy, spec: ModelSpec) -> dict[str, Any]:
    """The policy's fields and the paper's six-tuple."""
    n, mu, a_g, f_g, r_w, r_c = policy.paper_tuple(spec)
    six = {"N": n, "mu": mu, "A_g": a_g, "F_g": f_g, "r_w": r_w, "r_c": r_c}
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
            "prefill": estimate.prefill.bottleneck.value,
            "decode": estimate.decode.bottleneck.value,
        },
        "lane_s": {
            phase: {lane.value: seconds for lane, seconds in of_phase.lane_s.items()}
            for phase, of_phase in (("prefill", estimate.prefill), ("decode", estimate.decode))
        },
        "host_memory_s": {
            "prefill": estimate.prefill.host_memory_s,
            "decode": estimate.decode.host_memory_s,
        },
        "all_reduce_s": {
            "prefill": estimate.prefill.all_reduce_s,
            "decode": estimate.decode.all_reduce_s,
        },
        "requests": estimate.num_requests,
        "batches": estimate.num_batches,
    }


def memory_json(plan: LevelPlan) -> dict[str, Any]:
    """Capacity and planned bytes by purpose at one level."""
    return {
        "capacity_bytes": plan.capacity_bytes,
        "planned_bytes": {**plan.purposes, "total": plan.planned_bytes},
    }


def plan_json(
    estimate: Estimate, spec: ModelSpec, profile: HardwareProfile, workload: Workload,
    search: SearchResult | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one plan."""
    levels = {plan.name: memory_json(plan) for plan in _levels(estimate, profile)}
    points = _turning_points(estimate, spec, profile, workload)
    content: dict[str, Any] = {
        "policy": policy_json(estimate.policy, spec),
        "predicted": predicted_json(estimate),
        "memory": levels,
        "turning_points": {
            name: {**asdict(point), "verdict": point.verdict} for name, point in points.items()
        },
        "machine": profile.name,
        "model": spec.name,
        "workload": workload,
    }
    if search is not None:
        content["search"] = {
            "solver": search.solver,
            "seconds": search.seconds,
            "evaluations": search.evaluations,
            "outcome": search.outcome.name.lower(),
            "gap": search.gap,
            "simulated": search.simulated,
            "certified": search.certified,
        }
        content["parallelism"] = [
            {
                "parallelism": way.parallelism.value,
                "tokens_per_s": None if way.best is None else way.best.tokens_per_s,
                "obstacle": way.obstacle,
            }
            for way in search.ways
        ]
        content["runner_ups"] = [
            {"policy": policy_json(e.policy, spec), "predicted": predicted_json(e)}
            for e in search.runner_ups
        ]
    return content


def _levels(estimate: Estimate, profile: HardwareProfile) -> list[LevelPlan]:
    plans = [estimate.memory.gpu, estimate.memory.cpu]
    return plans if profile.has_accelerator else plans[:1]


def _turning_points(
    estimate: Estimate, spec: ModelSpec, profile: HardwareProfile, workload: Workload
) -> dict[str, TurningPoints]:
    if not profile.has_accelerator:
        return {}
    policy = estimate.policy
    context = workload.prompt_len + workload.gen_len / 2
    return {
        "attention": attention_turning_points(profile, spec, policy.dtype, context=context),
        "ffn": ffn_turning_points(
            profile, spec, policy.dtype, batch_size=policy.batch_size,
            micro_batch_size=policy.micro_batch_size,
        ),
    }  # fmt: skip


def print_plan(
    estimate: Estimate, spec: ModelSpec, profile: HardwareProfile, workload: Workload,
    search: SearchResult | None = None,
) -> None:  # fmt: skip
    """Print a plan for people."""
    policy = estimate.policy
    console.print(
        f"[bold]{spec.name}[/] ({format_count(spec.parameters)} parameters, {policy.dtype}) on "
        f"[bold]{profile.name}[/]{_kind_of_machine(profile)}"
    )
    if warnings := profile.environment.get("warnings"):
        console.print(f"[yellow]the profile warns:[/] {warnings}")
    requests = "without end" if workload.num_requests is None else str(workload.num_requests)
    console.print(
        f"workload {workload.name}: prompts of {workload.prompt_len:g} tokens on average and "
        f"{workload.max_prompt_len} at most, {workload.gen_len} generated, requests {requests}\n"
    )
    _print_policy(policy, spec, workload, has_gpu=profile.has_accelerator)
    _print_prediction(estimate, workload, has_gpu=profile.has_accelerator)
    _print_memory(estimate, profile)
    _print_turning_points(_turning_points(estimate, spec, profile, workload))
    if search is not None:
        _print_ways(search, spec)
        _print_search(search, spec, has_gpu=profile.has_accelerator)


def _kind_of_machine(profile: HardwareProfile) -> str:
    match profile.accelerator:
        case "catalog":
            return " (from the catalog: not measured)"
        case "emulated":
            return " (the accelerator is emulated)"
        case _:
            return ""


def _print_policy(policy: Policy, spec: ModelSpec, workload: Workload, *, has_gpu: bool) -> None:
    n, mu, a_g, f_g, r_w, r_c = policy.paper_tuple(spec)
    console.print(
        f"[bold]policy[/]  (N, μ, A_g, F_g, r_w, r_c) = "
        f"({n}, {mu}, {a_g}, {f_g}, {r_w:.3f}, {r_c:.3f}), schedule {policy.schedule.value}"
    )
    batches = f"{counted(policy.num_micro_batches, 'micro-batch')} of {policy.micro_batch_size}"
    console.print(f"  {policy.batch_size} requests a batch in {batches}")
    if policy.parallelism is Parallelism.PIPELINE:
        stage = f"{len(policy.resident_experts)} of {spec.num_layers} layers"
        console.print(f"  in each stage of a pipeline ({stage}), as many batches at once as stages")
    if not has_gpu:
        console.print("  everything is held and computed on the CPU: there is no accelerator\n")
        return
    kv = (
        f"the KV cache of {policy.gpu_kv_micro_batches} of {policy.num_micro_batches} micro-batches"
    )
    console.print(f"  attention on the {_word(policy.attention)}; {kv} on the GPU")
    low, high = min(policy.resident_experts), max(policy.resident_experts)
    count = f"{low}" if low == high else f"{low} or {high}"
    dense = "projections on the GPU" if policy.resident_dense else "projections streamed"
    console.print(
        f"  experts on the {_word(policy.ffn)}; {count} of {spec.num_experts} a layer stay on the "
        f"GPU, {dense}{', staged through pinned memory' if policy.staging else ''}"
    )
    splits = policy.prefill_chunk_tokens < workload.max_prompt_len
    console.print(
        f"  prompts are prefilled {policy.prefill_chunk_tokens} tokens at a time"
        f"{', longer ones in parts' if splits else ''}\n"
    )


def _limit(phase: PhaseEstimate, *, has_gpu: bool) -> str:
    """The bottleneck of a phase in words."""
    return LIMIT_WORDS[phase.bottleneck] if has_gpu else "CPU, which does everything"


def _word(device: Device) -> str:
    return "GPU" if device is Device.GPU else "CPU"


def _print_prediction(estimate: Estimate, workload: Workload, *, has_gpu: bool) -> None:
    share = estimate.tokens_per_s / estimate.bound_tokens_per_s
    what = "batch" if workload.num_requests is None else "job"
    console.print(
        f"[bold]predicted[/]  [bold green]{estimate.tokens_per_s:.4g} tokens/s[/] generated, "
        f"{share:.0%} of the bound {estimate.bound_tokens_per_s:.4g}"
    )
    for name, phase in (("prefill", estimate.prefill), ("decode", estimate.decode)):
        console.print(
            f"  {name:8}{format_seconds(phase.seconds):>12} a {what}, limited by the "
            f"{_limit(phase, has_gpu=has_gpu)}{_lane_shares(phase) if has_gpu else ''}"
        )
    console.print()


def _lane_shares(phase: PhaseEstimate) -> str:
    seconds = max(phase.seconds, 1e-12)
    shares = [f"{lane.value} {s / seconds:.0%}" for lane, s in phase.lane_s.items() if s > 0]
    if phase.host_memory_s > 0.05 * seconds:
        shares.append(f"host memory {phase.host_memory_s / seconds:.0%}")
    return f"  [dim](busy: {', '.join(shares)})[/]"


def _print_memory(estimate: Estimate, profile: HardwareProfile) -> None:
    table = Table("memory", "planned", "capacity", "share", "for", box=None, pad_edge=False)
    for plan in _levels(estimate, profile):
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


def _print_turning_points(points: dict[str, TurningPoints]) -> None:
    if not points:
        return
    table = Table(
        "turning points", "intensity", "P1", "P2", "balance", "", box=None, pad_edge=False
    )
    for name, point in points.items():
        numbers = (point.intensity, point.p1, point.p2, point.balance)
        table.add_row(name, *(f"{number:.4g}" for number in numbers), point.verdict)
    console.print(table)
    console.print("[dim]  FLOPs a byte of the data that lies on the host[/]\n")


def _print_search(search: SearchResult, spec: ModelSpec, *, has_gpu: bool) -> None:
    if search.runner_ups:
        table = Table(
            "runner-up (N, μ, A_g, F_g, r_w, r_c)", "tokens/s", "decode limited by",
            box=None, pad_edge=False,
        )  # fmt: skip
        for estimate in search.runner_ups:
            n, mu, a_g, f_g, r_w, r_c = estimate.policy.paper_tuple(spec)
            table.add_row(
                f"({n}, {mu}, {a_g}, {f_g}, {r_w:.3f}, {r_c:.3f})",
                f"{estimate.tokens_per_s:.4g}",
                _limit(estimate.decode, has_gpu=has_gpu),
            )
        console.print(table)
    console.print(
        f"[dim]{search.solver} search: {search.evaluations:,} {_EVALUATED[search.solver]}, "
        f"{search.simulated} of them simulated, in {search.seconds:.2f} s; {_why(search)}[/]"
    )


def _print_ways(search: SearchResult, spec: ModelSpec) -> None:
    """How several GPUs share the work, how they could, and why not so."""
    if not search.ways or search.best is None:
        return
    chosen = search.best.policy.parallelism
    table = Table("several GPUs", "tokens/s", "why", box=None, pad_edge=False)
    for way in sorted(search.ways, key=lambda way: way.parallelism is not chosen):
        name = f"{way.parallelism.value} parallel{' (chosen)' if way.parallelism is chosen else ''}"
        if way.best is None:
            table.add_row(name, "–", way.obstacle or "no policy fits so")
        else:
            rate = f"{way.best.tokens_per_s:.4g}"
            table.add_row(name, rate, _about_way(way.parallelism, way.best, spec))
    console.print(table)
    console.print()


def _about_way(parallelism: Parallelism, best: Estimate, spec: ModelSpec) -> str:
    phase = best.decode
    limit = LIMIT_WORDS[phase.bottleneck]
    share = best.policy.weight_share_on_gpu(spec)
    held = f"{share:.0%} of the weights stay on the GPUs"
    if parallelism is Parallelism.PIPELINE:
        return f"{held}, each link moves whole layers; decode limited by the {limit}"
    reduced = (best.prefill.all_reduce_s + phase.all_reduce_s) / best.seconds
    return f"{held}, all-reduces take {reduced:.0%} of the time; decode limited by the {limit}"


def _why(search: SearchResult) -> str:
    """Why the chosen policy is the best, in words."""
    if search.gap < 0.0005:
        return search.outcome.value
    higher = search.gap / (1 - search.gap)
    return (
        f"the closed form of another is {higher:.2g} times" if higher >= 1
        else f"the closed form of another is {higher:.1%}"
    ) + " higher, but simulated, with its waits, it is slower"  # fmt: skip


def print_run_command(model: str, out: Path | None, *, is_folder: bool) -> None:
    """Print the command that runs the policy, and what is missing for it."""
    path = out if out is not None else Path("policy.json")
    folder = model if is_folder else "FOLDER-WITH-WEIGHTS"
    hint = "" if out is not None else "   [dim](after adding --out policy.json here)[/]"
    console.print(
        f"\nrun it:  executor run --model {folder} --policy {path} --input prompts.jsonl "
        f"--output-dir run/{hint}"
    )
