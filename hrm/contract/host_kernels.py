"""What computes on the host while a machine is measured: torch, or a runtime's own kernels."""

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

RUNTIMES: Final = "hrm.host_kernels"  # entry points: functions that return HostKernels or None


class CrossingSizes(Protocol):
    """Up to which size a runtime's own kernels do each kind of work, and torch what is larger."""

    def __call__(self, dtypes: "Sequence[str]", threads: int, *, packed: bool) -> "Mapping[str, int]":
        """What was measured in each of the dtypes on so many threads, of packed weights as well if asked."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostKernels:
    """A runtime's products, attention and copies, so that a profile tells what will really run.

    `multiply(x, weight, out)` makes `out` the product of `x` (tokens, width) and the transpose of
    `weight` (rows, width). `attend(queries, cache, starts, lengths, out)` is attention of one new
    token per request, whose heads are one row of `queries` and `out`, over `lengths[r]` tokens of
    the cache (tokens, 2, kv heads, head_dim) from `starts[r]` on, all requests in one kernel.
    `stage(target, source)` copies a page of weights. `pack(rows, width, name)` is a matrix of random
    numbers in that packed format, which `multiply` takes as a weight, too. If the runtime
    `fuses_operators`, all experts of a layer take one kernel, not some for each, and so does a norm or
    rotary embedding. `native_up_to` tells which work is left to torch. `sums_between(ranks, sizes)` are seconds of
    sums of so many bytes each between ranks that are processes of this machine, as runs take them, and
    `seconds_a_task(ranks)` those of the processor that running a task takes, by one of ranks that share out the cores.
    """

    name: str
    multiply: "Callable[[Tensor, Any, Tensor], object]"
    attend: "Callable[[Tensor, Tensor, Sequence[int], Sequence[int], Tensor], None]"
    stage: "Callable[[Tensor, Tensor], object]"
    pack: "Callable[[int, int, str], object] | None" = None
    fuses_operators: bool = False
    native_up_to: CrossingSizes | None = None
    sums_between: "Callable[[int, Sequence[int]], Mapping[int, Sequence[float]]] | None" = None
    seconds_a_task: "Callable[[int], Sequence[float]] | None" = None


def installed_kernels() -> HostKernels | None:
    """Those of the first installed runtime that has any; None if torch computes everything."""
    for runtime in entry_points(group=RUNTIMES):
        kernels: HostKernels | None = runtime.load()()
        if kernels is not None:
            return kernels
    return None
