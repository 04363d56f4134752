"""Bytes that a policy needs at each memory level, by purpose, beside what there is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from hrm.buffers import Needs, Purpose, bytes_by_purpose
from hrm.errors import PolicyError
from hrm.hardware import CPU, HardwareProfile, MemoryLevel
from hrm.machines import MAX_RESERVE_SHARE, reserve_if_resized, with_host_memory
from hrm.model_spec import ModelSpec
from hrm.numeric import Number
from hrm.parallel import Part, Share, shares_for
from hrm.policy import Policy
from hrm.units import LARGEST, at_least_bytes, format_bytes

# Purposes of the host's memory that cross the link, in the order in which they are pinned.
ALWAYS_PINNED: Final = (Purpose.STAGING, Purpose.EXCHANGE, Purpose.PREFILL_BUFFERS)  # small, and in every layer's way
PINNED_IF_THERE_IS_ROOM: Final = (Purpose.PREFILL_HIDDEN, Purpose.KV_CACHE)
PINNED: Final = "pinned"  # the part of the host's memory that devices read and write themselves


@dataclass(frozen=True, slots=True)
class LevelPlan:
    """What is planned at one level, of whose bytes `capacity_bytes` are usable beside its reserve.

    `reserve_bytes` are those of another capacity, if the level is given one. The machine has so many
    times as much: `parts`.
    """

    name: str
    capacity_bytes: int
    purposes: dict[Purpose, int]
    reserve_bytes: float = 0.0
    parts: float = 1

    @property
    def planned_bytes(self) -> int:
        """All purposes together."""
        return sum(self.purposes.values())

    @property
    def lacking_bytes(self) -> int:
        """How much more is planned than there is."""
        return max(0, self.planned_bytes - self.capacity_bytes)

    @property
    def option(self) -> str:
        """The option with the least memory of the whole machine that is enough for the plan."""
        flag = "--cpu-memory" if self.name == CPU else "--gpu-memory"
        return f"{flag} {at_least_bytes(self.enough_bytes)}"

    @property
    def enough_bytes(self) -> float:
        """The least memory of the whole machine that is enough for the plan."""
        planned = self.planned_bytes + 2  # of rounding to whole bytes
        return self.parts * min(planned + self.reserve_bytes, planned / (1 - MAX_RESERVE_SHARE))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a policy needs at the top level and at the host; on one level both are the same.

    `pinned` is what of the host's memory must be pinned, where not all of it can be.
    """

    gpu: LevelPlan
    cpu: LevelPlan
    pinned: LevelPlan | None = None

    @property
    def levels(self) -> tuple[LevelPlan, ...]:
        """What is planned at every level, each once, and pinned."""
        plans = (self.gpu, self.cpu, *([self.pinned] if self.pinned else []))
        return tuple({plan.name: plan for plan in plans}.values())

    @property
    def fits(self) -> bool:
        """Whether no level overflows."""
        return all(plan.planned_bytes <= plan.capacity_bytes for plan in self.levels)

    @property
    def planned_bytes(self) -> int:
        """Bytes at all levels."""
        one_level = self.gpu.name == self.cpu.name
        return self.gpu.planned_bytes + (0 if one_level else self.cpu.planned_bytes)

    def check_fits(self, *, remedy: str = "") -> None:
        """Raise PolicyError naming the level, the need and what would be enough, if one overflows.

        `remedy` is what else would help, as `-u 4`.
        """
        levels = {level.name: level for level in (self.gpu, self.cpu) if level.lacking_bytes}
        if not levels:
            self._check_pinned()
            return
        first = next(iter(levels.values()))
        purpose, size = max(first.purposes.items(), key=lambda item: item[1])
        others = [
            f", and level {other.name} lacks {format_bytes(other.lacking_bytes)}"
            for other in levels.values()
            if other is not first
        ]
        possible = all(level.enough_bytes <= LARGEST for level in levels.values())
        enough = f"{' with '.join(level.option for level in levels.values())} is enough" if possible else ""
        smaller = remedy if possible or not remedy else f"{remedy} is enough"
        raise PolicyError(
            f"policy: memory at level {first.name}",
            f"<{format_bytes(first.planned_bytes)} planned>",
            f"must fit the usable {format_bytes(first.capacity_bytes)}"
            f" (the largest part is {purpose.replace('_', ' ')}, {format_bytes(size)})"
            f"{''.join(others)}",
            ", or ".join(filter(None, (enough, smaller))) or "choose a smaller batch",
        )

    def _check_pinned(self) -> None:
        if self.pinned is None or not self.pinned.lacking_bytes:
            return
        staged = Purpose.WEIGHTS not in self.pinned.purposes
        raise PolicyError(
            "policy: pinned memory of the host",
            f"<{format_bytes(self.pinned.planned_bytes)} planned>",
            f"must fit the {format_bytes(self.pinned.capacity_bytes)} that it can pin",
            "lower batch_size" if staged else "let hrm search choose, or add --staging",
        )


def plan_memory(spec: ModelSpec, policy: Policy, profile: HardwareProfile) -> MemoryPlan:
    """Bytes that the policy needs at each level of the machine.

    On a machine of one level everything is planned there: `gpu` and `cpu` are then that level. In
    parallel on several GPUs it is one rank or stage that is planned, with its share of the machine; of
    stages that are planned one by one, it is that whose GPU lacks most, or has least to spare. Raises
    PolicyError if the policy is not for this model and machine.
    """
    return fullest(plan_shares(shares_for(policy, spec, profile), profile))


def fullest(plans: Iterable[MemoryPlan]) -> MemoryPlan:
    """The plan whose GPU lacks most, or has least to spare."""
    return max(plans, key=lambda plan: plan.gpu.planned_bytes / plan.gpu.capacity_bytes)


def plan_shares(shares: Sequence[Share], profile: HardwareProfile) -> tuple[MemoryPlan, ...]:
    """What each share of a policy needs; of several, each has its own GPU, and the host is that of all together."""
    plans = tuple(map(_plan, shares))
    if len(plans) == 1:
        return plans
    host = profile.host
    together = _together([plan.cpu for plan in plans], host.usable_bytes)
    can_pin = [plan.pinned for plan in plans if plan.pinned is not None]
    pinned = _together(can_pin, host.usable_pinned_bytes) if can_pin else None

    def of_gpu(level: LevelPlan, share: Share) -> LevelPlan:
        return replace(level, parts=profile.top.capacity_bytes.value / share.part.profile.top.capacity_bytes.value)

    return tuple(
        MemoryPlan(of_gpu(plan.gpu, share), together, pinned) for plan, share in zip(plans, shares, strict=True)
    )


def parts_of_host(shares: Sequence[Share], profile: HardwareProfile) -> tuple[Part, ...]:
    """The part of each share, with as much of the host's memory as it plans of what all of them plan.

    So each of them fits in its own if all together fit in the host's.
    """
    plans, host = tuple(map(_plan, shares)), profile.host

    def divided(usable_bytes: int, planned: Sequence[LevelPlan]) -> list[int]:
        together = sum(level.planned_bytes for level in planned)
        return [usable_bytes * level.planned_bytes // max(together, 1) for level in planned]

    usable = divided(host.usable_bytes, [plan.cpu for plan in plans])
    pinned = divided(host.usable_pinned_bytes, [plan.pinned or plan.cpu for plan in plans])
    return tuple(
        Part(share.part.spec, with_host_memory(share.part.profile, *sizes))
        for share, *sizes in zip(shares, usable, pinned, strict=True)
    )


def _together(levels: Sequence[LevelPlan], usable_bytes: int) -> LevelPlan:
    """What all stages need of a level that they share."""
    purposes = {key: sum(level.purposes.get(key, 0) for level in levels) for level in levels for key in level.purposes}
    return replace(levels[0], capacity_bytes=usable_bytes, purposes=purposes, parts=1)


def _plan(share: Share) -> MemoryPlan:
    policy, (spec, profile) = share
    gpu, cpu = purposes(spec, policy, batches=profile.num_stages)
    parts = profile.num_stages * spec.ranks
    if profile.has_accelerator:
        plan = MemoryPlan(_level(profile.top, gpu, parts), _level(profile.host, cpu, parts))
        if profile.host.pinnable_bytes is None:
            return plan
        needed = pinned_purposes(cpu, staging=policy.staging, streams_kv=int(policy.streams_kv))
        needed = {key: int(size) for key, size in needed.items() if size}
        usable = profile.host.usable_pinned_bytes
        return replace(plan, pinned=LevelPlan(PINNED, usable, needed, parts=parts))
    both = {key: gpu.get(key, 0) + cpu.get(key, 0) for key in {**gpu, **cpu}}
    level = _level(profile.top, both, parts)
    return MemoryPlan(level, level)


def purposes(spec: ModelSpec, policy: Policy, *, batches: int = 1) -> tuple[dict[Purpose, int], dict[Purpose, int]]:
    """Bytes by purpose at the GPU's and at the host's level, whether or not they are one."""
    needs = Needs.of_policy(spec, policy, batches=batches)
    return bytes_by_purpose(needs.on_gpu()), bytes_by_purpose(needs.on_host())


def pinned_purposes(cpu: Mapping[Purpose, Number], *, staging: bool, streams_kv: Number) -> dict[Purpose, Number]:
    """What of the host's purposes must be pinned, in the order in which the executor pins.

    That is all that crosses the link. With `staging`, weights may lie in pageable memory, and so
    may a KV cache that crosses only once, on its way from prefill to attention on the CPU.
    """
    names = [*ALWAYS_PINNED, *PINNED_IF_THERE_IS_ROOM]
    pinned = {name: cpu[name] for name in names}
    if not staging:
        return {**pinned, Purpose.WEIGHTS: cpu[Purpose.WEIGHTS]}
    return {**pinned, Purpose.KV_CACHE: streams_kv * pinned[Purpose.KV_CACHE]}


def _level(level: MemoryLevel, purposes: dict[Purpose, int], parts: int) -> LevelPlan:
    return LevelPlan(
        name=level.name,
        capacity_bytes=level.usable_bytes,
        purposes={key: size for key, size in purposes.items() if size > 0},
        reserve_bytes=reserve_if_resized(level),
        parts=parts,
    )
