"""What a roofline chart shows of a machine and of operators on it, as numbers to be drawn."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from hrm.formats import Formats
from hrm.hardware import HardwareProfile, Link, MemoryLevel, Rate, Source
from hrm.model_spec import ModelSpec
from hrm.roofline import TurningPoints, attainable_flops_per_s, attention_turning_points, ffn_turning_points

SAME: Final = 0.01  # figures that differ by less are drawn and named as one


class Evidence(StrEnum):
    """How a rate is known."""

    ACHIEVED = "achieved"
    CEILING = "ceiling"
    DATASHEET = "datasheet"


class Role(StrEnum):
    """What a roof belongs to."""

    GPU = "GPU"
    CPU = "CPU"
    LINK = "link"
    DISK = "disk"
    CACHE = "cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """A bandwidth: so many FLOP/s a FLOP a byte, up to the compute of what it feeds.

    One that stands `aside` is not on the way that plans take by default.
    """

    name: str
    role: Role
    bytes_per_s: dict[Evidence, float]
    limit_flops_per_s: dict[Evidence, float]
    aside: bool = False

    @property
    def planned(self) -> Evidence:
        """Which of the rates plans are made with."""
        return next(evidence for evidence in Evidence if evidence in self.bytes_per_s)

    def limit(self, evidence: Evidence) -> float:
        """Compute on that evidence, or else the next that is known."""
        return next(self.limit_flops_per_s[k] for k in (evidence, *Evidence) if k in self.limit_flops_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """A GEMM rate in one dtype; `curve` holds (tokens, FLOP/s), from `source`."""

    name: str
    role: Role
    dtype: str
    flops_per_s: dict[Evidence, float]
    curve: tuple[tuple[float, float], ...]
    source: Source
    memory_bytes_per_s: dict[Evidence, float]

    @property
    def planned(self) -> Evidence:
        """Which of the rates plans are made with."""
        return next(evidence for evidence in Evidence if evidence in self.flops_per_s)

    @property
    def curve_is_known(self) -> bool:
        """Whether somebody found, and did not only assume, how the rate bends over tokens."""
        return bool(self.curve) and self.source is not Source.ASSUMED

    def memory(self, evidence: Evidence) -> float:
        """Bandwidth on that evidence, or else the next that is known."""
        return next(self.memory_bytes_per_s[k] for k in (evidence, *Evidence) if k in self.memory_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An operator: its FLOPs a byte of what lies on the host, and FLOP/s each way to run it.

    `in_place` is on the host, `fetched` on the GPU with the data over the link, and
    `in_gpu_memory` on the GPU if the data were there; the last two and `points` are None without a
    GPU.
    """

    label: str
    dtype: str
    intensity: float
    in_place: float
    fetched: float | None = None
    in_gpu_memory: float | None = None
    points: TurningPoints | None = None


def slopes(profile: HardwareProfile, dtypes: tuple[str, ...], *, of_kv: bool) -> list[Slope]:
    """Bandwidths of the machine; `of_kv` takes decode attention's rate of reading for achieved."""
    found: list[Slope] = []
    for level, role in _levels(profile):
        limit = _limits(level, dtypes)
        memory = _known(level.read_bytes_per_s)
        name = f"{role} memory"
        if of_kv and level.processor.attention_bytes_per_s is not None:
            # What memory gives at best is the ceiling of a kernel that only reads it.
            memory[Evidence.CEILING] = level.read_bytes_per_s.planned.value
            memory[Evidence.ACHIEVED] = level.attention_bytes_per_s
            name = f"{role} attention"
        found.append(Slope(name=name, role=role, bytes_per_s=memory, limit_flops_per_s=limit))
        found += [
            Slope(
                name=f"{role} {cache.name}",
                role=Role.CACHE,
                bytes_per_s=_known(cache.read_bytes_per_s),
                limit_flops_per_s=limit,
            )
            for cache in level.caches
        ]
    limit = _limits(profile.top, dtypes)
    for link in profile.links if profile.has_accelerator else ():
        if _brings_host_data(profile, link):
            name = "staging to pinned" if link.kind == "staging" else f"H2D {link.kind}"
            found.append(
                Slope(
                    name=name,
                    role=Role.LINK,
                    limit_flops_per_s=limit,
                    bytes_per_s=_known(link.bandwidth_bytes_per_s),
                    aside=link.kind != "pinned",
                )
            )
    if profile.disk is not None:
        found.append(
            Slope(
                name="disk", role=Role.DISK, limit_flops_per_s=limit, bytes_per_s=_known(profile.disk.read_bytes_per_s)
            )
        )
    return found


def ceilings(profile: HardwareProfile, dtypes: tuple[str, ...]) -> list[Ceiling]:
    """GEMM rates of every level in every dtype."""
    found: list[Ceiling] = []
    for level, role in _levels(profile):
        for dtype in dtypes:
            rate = level.processor.compute_flops_per_s.get(dtype)
            plain = level.processor.flops_per_s(dtype)  # of a stand-in, if it lacks the dtype
            found.append(
                Ceiling(
                    name=f"{role} {dtype}",
                    role=role,
                    dtype=dtype,
                    flops_per_s=_known(rate) if rate else {Evidence.ACHIEVED: plain},
                    curve=rate.planned.curve if rate else (),
                    source=rate.planned.source if rate else Source.DERIVED,
                    memory_bytes_per_s=_known(level.read_bytes_per_s),
                )
            )
    return found


def attention_marks(
    profile: HardwareProfile, spec: ModelSpec, dtypes: tuple[str, ...], contexts: tuple[int, ...]
) -> list[Mark]:
    """Decode attention in every dtype and context; contexts of the same intensity are one mark."""
    marks: list[Mark] = []
    for dtype in dtypes:
        groups: list[tuple[list[int], Mark]] = []
        for context in sorted(set(contexts)):
            if profile.has_accelerator:
                points = attention_turning_points(profile, spec, Formats.of(dtype), context=context)
                mark = _mark(profile, points, dtype)
            else:
                operator = spec.widest_kind.mixer.attend(Formats.of(dtype), 1, context)
                mark = _mark_alone(profile, dtype, float(operator.intensity), None, reads_kv=True)
            for members, other in groups:
                if abs(mark.intensity / other.intensity - 1) < SAME:
                    members.append(context)
                    break
            else:
                groups.append(([context], mark))
        for members, mark in groups:
            # Where the context does not matter, it need not be told.
            all_of_them = len(groups) == 1
            shown = "" if all_of_them else "context " + ", ".join(map(str, members))
            marks.append(replace(mark, label=shown))
    return marks


def ffn_marks(
    profile: HardwareProfile,
    spec: ModelSpec,
    dtypes: tuple[str, ...],
    *,
    batch_sizes: tuple[int, ...],
    micro_batch_size: int,
) -> list[Mark]:
    """The MoE FFN in every dtype and batch size.

    A machine without a GPU reads the weights once a micro-batch, so its marks are micro-batches.
    """
    marks: list[Mark] = []
    for dtype in dtypes:
        for size in sorted(set(batch_sizes)):
            if profile.has_accelerator:
                points = ffn_turning_points(
                    profile, spec, Formats.of(dtype), batch_size=size, micro_batch_size=min(micro_batch_size, size)
                )
                mark = _mark(profile, points, dtype)
            else:
                operator = spec.experts.run(Formats.of(dtype), size, spec.num_experts)
                rows = float(operator.kernels[0].rows)
                mark = _mark_alone(profile, dtype, float(operator.intensity), rows, reads_kv=False)
            marks.append(replace(mark, label=_short(size)))
    return marks


def _short(size: int) -> str:
    return f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else str(size)


def _mark(profile: HardwareProfile, points: TurningPoints, dtype: str) -> Mark:
    link = profile.h2d.bandwidth_bytes_per_s.planned.value
    return Mark(
        label="",
        dtype=dtype,
        intensity=points.intensity,
        in_place=points.p1 * link,
        fetched=min(points.p2, points.intensity) * link,
        in_gpu_memory=points.p2 * link,
        points=points,
    )


def _mark_alone(profile: HardwareProfile, dtype: str, intensity: float, rows: float | None, *, reads_kv: bool) -> Mark:
    host = profile.host
    bandwidth = host.attention_bytes_per_s if reads_kv else host.read_bytes_per_s.at()
    compute = host.processor.flops_per_s(dtype, rows)
    attained = attainable_flops_per_s(compute=compute, bandwidth=bandwidth, intensity=intensity)
    return Mark(label="", dtype=dtype, intensity=intensity, in_place=attained)


def _levels(profile: HardwareProfile) -> list[tuple[MemoryLevel, Role]]:
    if not profile.has_accelerator:
        return [(profile.top, Role.GPU if profile.has_gpu else Role.CPU)]
    return [(profile.top, Role.GPU), (profile.host, Role.CPU)]


def _brings_host_data(profile: HardwareProfile, link: Link) -> bool:
    """Links towards the GPU as a whole, and the copy to pinned memory before them."""
    towards = (link.source, link.target) == (profile.host.name, profile.top.name)
    return (towards and link.kind != "peer") or link.kind == "staging"


def _known(rate: Rate) -> dict[Evidence, float]:
    figures = {evidence: getattr(rate, evidence.value) for evidence in Evidence}
    return {evidence: figure.value for evidence, figure in figures.items() if figure is not None}


def _limits(level: MemoryLevel, dtypes: tuple[str, ...]) -> dict[Evidence, float]:
    """The highest GEMM rate on every evidence over the dtypes."""
    limits = {Evidence.ACHIEVED: max(level.processor.flops_per_s(dtype) for dtype in dtypes)}
    for dtype in dtypes:
        rate = level.processor.compute_flops_per_s.get(dtype)
        for evidence, value in (_known(rate) if rate else {}).items():
            limits[evidence] = max(limits.get(evidence, 0.0), value)
    return limits
