"""One level of a machine's memory: what it holds, how fast it is read, and what computes there."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import cast, overload

from hrm.errors import ProfileError
from hrm.figures import Figure, Rate, check_figure, check_rate
from hrm.numeric import Number


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

    @overload
    def flops_per_s(self, dtype: str, num_tokens: float | None = None, *, code: str = "") -> float: ...

    @overload
    def flops_per_s(self, dtype: str, num_tokens: Number | None, *, code: str = "") -> Number: ...

    def flops_per_s(self, dtype: str, num_tokens: Number | None = None, *, code: str = "") -> Number:
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


def check_figures(where: str, node: object) -> None:
    """Walk a profile and reject figures that no hardware can have (ProfileError)."""
    match node:
        case Figure():
            check_figure(where, node)
        case Rate():
            check_rate(where, node)
        case dict():
            for key, value in cast("dict[str, object]", node).items():
                check_figures(f"{where}.{key}", value)
        case tuple():
            for index, value in enumerate(cast("tuple[object, ...]", node)):
                check_figures(f"{where}[{getattr(value, 'name', index)}]", value)
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
