"""A machine as a hierarchy of memory levels: what each holds, how fast it is read and computed on.

Levels go from fast to slow (`gpu`, `cpu`); level 0 is where most computing is done. Each level has
its own processor, as in the hierarchical roofline model (MoE-Lightning, arXiv 2411.11217, §3).
Every figure says where it came from; a rate may be a curve over size where it bends.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import ClassVar, Final, Literal

from hrm.errors import ProfileError
from hrm.figures import NOISY_SPREAD, Figure, Rate, Source, check_figure, check_rate
from hrm.numeric import Number, maximum

__all__ = [
    "CPU",
    "GPU",
    "NOISY_SPREAD",
    "SCHEMA",
    "Cache",
    "Disk",
    "Figure",
    "GpuCard",
    "HardwareProfile",
    "Host",
    "Link",
    "LinkKind",
    "MemoryLevel",
    "Processor",
    "Rate",
    "Source",
    "check_figures",
]

GPU: Final = "gpu"
CPU: Final = "cpu"
SCHEMA: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What computes at a memory level.

    `compute_flops_per_s` maps a dtype to its GEMM rate, a curve over tokens (rows) of the GEMM, and so
    the codes of packed weights (`int4`) whose products were measured in the first of the dtypes.
    `attention_bytes_per_s` is the rate at which the decode attention kernel reads KV cache, and
    `launch_latency_s` what one more kernel or operator costs however small it is. Where requests
    are attended to one by one, `attention_request_s` is what each costs besides; where a batch is
    one kernel there is none. `fuses_operators` says that all experts of a layer are one kernel,
    and so is each norm and rotary embedding, and `groups_experts` that all experts are a few, as on
    GPUs with a grouped GEMM. `native_up_to` keeps up to which size a runtime's own
    kernels did each kind of work, and torch what is larger, so that runs choose alike.
    """

    name: str
    cores: int = 0
    compute_flops_per_s: dict[str, Rate]
    attention_bytes_per_s: Rate | None = None
    attention_request_s: Figure | None = None
    fuses_operators: bool = False
    groups_experts: bool = False
    native_up_to: dict[str, int] = field(default_factory=dict[str, int])
    launch_latency_s: Figure

    def flops_per_s(self, dtype: str, num_tokens: Number = None, *, code: str = "") -> Number:
        """Planned GEMM rate; a 16-bit dtype the processor lacks falls back to the other one.

        With packed weights of a `code` it is theirs if that was measured, else that of plain ones.

        Raises ProfileError if the profile says nothing about `dtype` at all.
        """
        stand_in = {"bfloat16": "float16", "float16": "bfloat16"}.get(dtype, dtype)
        rates = self.compute_flops_per_s
        rate = rates.get(code) or rates.get(dtype) or rates.get(stand_in)
        if rate is None:
            raise ProfileError(
                f"{self.name}: compute_flops_per_s",
                sorted(self.compute_flops_per_s),
                f"has no rate for dtype {dtype}",
                "choose another --dtype or measure this one",
            )
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
    `pinnable_bytes` are all that a host pins, for CUDA devices to read and write by themselves;
    without it, all of the memory can be pinned.
    """

    name: str
    capacity_bytes: Figure
    reserve_bytes: Figure
    pinnable_bytes: Figure | None = None
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
    def usable_pinned_bytes(self) -> int:
        """What can be both used and pinned."""
        if self.pinnable_bytes is None:
            return self.usable_bytes
        return min(int(self.pinnable_bytes.value), self.usable_bytes)

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
        bandwidth = self.bandwidth_bytes_per_s.planned.value
        if self.bandwidth_bytes_per_s.planned.curve:
            bandwidth = self.bandwidth_bytes_per_s.at(maximum(num_bytes / maximum(num_transfers, 1), 1))
        return (num_bytes > 0) * (num_transfers * self.latency_s.value) + num_bytes / bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Storage below the host's memory, read in large blocks past the page cache."""

    path: str
    capacity_bytes: Figure
    read_bytes_per_s: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A whole machine: levels from fast to slow and the links between them.

    `accelerator` says what level 0 is: `cuda`, `emulated` (a capped arena, a thread pool and a
    paced link on the CPU), `cpu` (one level, no accelerator) or `catalog` (never measured). With
    `num_stages` above 1 it is one of so many equal parts of a machine, a stage of a pipeline that
    keeps the KV caches of as many batches.

    With `unified_memory` a GPU and a CPU work in one memory. It is the only level, and its
    processor is the GPU: the CPU would read the same bytes no sooner and computes less. Nothing is
    held twice and nothing crosses a link.
    """

    RETIRED: ClassVar = frozenset({"contention"})  # what files of before may hold, and no plan asks for

    schema: int = SCHEMA
    name: str
    accelerator: Literal["cuda", "emulated", "cpu", "catalog"]
    num_gpus: int = 1
    num_stages: int = 1
    unified_memory: bool = False
    levels: tuple[MemoryLevel, ...]
    links: tuple[Link, ...] = ()
    disk: Disk | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Reject impossible hardware (ProfileError naming the figure)."""
        _check_schema(self.name, self.schema)
        if not self.levels or len({level.name for level in self.levels}) < len(self.levels):
            raise ProfileError(
                f"{self.name}: levels",
                [level.name for level in self.levels],
                "must be one or more with distinct names",
                "list each memory level once",
            )
        if self.num_gpus < 1:
            raise ProfileError(f"{self.name}: num_gpus", self.num_gpus, "must be at least 1", "correct it")
        if self.unified_memory and (len(self.levels) > 1 or self.num_gpus > 1):
            raise ProfileError(
                f"{self.name}: unified_memory",
                True,
                "goes with one level and one GPU",
                "leave one level, the memory with its GPU, or leave this out",
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
    def has_gpu(self) -> bool:
        """Whether a GPU computes: in a memory of its own, or in unified memory."""
        return self.has_accelerator or self.unified_memory

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
            f"{self.name}: links",
            [f"{x.source}->{x.target} {x.kind}" for x in self.links],
            f"has no {kind} link {source}->{target}",
            "measure it with hrm profile or add it",
        )

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
            f"{name}: schema",
            schema,
            f"this version reads schema {SCHEMA}",
            "measure the machine again with hrm profile or upgrade hrm",
        )


def check_figures(where: str, node: object) -> None:
    """Walk a profile and reject figures that no hardware can have (ProfileError)."""
    match node:
        case Figure():
            check_figure(where, node)
        case Rate():
            check_rate(where, node)
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
                    f"{where}.reserve_bytes",
                    node.reserve_bytes.value,
                    f"must leave something of the {node.capacity_bytes.value:.4g} bytes",
                    "correct the capacity or the reserve",
                )
        case _:
            pass
