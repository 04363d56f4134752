"""What every task reads and writes, told from first principles and not from hrm's edges.

A buffer holds one version of its content at a time. Weight slots, slots for parts of experts, KV
buffers, staging pages and prefill buffers are used in turn, in the order in which the loads into them
are issued. A reader needs every part that it reads to be written before, and nobody may write the
next version before all that is done with this one has ended.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from hrm.schedules import Pipeline
from hrm.tasks import Lane, Phase, Task, TaskId
from hrm.trace import Trace

Buffer = tuple[str, *tuple[int, ...]]
Part = tuple[Buffer, int, int]  # a buffer, the version of its content, and a part of that

TWO = 2  # weight slots, slots for parts, KV buffers and prefill buffers
RING = 4  # staging pages
FROM_PREFILL = ("host_kv", "token")  # filled before the first decode step


@dataclass
class Use:
    reads: list[Part] = field(default_factory=list)
    writes: list[Part] = field(default_factory=list)


def uses(pipeline: Pipeline, tasks: Iterable[Task]) -> dict[TaskId, Use]:
    """Reads and writes of all tasks, which come in their order of issue."""
    decode = pipeline.phase is Phase.DECODE
    walk = _decode_uses(pipeline, tasks) if decode else _prefill_uses(pipeline, tasks)
    return dict(walk)


class _Turns:
    """Gives every key the next number; buffers are used in turn by these."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.number = name, count, {}

    def __call__(self, *key: int) -> tuple[Buffer, int]:
        number = self.number.setdefault(key, len(self.number))
        return (self.name, number % self.count), number


def _pages(p: Pipeline, slot: tuple[Buffer, int], pages: int) -> list[Part]:
    return [(*slot, page) for page in range(pages)]


def _piece(part: Part, piece: int) -> Part:
    """What several ranks make of it: sums, and parts with attention's output."""
    return (*part[:2], piece)


def _page_use(x: TaskId, slots: _Turns, ring: _Turns, *, staging: bool) -> Use:
    staged = (*ring(x.step, x.layer, x.index), 0) if staging else None
    if x.act.name == "STAGE_PAGE":
        assert staged is not None
        return Use(writes=[staged])
    return Use(reads=[staged] if staged else [], writes=[(*slots(x.step, x.layer), x.index)])


def _part_use(p: Pipeline, x: TaskId, parts: _Turns, slots: _Turns, hidden: Callable[[int], Part]) -> Use:
    """What loads and computes a part of experts: beside it the layer's other weights, as norms may follow."""
    part = (*parts(x.step, x.layer, x.index), 0)
    if x.act.name == "LOAD_PART":
        return Use(writes=[part])
    others = _pages(p, slots(x.step, x.layer), p.num_pages) if p.streamed[x.layer] else []
    return Use([part, *others], [hidden(x.index // p.parts[x.layer])])


def _decode_uses(p: Pipeline, tasks: Iterable[Task]) -> Iterator[tuple[TaskId, Use]]:
    parts = _Turns("part_slot", TWO)
    slots, ring, kv = _Turns("slot", TWO), _Turns("ring", RING), _Turns("kv_buffer", TWO)
    layers = p.num_layers

    def has_state(layer: int) -> bool:
        return any(p.states) and p.states[layer]

    for task in tasks:
        x = task.id
        t, i, j = x.step, x.layer, x.index
        at = t * layers + i

        def each(name: str, version: int = at, micro_batch: int = j) -> Part:
            return (name, micro_batch), version, 0

        hidden = each("hidden", t * (layers + 1) + i)
        hidden_after = each("hidden", t * (layers + 1) + i + 1)
        match x.act.name:
            case "EMBED":
                use = Use([each("token", t)], [hidden])
            case "REDUCE_HIDDEN":
                use = Use([hidden], [_piece(hidden, 1)])
                if i > 0 and p.cpu_experts[i - 1]:
                    use.reads.append(each("expert_output", at - 1))
            case "PRE_ATTENTION" if p.ranks > 1:
                use = Use([_piece(hidden, 1)], [each("qkv")])
                if p.streamed[i]:
                    use.reads += _pages(p, slots(t, i), p.dense_pages)
            case "PRE_ATTENTION":
                use = Use([hidden], [each("qkv")])
                if i > 0 and p.cpu_experts[i - 1]:
                    use.reads.append(each("expert_output", at - 1))
                if p.streamed[i]:
                    use.reads += _pages(p, slots(t, i), p.dense_pages)
            case "OFFLOAD_QKV":
                use = Use([each("qkv")], [each("host_qkv")])
            case "STORE_KV":
                stored = (*kv(t, i, j), 1) if has_state(i) else each("qkv")
                use = Use([stored], [(("host_kv", i, j), t + 1, 0)])
            case "LOAD_KV":
                use = Use([(("host_kv", i, j), t, 0)], [(*kv(t, i, j), 0)])
            case "ATTENTION" if task.lane is Lane.CPU:
                use = Use([each("host_qkv")], [each("host_output")])
            case "ATTENTION":
                use = Use([each("qkv")], [each("output")])
                if not p.kv_on_gpu[j]:
                    use.reads.append((*kv(t, i, j), 0))
                    if has_state(i):
                        use.writes.append((*kv(t, i, j), 1))
            case "LOAD_HIDDEN":
                use = Use([each("host_output")], [each("output")])
            case "OUTPUT_PROJECTION":
                use = Use([each("output"), _piece(hidden, 1)], [_piece(hidden, 2)])
                if p.streamed[i]:
                    use.reads += _pages(p, slots(t, i), p.dense_pages)
            case "REDUCE_ATTENTION":
                use = Use([_piece(hidden, 2)], [_piece(hidden, 3)])
            case "POST_ATTENTION":
                use = Use([_piece(hidden, 3)] if p.ranks > 1 else [each("output"), hidden], [hidden_after])
                if p.cpu_experts[i]:
                    use.writes.append(each("tokens"))
                if p.streamed[i]:
                    use.reads += _pages(p, slots(t, i), p.num_pages)
            case "LOAD_PART" | "PART_EXPERTS":
                version = t * (layers + 1) + i + 1
                use = _part_use(p, x, parts, slots, lambda j, version=version: (("hidden", j), version, 0))
            case "OFFLOAD_TOKENS":
                use = Use([each("tokens")], [each("host_tokens")])
            case "CPU_EXPERTS":
                use = Use([each("host_tokens")], [each("host_expert_output")])
            case "LOAD_EXPERT_OUTPUT":
                use = Use([each("host_expert_output")], [each("expert_output")])
            case "REDUCE_LAST":
                use = Use([hidden_after], [_piece(hidden_after, 1)])
                if p.cpu_experts[i]:
                    use.reads.append(each("expert_output"))
            case "SAMPLE" if p.ranks > 1:
                use = Use([_piece(hidden_after, 1)], [each("token", t + 1)])
            case "SAMPLE":
                use = Use([hidden_after], [each("token", t + 1)])
                if p.cpu_experts[i]:
                    use.reads.append(each("expert_output"))
            case _:
                use = _page_use(x, slots, ring, staging=p.staging)
        yield x, use


def _prefill_uses(p: Pipeline, tasks: Iterable[Task]) -> Iterator[tuple[TaskId, Use]]:
    parts = _Turns("part_slot", TWO)
    slots, ring, chunk = _Turns("slot", TWO), _Turns("ring", RING), _Turns("prefill_hidden", TWO)
    for task in tasks:
        x = task.id
        i, g = x.layer, x.index
        if x.act.name in {"LOAD_PAGE", "STAGE_PAGE"}:
            yield x, _page_use(x, slots, ring, staging=p.staging)
            continue
        if x.act.name in {"LOAD_PART", "PART_EXPERTS"}:
            yield x, _part_use(p, x, parts, slots, lambda g, i=i: (*chunk(i, g), 1))
            continue
        buffer, number = chunk(i, g)
        before, after = (buffer, number, 0), (buffer, number, 1)
        kv: Part = ("prefill_kv", number % TWO), number, 0
        on_host: Buffer = ("host_hidden", g)
        routed, host_routed = ("routed", number % TWO), ("host_routed", number % TWO)
        added = (on_host, i + 1, 1)  # with the CPU's experts
        # At worst a prompt goes on from every chunk to the next, and each part reads those before.
        prefix, so_far = ("prefix",), i * p.num_micro_batches + g
        match x.act.name:
            case "EMBED":
                use = Use(writes=[before])
            case "LOAD_HIDDEN":
                use = Use([(on_host, i, int(p.cpu_experts[i - 1]))], [before])
            case "REDUCE_HIDDEN":
                use = Use([before], [_piece(before, 2)])
            case "PREFILL_ATTENTION":
                attended = _piece(before, 3)
                use = Use([_piece(before, 2)], [attended] if p.kv_on_gpu[g] else [attended, kv])
                use.writes.append((prefix, so_far, 0))
                if g > 0:
                    use.reads.append((prefix, so_far - 1, 0))
                if p.streamed[i]:
                    use.reads += _pages(p, slots(0, i), p.dense_pages)
            case "REDUCE_ATTENTION":
                use = Use([_piece(before, 3)], [_piece(before, 4)])
            case "PREFILL_LAYER" if p.ranks > 1:
                use = Use([_piece(before, 4)], [after])
                if p.streamed[i]:
                    use.reads += _pages(p, slots(0, i), p.num_pages)
                if p.cpu_experts[i]:
                    use.writes.append((routed, number, 0))
            case "PREFILL_LAYER":
                use = Use([before], [after] if p.kv_on_gpu[g] else [after, kv])
                use.writes.append((prefix, so_far, 0))
                if g > 0:
                    use.reads.append((prefix, so_far - 1, 0))
                if p.streamed[i]:
                    use.reads += _pages(p, slots(0, i), p.num_pages)
                if p.cpu_experts[i]:
                    use.writes.append((routed, number, 0))
            case "OFFLOAD_TOKENS":
                use = Use([(routed, number, 0)], [(host_routed, number, 0)])
            case "CPU_EXPERTS":
                use = Use([(host_routed, number, 0)], [added])
                if i < p.num_layers - 1:
                    use.reads.append((on_host, i + 1, 0))
            case "LOAD_EXPERT_OUTPUT":
                use = Use([added], [(routed, number, 1)])
            case "STORE_KV":
                use = Use([kv], [(("host_kv", i, g), 1, 0)])
            case "STORE_HIDDEN":
                use = Use([after], [(on_host, i + 1, 0)])
            case "REDUCE_LAST":
                use = Use([after], [_piece(after, 5)])
                if p.cpu_experts[i]:
                    use.reads.append((routed, number, 1))
            case "SAMPLE" if p.ranks > 1:
                use = Use([_piece(after, 5)])
            case _:
                assert x.act.name == "SAMPLE"
                use = Use([after])
                if p.cpu_experts[i]:
                    use.reads.append((routed, number, 1))
        yield x, use


# -- what must hold ---------------------------------------------------------------------------


def needs(used: dict[TaskId, Use]) -> Iterator[tuple[TaskId, TaskId, str]]:
    """All (earlier, later, buffer): what is read was written, what is overwritten was used."""
    writer = {part: x for x, use in used.items() for part in use.writes}
    for x, use in used.items():
        for part in use.reads:
            (name, *_), version, _ = part
            if part not in writer:
                assert name in FROM_PREFILL, f"{x} reads {part}: never written"
                assert version == 0, f"{x} reads {part}: never written"
                continue
            yield writer[part], x, name
    # Versions of one buffer in turn: users of each, then writers of the next.
    versions: dict[Buffer, dict[int, tuple[set[TaskId], set[TaskId]]]] = defaultdict(dict)
    for x, use in used.items():
        for parts, writes in ((use.reads, False), (use.writes, True)):
            for buffer, version, _ in parts:
                if buffer[0] == "host_kv":
                    continue  # grows; nothing in it is overwritten
                users, writers = versions[buffer].setdefault(version, (set(), set()))
                users.add(x)
                if writes:
                    writers.add(x)
    for buffer, by_version in versions.items():
        ordered = [by_version[version] for version in sorted(by_version)]
        for (users, _), (_, writers) in pairwise(ordered):
            for user in users:
                yield from ((user, writer_, buffer[0]) for writer_ in writers if writer_ != user)


def violations(used: dict[TaskId, Use], trace: Trace) -> list[str]:
    """Every need that a trace breaks."""
    start = {span.id: span.start_s for span in trace.spans}
    end = {span.id: span.end_s for span in trace.spans}
    return [
        f"{name}: {later} starts at {start[later]:.3g}, before {earlier} ends at {end[earlier]:.3g}"
        for earlier, later, name in needs(used)
        if start[later] < end[earlier]
    ]


def unordered(used: dict[TaskId, Use], tasks: Iterable[Task]) -> list[str]:
    """Every need that neither a lane nor a chain of edges enforces, whatever tasks take."""
    ancestors: dict[TaskId, int] = {}
    bit: dict[TaskId, int] = {}
    last_in_lane: dict[Lane, TaskId] = {}
    for task in tasks:
        bit[task.id] = 1 << len(bit)
        before = list(task.after)
        if task.lane in last_in_lane:
            before.append(last_in_lane[task.lane])
        last_in_lane[task.lane] = task.id
        ancestors[task.id] = 0
        for other in before:
            ancestors[task.id] |= ancestors[other] | bit[other]
    return [
        f"{name}: nothing makes {later} wait for {earlier}"
        for earlier, later, name in needs(used)
        if not ancestors[later] & bit[earlier]
    ]


def reason(used: dict[TaskId, Use], earlier: TaskId, later: TaskId) -> str | None:
    """`data`, or the buffer that an edge protects from being overwritten; None without any."""
    if set(used[earlier].writes) & set(used[later].reads):
        return "data"
    touched = {(b, v) for b, v, _ in (*used[earlier].reads, *used[earlier].writes)}
    for buffer, version, _ in used[later].writes:
        if any(b == buffer and v < version for b, v in touched):
            return buffer[0]
    return None
