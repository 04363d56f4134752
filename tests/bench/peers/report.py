"""Tables of what the turns found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from hrm.formats import FORMATS
from hrm.model_spec import ModelSpec, spec_from_hf_config
from hrm.units import GB
from tests.bench.peers.setting import OURS, ROOFS, TRANSFORMERS, Row, Setting
from tests.bench.peers.turns import Outcome

GOAL: Final = 1.2  # times the best peer
GFLOP: Final = 1e9
HEADINGS: Final = (
    f"  {'':<14}{'tokens/s':>9}{'least':>8}{'most':>8}{'ours is':>9}{'by cores':>9}{'of bound':>9}"
    f"{'prefill/s':>10}{'of GEMM':>8}{'step':>10}{'of read':>8}{'equal':>7}{'safe':>7}{'others':>7}"
)


@dataclass(frozen=True, slots=True)
class Timings:
    """An engine's turns at one row, by repeat, and the answers of its first.

    Seconds on the wall, in all and of prefill; seconds of all cores together; and the share of the machine that others
    had meanwhile.
    """

    seconds: dict[int, float]
    prefill_s: dict[int, float]
    processor_s: dict[int, float]
    others: dict[int, float]
    tokens: list[list[int]]

    def step_s(self, row: Row) -> float | None:
        """A decode step's median, which is what tokens after the first took.

        None if there is one token, or if prefill alone, timed by itself, took longer than all.
        """
        if row.new_tokens == 1:
            return None
        seconds = median((self.seconds[at] - self.prefill_s[at]) / (row.new_tokens - 1) for at in self.seconds)
        return seconds if seconds > 0 else None


def timings(outcomes: Sequence[Outcome], row: Row) -> dict[str, Timings]:
    """Every engine that got through the row at least once; the outcomes are of one model."""
    found: dict[str, Timings] = {}
    for outcome in outcomes:
        turn = outcome.turn
        if turn.engine == ROOFS or outcome.failed:
            continue
        figures = outcome.found["rows"][str(row)]
        of = found.setdefault(turn.engine, Timings({}, {}, {}, {}, figures["tokens"]))
        of.seconds[turn.repeat], of.prefill_s[turn.repeat] = figures["seconds"], figures["prefill_s"]
        of.processor_s[turn.repeat], of.others[turn.repeat] = figures["processor_s"], figures["others"]
    return found


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """How many times our seconds theirs are: the median over repeats that both have, so that drift falls out.

    Repeats of which the system has counted no tick of ours say nothing; None if there are no others.
    """
    both = [repeat for repeat in ours.keys() & theirs.keys() if ours[repeat] > 0]
    return median(theirs[repeat] / ours[repeat] for repeat in both) if both else None


def equal_share(ours: list[list[int]], theirs: list[list[int]], lengths: Sequence[int] | None = None) -> float | None:
    """The share of tokens that are equal, of each answer's first `lengths` or of all; None of no token."""
    pairs = [
        a == b
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True))
        for a, b in list(zip(mine, other, strict=True))[: None if lengths is None else lengths[index]]
    ]
    return sum(pairs) / len(pairs) if pairs else None


def step_bytes(spec: ModelSpec, requests: int) -> float:
    """Bytes of bfloat16 weights that a decode step has to read: experts as often as they are expected to be hit."""
    experts = spec.num_expert_layers * float(spec.experts_hit(requests)) * spec.expert_parameters
    dense = sum(count * kind.dense_parameters for kind, count in spec.layer_kinds().items())
    return float(FORMATS["bfloat16"].bytes_of(experts + dense + spec.head_parameters))


def prefill_flops(spec: ModelSpec, row: Row, prompt_len: int) -> float:
    """FLOPs of a prefill's matrices: all layers for all tokens, the head for the last ones; attention is left out."""
    in_layers = (
        spec.active_parameters - spec.head_parameters - (0 if spec.tied_embeddings else spec.embedding_parameters)
    )
    return 2.0 * row.requests * (prompt_len * in_layers + spec.head_parameters)


def tables(setting: Setting, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A table for each model and row, then what failed."""
    if setting.small:
        yield "scale small: a rehearsal, no figure says anything"
    for model in setting.models:
        of_model = [outcome for outcome in outcomes if outcome.turn.model == model]
        spec = spec_from_hf_config(setting.scale.configs[model], model)
        yield (
            f"\n{setting.scale.folders[model]}, {spec.parameters / 1e9:.2f} billion parameters, bfloat16, "
            f"prompts of {setting.scale.prompt_len} tokens"
        )
        yield from _roof_lines(of_model)
        for row in setting.rows:
            if timings(of_model, row):
                yield from _table(setting, spec, of_model, row)
    yield from (f"{o.turn.engine} on {o.turn.model} is left out: {o.failed}" for o in outcomes if o.failed)


def _of(outcomes: Sequence[Outcome], engine: str) -> list[dict[str, Any]]:
    """What an engine's turns found."""
    return [outcome.found for outcome in outcomes if outcome.turn.engine == engine and not outcome.failed]


def _roof_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    found = _of(outcomes, ROOFS)
    for name, what, unit, size in (
        ("gemm_flops_per_s", "bfloat16 GEMM", "GFLOP/s", GFLOP),
        ("read_bytes_per_s", "reading memory", "GB/s", float(GB)),
    ):
        figures = [roofs[name] / size for roofs in found]
        if figures:
            spread = f"{min(figures):.4g} to {max(figures):.4g}"
            yield f"  {what}: {median(figures):.4g} {unit} ({spread}, {len(figures)} times among the turns)"


def _table(setting: Setting, spec: ModelSpec, outcomes: Sequence[Outcome], row: Row) -> Iterator[str]:
    found, facts = timings(outcomes, row), _facts(outcomes, row)
    yield f"\n  {row.requests} requests × {row.new_tokens} new tokens"
    yield HEADINGS
    for engine in sorted(found, key=lambda name: median(found[name].seconds.values())):
        yield _line(setting, spec, row, found, engine, facts)
    if "policy" in facts:
        yield f"  HRM's bound {facts['bound_tokens_per_s']:.1f}, its prediction {facts['predicted_tokens_per_s']:.1f}"
        yield f"  policy: {facts['policy']}"
    ratios = {name: _times(found, name) for name in found}
    known = {name: value for name, value in ratios.items() if value is not None}
    if known:
        best = min(known, key=known.__getitem__)
        yield f"  ours is {known[best]:.2f} times the best peer, {best} (goal {GOAL})"


def _times(found: dict[str, Timings], engine: str) -> float | None:
    """How many times an engine's speed ours is; None if it is ours."""
    return ratio(found[OURS].seconds, found[engine].seconds) if OURS in found and engine != OURS else None


def _facts(outcomes: Sequence[Outcome], row: Row) -> dict[str, Any]:
    """The roofs, what ours told of its row, and transformers of its answers: medians of numbers, else the first."""
    facts: dict[str, Any] = {}
    for turns in (
        _of(outcomes, ROOFS),
        [found["rows"][str(row)]["facts"] for found in _of(outcomes, OURS)],
        [found["rows"][str(row)]["facts"] for found in _of(outcomes, TRANSFORMERS)],
    ):
        for name, first in turns[0].items() if turns else ():
            facts[name] = median(turn[name] for turn in turns) if isinstance(first, float) else first
    return facts


def _line(
    setting: Setting, spec: ModelSpec, row: Row, found: dict[str, Timings], engine: str, facts: dict[str, Any]
) -> str:
    its, ours, prompt_len = found[engine], found.get(OURS), setting.scale.prompt_len
    rates = sorted(row.tokens / seconds for seconds in its.seconds.values())
    prefill_s, step_s = median(its.prefill_s.values()), its.step_s(row)
    by_cores = equal = safe = None
    if ours is not None and engine != OURS:
        by_cores = ratio(ours.processor_s, its.processor_s)
        equal = equal_share(ours.tokens, its.tokens)
        safe = equal_share(ours.tokens, its.tokens, facts["safe"]) if "safe" in facts else None
    of_gemm = _share(prefill_flops(spec, row, prompt_len) / prefill_s, facts.get("gemm_flops_per_s"))
    of_read = _share(step_bytes(spec, row.requests) / step_s, facts.get("read_bytes_per_s")) if step_s else None
    return (
        f"  {engine:<14}{median(rates):>9.1f}{rates[0]:>8.1f}{rates[-1]:>8.1f}"
        f"{_multiple(_times(found, engine)):>9}{_multiple(by_cores):>9}"
        f"{_percent(_share(median(rates), facts.get('bound_tokens_per_s'))):>9}"
        f"{row.requests * prompt_len / prefill_s:>10.0f}{_percent(of_gemm):>8}"
        f"{f'{1e3 * step_s:.1f} ms' if step_s else '–':>10}{_percent(of_read):>8}"
        f"{_percent(equal):>7}{_percent(safe):>7}{_percent(median(its.others.values())):>7}"
    )


def _share(figure: float, roof: float | None) -> float | None:
    return figure / roof if roof else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _multiple(times: float | None) -> str:
    return "" if times is None else f"{times:.2f} ×"
