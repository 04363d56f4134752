"""How a report tells what limits a plan, and what launches cost where they limit it."""

from dataclasses import replace
from typing import Any, Final

from hrm.causes import Cause, spent_of
from hrm.estimate import Estimate
from hrm.launches import Launches, launches_of
from hrm.units import format_number, format_seconds

_NOTICED: Final = 1.01  # times as fast


def launches_text(estimate: Estimate) -> list[str]:
    """Lines about the launches that limit a phase; none if none do."""
    return [line for launches in launches_of(estimate) for line in _lines(launches)]


def _lines(launches: Launches) -> list[str]:
    what = "GPU kernels" if launches.cause is Cause.GPU_LAUNCHES else "CPU operators"
    each = f"{format_seconds(launches.latency_s.value)} each ({launches.latency_s.source.value})"
    free = f"{format_number(launches.free_tokens_per_s)} without launch costs (CUDA graphs)"
    fused = ""
    if launches.fused_count is not None and launches.fused_tokens_per_s is not None:
        rate = format_number(launches.fused_tokens_per_s)
        fused = f"{rate} tokens/s with fused kernels ({launches.fused_count:,.0f} launches), "
    share = f"{launches.share:.0%} of the time"
    return [
        f"this executor launches {launches.count:,.0f} {what} at {each}, {share}",
        f"other engines with this policy: {fused}{free}",
    ]


def written_out_text(estimate: Estimate) -> list[str]:
    """A line about packed weights that a GPU writes out as plain numbers first, if that is what takes its time."""
    costs = estimate.costs
    told = estimate.limits.prefill.cause, estimate.limits.decode.cause
    if not costs.spec.packing or Cause.GPU_MEMORY not in told or Cause.GPU_LAUNCHES in told:
        return []
    fused = estimate.changed(replace(costs, runtime=replace(costs.runtime, fused_kernels=True)))
    if fused.tokens_per_s < _NOTICED * estimate.tokens_per_s:
        return []
    return [
        "this executor's GPU writes packed weights out as plain numbers before it multiplies by them",
        f"other engines with this policy: {format_number(fused.tokens_per_s)} tokens/s with fused kernels",
    ]


def launches_json(estimate: Estimate) -> dict[str, Any]:
    """The same for scripts, by cause."""

    def content(launches: Launches) -> dict[str, Any]:
        fused = launches.fused_count
        return {
            "count": round(launches.count),
            "latency_s": launches.latency_s.value,
            "source": launches.latency_s.source.value,
            "share": launches.share,
            "fused_kernels": {
                "count": None if fused is None else round(fused),
                "tokens_per_s": launches.fused_tokens_per_s,
            },
            "without_launch_costs": {"tokens_per_s": launches.free_tokens_per_s},
        }

    return {launches.cause.value: content(launches) for launches in launches_of(estimate)}


def limits_json(estimate: Estimate) -> dict[str, Any]:
    """Seconds of every lane by cause, and what each cause would save at half its cost."""
    limits = (("prefill", estimate.limits.prefill), ("decode", estimate.limits.decode))
    spent = spent_of(estimate.costs, estimate.turns, estimate.workload)
    return {
        phase: {
            "cause": limit.cause.value,
            "spent_s": of_phase,
            "waiting_s": limit.waiting_s,
            "saved_at_half_the_cost_s": limit.saved_s,
        }
        for (phase, limit), of_phase in zip(limits, spent, strict=True)
    }
