"""What the tasks of a phase take in closed form, for one policy or a grid of them: by act, and by lane."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from hrm.acts import Counts, Load
from hrm.contention import Contention, Stretch
from hrm.costs import Costs
from hrm.numeric import Number, is_zero, maximum
from hrm.tasks import Act, Lane

CHAIN: Final = len(Lane) + 1  # the place of the chain among `PhaseSeconds.terms`
_NEARLY_NOTHING_S: Final = 1e-12


class PhaseSeconds(NamedTuple):
    """Seconds of a decode step or of prefill: of the tasks of each act, of each lane, of the host's memory, as a chain.

    `at_memory` are those that the host's memory needs for the tasks of each act that use it. A micro-batch or chunk
    goes through a chain of tasks in every layer, and only so many are under way at once.
    `cores_s` is what lanes take that share cores, if it is known, and `running_s` the part of it that is running tasks.
    """

    acts: dict[Act, Number]
    lanes: dict[Lane, Number]
    at_memory: dict[Act, Number]
    host_memory_s: Number
    chain_s: Number
    cores_s: Number | None = None
    running_s: Number = 0.0

    @property
    def terms(self) -> tuple[Number, ...]:
        """What all of it takes at least, whatever the order: each lane, the host's memory, and the chain."""
        return (*self.lanes.values(), self.host_memory_s, self.chain_s)

    @property
    def shared_cores(self) -> tuple[Number, ...]:
        """What it takes at least where lanes share cores: one more term, behind all others."""
        return () if self.cores_s is None else (self.cores_s,)

    @property
    def bound_s(self) -> float:
        """What it takes at least if all lanes overlap perfectly."""
        return float(max(*self.lanes.values(), self.host_memory_s, *self.shared_cores))

    @property
    def contention(self) -> Contention:
        """What tasks have to share."""
        of_lanes: dict[Lane, float] = {}
        for act, seconds in self.at_memory.items():
            of_lanes[act.lane] = of_lanes.get(act.lane, 0.0) + float(seconds)
        of_others = sum(sorted(of_lanes.values())[:-1])
        return Contention(of_others, float(self.running_s), self.bound_s)

    def stretched_s(self, stretch: Stretch) -> float:
        """What the phase takes at least where tasks take so much longer: those of each lane, and the chain."""
        lanes, chained_s, alone_s = dict.fromkeys(Lane, 0.0), 0.0, _NEARLY_NOTHING_S
        for act, seconds in self.acts.items():
            longer_s = stretch.seconds(act, float(seconds), float(self.at_memory.get(act, 0.0)))
            lanes[act.lane] += longer_s
            if act.chained:
                chained_s, alone_s = chained_s + longer_s, alone_s + float(seconds)
        return max(*lanes.values(), float(self.chain_s) * chained_s / alone_s)


@dataclass(frozen=True, slots=True)
class LaneWork:
    """What all tasks of some acts take: seconds by act, and seconds that the host's memory needs for those that use it.

    There are `num_tasks` of them.
    """

    seconds: dict[Act, Number]
    at_memory: dict[Act, Number]
    num_tasks: Number = 0

    @staticmethod
    def of(acts: Iterable[Act], counts: Counts, load: Load) -> "LaneWork":
        """Every act's tasks, each as a mean over the layers."""
        seconds: dict[Act, Number] = {}
        at_memory: dict[Act, Number] = {}
        num_tasks: Number = 0
        loads_of: dict[tuple[bool, ...], list[tuple[Number, Load]]] = {}
        for act in acts:
            count = act.count(counts)
            if is_zero(count):
                continue
            told_apart = act.attends, act.by_ffn, act.of_cpu_experts, act.of_parts, act.of_last
            if told_apart not in loads_of:
                loads_of[told_apart] = _loads(load, act, counts)
            of_all: Number = 0
            num_bytes: Number = 0
            on_host: Number = 0
            for share, each in loads_of[told_apart]:
                of_one, moved, accessed = _task(act, each)
                of_all = of_all + share * of_one
                num_bytes = num_bytes + share * moved
                on_host = on_host + share * accessed
            seconds[act] = count * of_all
            # Of what moves nothing there are no tasks: pages of weights that all stay, for one.
            num_tasks = num_tasks + count * (1 if act.lane.computes else num_bytes > 0)
            if not is_zero(on_host):
                at_memory[act] = load.costs.host_memory(count * on_host)
        return LaneWork(seconds, at_memory, num_tasks)

    def __add__(self, other: "LaneWork") -> "LaneWork":
        """Of both, which have no act in common."""
        return LaneWork(
            {**self.seconds, **other.seconds}, {**self.at_memory, **other.at_memory}, self.num_tasks + other.num_tasks
        )

    def in_all(self, costs: Costs, under_way: Number) -> PhaseSeconds:
        """The seconds, with so many micro-batches or chunks under way at once."""
        host_memory_s = sum(self.at_memory.values(), start=0.0)
        lanes: dict[Lane, Number] = dict.fromkeys(Lane, 0.0)
        for act, seconds in self.seconds.items():
            lanes[act.lane] = lanes[act.lane] + seconds
        chain_s = sum(seconds for act, seconds in self.seconds.items() if act.chained) / under_way
        waiting_s = sum(seconds for act, seconds in self.seconds.items() if act.reduces)
        seconds = PhaseSeconds(self.seconds, lanes, self.at_memory, host_memory_s, chain_s)
        running_s = costs.running(self.num_tasks)
        if running_s is None:
            return seconds
        computing_s = costs.computing(gpu_s=lanes[Lane.GPU] - waiting_s, cpu_s=lanes[Lane.CPU])
        return seconds._replace(cores_s=running_s + computing_s, running_s=running_s)


def _task(act: Act, load: Load) -> tuple[Number, Number, Number]:
    """Seconds of one task, bytes that it moves, and bytes that it accesses in the host's memory."""
    num_bytes = act.moves(load)
    return act.seconds(load, num_bytes), num_bytes, load.costs.accessed_bytes(act, load, num_bytes)


def _loads(load: Load, act: Act, counts: Counts) -> list[tuple[Number, Load]]:
    """The loads of the layers that the act tells apart, each with its share of the layers that it has tasks in."""
    spec = load.spec
    last = spec.layer_kind(spec.num_layers - 1)
    if act.of_last:
        return [(1.0, (load.last or load)._replace(kind=last, is_last=True))]
    if act.of_cpu_experts or act.of_parts:  # layers with experts differ in nothing else that matters here
        kind = next(kind for kind in spec.layer_kinds() if kind.has_experts)
        if load.last is None:
            return [(1.0, load._replace(kind=kind))]
        of_mean, of_last = counts.cpu_experts, counts.last_cpu_experts
        if act.of_parts:
            of_mean, of_last = counts.parts, counts.last_parts
        of_last = of_last / maximum(counts.layers * of_mean, 1e-9)
        return [(1 - of_last, load._replace(kind=kind)), (of_last, load.last._replace(kind=kind))]
    kinds = spec.alike(by_window=act.attends, by_ffn=act.by_ffn)
    shares = {(kind, False): count / spec.num_layers for kind, count in kinds.items()}
    if load.last is not None and act.by_ffn:
        last = last if act.attends else last.without_window  # as the kinds are
        shares[last, False] -= 1 / spec.num_layers
        shares[last, True] = 1 / spec.num_layers
    if len(shares) == 1:
        return [(1.0, load._replace(kind=next(iter(shares))[0]))]
    return [
        (share, ((load.last or load) if is_last else load)._replace(kind=kind))
        for (kind, is_last), share in shares.items()
        if share > 1e-12
    ]
