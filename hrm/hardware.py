"""A machine as a hierarchy of memory levels: what each holds, how fast it is read and computed on.

Levels go from fast to slow (`gpu`, `cpu`); level 0 is where most computing is done. Each level has
its own processor, as in the hierarchical roofline model (MoE-Lightning, arXiv 2411.11217, §3).
Every figure says where it came from; a rate may be a curve over size where it bends.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Final, Literal

from hrm.errors import ProfileError
from hrm.numeric import Number, maximum

GPU: Final = "gpu"
CPU: Final = "cpu"
SCHEMA: Final = 1
NOISY_SPREAD: Final = 0.08
LARGEST_FIGURE: Final = 1e18  # bytes, rates, seconds; 64 bits hold such an integer


class Source(StrEnum):
    """Where a figure came from."""

    DATASHEET = "datasheet"
    MEASURED = "measured"
    FITTED = "fitted"
    DERIVED = "derived"
    ASSUMED = "assumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number in SI units with its provenance.

    `curve` holds `(size, value)` points where the number depends on a size (bytes of a transfer,
    tokens of a GEMM); `value` is then its plateau. `p20` and `p80` are the 20th and the 80th
    percentile of the samples, or further apart where passes of the measurement differ by more: in
    three of five cases, the value of the next run is expected between them.
    """

    value: float
    source: Source
    note: str = ""
    curve: tuple[tuple[float, float], ...] = ()
    samples: int = 0
    p20: float | None = None
    p80: float | None = None

    @property
    def spread(self) -> float:
        """Distance from the 20th to the 80th percentile as a share of the value; 0 if unknown."""
        if self.p20 is None or self.p80 is None or self.value <= 0:
            return 0.0
        return (self.p80 - self.p20) / self.value

    @property
    def is_noisy(self) -> bool:
        """Whether it spreads too far to be trusted."""
        return self.spread > NOISY_SPREAD

    def at(self, size: Number = None) -> Number:
        """Value at `size`, interpolated over log(size) and flat beyond the ends of the curve.

        `size` may be a NumPy array; the result then is one.
        """
        if size is None or not self.curve:
            return self.value
        sizes = [point[0] for point in self.curve]
        if not isinstance(size, (int, float)):
            import numpy as np

            values = [point[1] for point in self.curve]
            return np.interp(np.log(size), np.log(sizes), values)  # pyright: ignore[reportUnknownVariableType]
        right = bisect_left(sizes, size)
        if right == 0:
            return self.curve[0][1]
        if right == len(sizes):
            return self.curve[-1][1]
        (size_0, value_0), (size_1, value_1) = self.curve[right - 1], self.curve[right]
        share = math.log(size / size_0) / math.log(size_1 / size_0)
        return value_0 + share * (value_1 - value_0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A bandwidth or compute rate three ways: on paper, at its best, and in work like ours."""

    datasheet: Figure | None = None
    ceiling: Figure | None = None
    achieved: Figure | None = None

    @property
    def planned(self) -> Figure:
        """The figure that plans are made with: achieved, else the ceiling, else the data sheet."""
        figure = self.achieved or self.ceiling or self.datasheet
        assert figure is not None, "validated when the profile is loaded"
        return figure

    def at(self, size: Number = None) -> Number:
        """Planned value at `size`."""
        return self.planned.at(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What computes at a memory level.

    `compute_flops_per_s` maps a dtype to its GEMM rate, a curve over tokens (rows) of the GEMM.
    `attention_bytes_per_s` is the rate at which the decode attention kernel reads KV cache, and
    `launch_latency_s` what one more kernel or operator costs however small it is. Where requests
    are attended to one by one, `attention_request_s` is what each costs besides; where a batch is
    one kernel there is none. `fuses_operators` says that all experts of a layer are one kernel,
    and so is each norm and rotary embedding.
    """

    name: str
    cores: int = 0
    compute_flops_per_s: dict[str, Rate]
    attention_bytes_per_s: Rate | None = None
    attention_request_s: Figure | None = None
    fuses_operators: bool = False
    launch_latency_s: Figure

    def flops_per_s(self, dtype: str, num_tokens: Number = None) -> Number:
        """Planned GEMM rate; a 16-bit dtype the processor lacks falls back to the other one.

        Raises ProfileError if the profile says nothing about `dtype` at all.
        """
        stand_in = {"bfloat16": "float16", "float16": "bfloat16"}.get(dtype, dtype)
        rate = self.compute_flops_per_s.get(dtype) or self.compute_flops_per_s.get(stand_in)
        if rate is None:
            raise ProfileError(
                f"{self.name}: compute_flops_per_s", sorted(self.compute_flops_per_s),
                f"has no rate for dtype {dtype}", "choose another --dtype or measure this one",
            )  # fmt: skip
        return rate.at(num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One cache between a processor and its memory; all cores' private ones together."""

    name: str
    capacity_bytes: Figure
    read_bytes_per_s: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLevel:
    """One level of memory with its processor; `reserve_bytes` are never planned with.

    A copy counts each byte once, though it is read and written. `shared_bytes_per_s` is what all
    that use this memory at once get together (the processor, staging copies, links), each byte read
    or written counted; without it, they share what can be read. Caches go from fast to slow.
    """

    name: str
    capacity_bytes: Figure
    reserve_bytes: Figure
    read_bytes_per_s: Rate
    copy_bytes_per_s: Rate | None = None
    shared_bytes_per_s: Rate | None = None
    caches: tuple[Cache, ...] = ()
    processor: Processor

    @property
    def usable_bytes(self) -> int:
        """Capacity less the reserve."""
        return int(self.capacity_bytes.value - self.reserve_bytes.value)

    @property
    def together_bytes_per_s(self) -> float:
        """Bytes read and written a second by all that use this memory at once."""
        return (self.shared_bytes_per_s or self.read_bytes_per_s).at()

    @property
    def attention_bytes_per_s(self) -> float:
        """KV bytes a second in decode attention: measured on the kernel, else the memory roof."""
        return (self.processor.attention_bytes_per_s or self.read_bytes_per_s).at()


LinkKind = Literal["pinned", "pageable", "staging", "peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Transfers from one level to another: `latency_s` each, then `bandwidth_bytes_per_s`.

    `pinned` and `pageable` say what memory the host's side is in; `staging` is the copy from
    pageable to pinned memory within the host (`source` and `target` are then both the host), and
    `peer` what one GPU sends to another (both are then the GPU level). Where a machine has several
    GPUs, the link to the GPU level is all of theirs at once; one of them alone is named `gpu0`.
    """

    source: str
    target: str
    kind: LinkKind = "pinned"
    latency_s: Figure
    bandwidth_bytes_per_s: Rate

    def seconds(self, num_bytes: Number, num_transfers: Number = 1) -> Number:
        """Time to move `num_bytes` in `num_transfers` pieces; nothing to move takes no time."""
        pieces = maximum(num_transfers, 1)
        bandwidth = self.bandwidth_bytes_per_s.at(maximum(num_bytes / pieces, 1))
        return (num_bytes > 0) * num_transfers * self.latency_s.value + num_bytes / bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Storage below the host's memory, read in large blocks past the page cache."""

    path: str
    capacity_bytes: Figure
    read_bytes_per_s: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """What one kind of work keeps of its rate beside others: `kept` is a share, up to about 1.

    `work` and `beside` name what shares the host's memory or a link: `attention`, `staging`, `h2d`,
    `d2h`, and `gemm` where an emulated GPU computes on the host.
    """

    work: str
    beside: tuple[str, ...]
    kept: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A whole machine: levels from fast to slow and the links between them.

    `accelerator` says what level 0 is: `cuda`, `emulated` (a capped arena, a thread pool and a
    paced link on the CPU), `cpu` (one level, no accelerator) or `catalog` (never measured). With
    `num_stages` above 1 it is one of so many equal parts of a machine, a stage of a pipeline that
    keeps the KV caches of as many batches.
    """

    schema: int = SCHEMA
    name: str
    accelerator: Literal["cuda", "emulated", "cpu", "catalog"]
    num_gpus: int = 1
    num_stages: int = 1
    levels: tuple[MemoryLevel, ...]
    links: tuple[Link, ...] = ()
    disk: Disk | None = None
    contention: tuple[Contention, ...] = ()
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Reject impossible hardware (ProfileError naming the figure)."""
        _check_schema(self.name, self.schema)
        if not self.levels or len({level.name for level in self.levels}) < len(self.levels):
            raise ProfileError(
                f"{self.name}: levels", [level.name for level in self.levels],
                "must be one or more with distinct names", "list each memory level once",
            )  # fmt: skip
        if self.num_gpus < 1:
            raise ProfileError(
                f"{self.name}: num_gpus", self.num_gpus, "must be at least 1", "correct it"
            )
        check_figures(self.name, self)
        if len(self.levels) > 1:
            fast, slow = self.levels[0].name, self.levels[1].name
            self.link(slow, fast)
            self.link(fast, slow)
            if self.num_gpus > 1:
                self.link(fast, fast, "peer")

    @property
    def has_accelerator(self) -> bool:
        """Whether there is a level above the host's memory."""
        return len(self.levels) > 1

    @property
    def top(self) -> MemoryLevel:
        """The fastest level: the GPU's memory, or the host's where there is no GPU."""
        return self.levels[0]

    @property
    def host(self) -> MemoryLevel:
        """The host's memory; the same as `top` on a machine without an accelerator."""
        return self.levels[min(1, len(self.levels) - 1)]

    def link(self, source: str, target: str, kind: LinkKind = "pinned") -> Link:
        """The link of that direction and kind; ProfileError if the profile has none."""
        for link in self.links:
            if (link.source, link.target, link.kind) == (source, target, kind):
                return link
        raise ProfileError(
            f"{self.name}: links", [f"{x.source}->{x.target} {x.kind}" for x in self.links],
            f"has no {kind} link {source}->{target}", "measure it with hrm profile or add it",
        )  # fmt: skip

    def has_link(self, source: str, target: str, kind: LinkKind = "pinned") -> bool:
        """Whether `link` finds one."""
        return any((x.source, x.target, x.kind) == (source, target, kind) for x in self.links)

    @property
    def default_dtype(self) -> str:
        """bfloat16, or float16 where the top level's processor has no bfloat16."""
        has_bfloat16 = "bfloat16" in self.top.processor.compute_flops_per_s
        return "bfloat16" if has_bfloat16 else "float16"

    @property
    def peer(self) -> Link:
        """One GPU to another."""
        return self.link(self.top.name, self.top.name, "peer")

    @property
    def host_accesses_a_transferred_byte(self) -> int:
        """How often a byte on the link is read or written in the host's memory.

        An emulated link is a memcpy within it.
        """
        return 2 if self.accelerator == "emulated" else 1

    @property
    def h2d(self) -> Link:
        """Host to device, pinned."""
        return self.link(self.host.name, self.top.name)

    @property
    def d2h(self) -> Link:
        """Device to host, pinned."""
        return self.link(self.top.name, self.host.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCard:
    """One GPU as its file describes it: its memory level, its links and the host it usually has.

    `peer` is the link to another GPU of its kind in the same machine.
    """

    schema: int = SCHEMA
    name: str
    level: MemoryLevel
    h2d: Link
    d2h: Link
    peer: Link
    default_host: str

    def __post_init__(self) -> None:
        """Reject impossible hardware (ProfileError naming the figure)."""
        _check_schema(self.name, self.schema)
        check_figures(self.name, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host as its file describes it: memory, CPU and how it stages to pinned memory.

    `root_port_bytes_per_s` is the most that all its GPUs' links move in one direction at once.
    """

    schema: int = SCHEMA
    name: str
    level: MemoryLevel
    staging: Link
    root_port_bytes_per_s: Rate
    max_gpus: int = 1

    def __post_init__(self) -> None:
        """Reject impossible hardware (ProfileError naming the figure)."""
        _check_schema(self.name, self.schema)
        check_figures(self.name, self)


def _check_schema(name: str, schema: int) -> None:
    if schema != SCHEMA:
        raise ProfileError(
            f"{name}: schema", schema, f"this version reads schema {SCHEMA}",
            "measure the machine again with hrm profile or upgrade hrm",
        )  # fmt: skip


def check_figures(where: str, node: object) -> None:
    """Walk a profile and reject figures that no hardware can have (ProfileError)."""
    match node:
        case Figure():
            _check_figure(where, node)
        case Rate():
            _check_rate(where, node)
        case dict():
            for key, value in node.items():  # pyright: ignore[reportUnknownVariableType]
                check_figures(f"{where}.{key}", value)  # pyright: ignore[reportUnknownArgumentType]
        case tuple():
            for index, value in enumerate(node):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
                name = getattr(value, "name", index)  # pyright: ignore[reportUnknownArgumentType]
                check_figures(f"{where}[{name}]", value)  # pyright: ignore[reportUnknownArgumentType]
        case _ if is_dataclass(node) and not isinstance(node, type):
            for item in fields(node):
                check_figures(f"{where}.{item.name}", getattr(node, item.name))
            if isinstance(node, MemoryLevel) and node.usable_bytes <= 0:
                raise ProfileError(
                    f"{where}.reserve_bytes", node.reserve_bytes.value,
                    f"must leave something of the {node.capacity_bytes.value:.4g} bytes",
                    "correct the capacity or the reserve",
                )  # fmt: skip
        case _:
            pass


def _check_figure(where: str, figure: Figure) -> None:
    may_be_zero = where.endswith(("_s", "reserve_bytes")) and not where.endswith("per_s")
    spread = [value for value in (figure.p20, figure.p80) if value is not None]
    values = [figure.value, *spread, *(value for _, value in figure.curve)]
    impossible = [
        value for value in values
        if not 0 <= value <= LARGEST_FIGURE or (value == 0 and not may_be_zero)
    ]  # fmt: skip
    if impossible:
        raise ProfileError(
            where, impossible[0], f"must be positive and at most {LARGEST_FIGURE:.0e}",
            "measure it again or correct it",
        )  # fmt: skip
    if len(spread) == 2 and spread[0] > spread[1]:
        raise ProfileError(
            f"{where}.p20", spread[0], f"must not be above p80, {spread[1]:.4g}",
            "exchange them or measure it again",
        )  # fmt: skip
    sizes = [size for size, _ in figure.curve]
    if any(size <= 0 for size in sizes) or sizes != sorted(set(sizes)):
        raise ProfileError(
            f"{where}.curve", sizes, "sizes must be positive and ascending", "sort the points"
        )


def _check_rate(where: str, rate: Rate) -> None:
    named = {name: getattr(rate, name) for name in ("datasheet", "ceiling", "achieved")}
    known = {name: figure for name, figure in named.items() if figure is not None}
    if not known:
        raise ProfileError(
            where, "<no figure>", "needs a datasheet, ceiling or achieved figure", "add one of them"
        )
    for name, figure in known.items():
        _check_figure(f"{where}.{name}", figure)
    datasheet = known.pop("datasheet", None)
    for name, figure in known.items():
        low_end = figure.p20 if figure.p20 is not None else figure.value
        if datasheet and min(low_end, figure.value) > 1.05 * datasheet.value:
            raise ProfileError(
                f"{where}.{name}", figure.value,
                f"is above the data sheet's {datasheet.value:.4g} by more than its spread",
                "check the data sheet's figure or measure again",
            )  # fmt: skip
