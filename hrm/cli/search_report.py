"""What a search says beside its plan: how several GPUs could share the work, what came next, and how good it is."""

import math

from hrm.causes import Limit
from hrm.cli.console import console, plain_table
from hrm.estimate import Estimate
from hrm.policy import PAPER_SYMBOLS, Parallelism
from hrm.search.choose import TIE
from hrm.search.result import SearchResult, Way
from hrm.units import format_number


def print_search(search: SearchResult) -> None:
    """Print the policies that came next, how many were looked at, and how good the chosen one is."""
    if search.runner_ups:
        phase, _ = _last_limit(search.runner_ups[0])
        table = plain_table(f"runner-up {PAPER_SYMBOLS}", "tokens/s", f"{phase} limited by")
        for estimate in search.runner_ups:
            table.add_row(
                str(estimate.paper_tuple), format_number(estimate.tokens_per_s), _last_limit(estimate)[1].cause.value
            )
        console.print(table)
        if search.best is not None and any(e.tokens_per_s > search.best.tokens_per_s for e in search.runner_ups):
            console.print(f"[dim]  of policies that are equally fast to {TIE:.1%} the smallest batch is chosen[/]")
    console.print(
        f"[dim]{search.solver} search: {search.evaluations:,} {search.evaluates}, "
        f"{search.simulated} of them simulated, in {search.seconds:.2f} s; {_why(search)}[/]"
    )


def print_ways(search: SearchResult) -> None:
    """How several GPUs share the work, how they could, and why not so."""
    if not search.ways or search.best is None:
        return
    chosen = search.best.policy
    table = plain_table("several GPUs", "tokens/s", "why")
    for way in sorted(search.ways, key=lambda way: not way.is_of(chosen)):
        name = f"{_way_text(way)}{' (chosen)' if way.is_of(chosen) else ''}"
        at_most = (
            f"≤ {format_number(way.at_most_tokens_per_s)}" if way.at_most_tokens_per_s and not way.is_of(chosen) else ""
        )
        if way.best is not None:
            table.add_row(name, f"{format_number(way.best.tokens_per_s)} {at_most}".strip(), _about_way(way, way.best))
        elif at_most:
            table.add_row(name, at_most, "too little to gain, by a bound on all policies so")
        else:
            table.add_row(name, "–", way.obstacle or "no policy fits so")
    console.print(table)
    console.print()


def _way_text(way: Way) -> str:
    """How the work is shared, and by which GPUs if not by all."""
    if not way.gpus:
        return way.words
    return f"{gpus_text(way.gpus)} alone{f', {way.words}' if len(way.gpus) > 1 else ''}"


def gpus_text(gpus: tuple[int, ...]) -> str:
    """Which GPUs: `GPUs 0, 2`."""
    return f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(map(str, gpus))}"


def _last_limit(best: Estimate) -> tuple[str, Limit]:
    """What limits decode, or prefill where that generates the only token."""
    if best.decode.seconds:
        return "decode", best.limits.decode
    return "prefill", best.limits.prefill


def _about_way(way: Way, best: Estimate) -> str:
    name, limits = _last_limit(best)
    limit = f"{name} limited by {limits.cause.phrase}"
    held = f"{best.weight_share_on_gpu:.0%} of the weights stay on the GPUs"
    if len(way.gpus) == 1:
        return f"{held}; {limit}"
    if way.parallelism is Parallelism.PIPELINE:
        return f"{held}, each link moves whole layers; {limit}"
    reduced = (best.prefill.work.all_reduce_s + best.decode.work.all_reduce_s) / best.seconds
    return f"{held}, all-reduces take {reduced:.0%} of the time; {limit}"


def _why(search: SearchResult) -> str:
    """How good the chosen policy is, in words."""
    if math.isinf(search.bound_tokens_per_s):  # with limits on waiting times, or of unequal GPUs
        return f"{search.outcome.value}; there is no bound to hold it against"
    bound = f"no policy at all can exceed {format_number(search.bound_tokens_per_s)} tokens/s"
    if search.gap < 0.0005:
        return f"{search.outcome.value}: {bound}"
    return f"{search.outcome.value}, to within {search.gap:.1%}: {bound}"
