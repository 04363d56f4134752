"""A piece of work that native kernels alone do, done again by one call.

Between two tokens of the same requests a layer's work differs in a few numbers. Its calls are recorded with
all that they were given, and repeated in one: what Python and torch do besides, making views for the most
part, takes longer than small kernels themselves.

R requests.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from executor.native.compiled import module

_ALLOCATING: Final = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
)


class _UnderWay(threading.local):
    """What the thread records with."""

    numbers: "Numbers | None" = None
    calls: Any = None


_under_way = _UnderWay()


@final
class Numbers:
    """What changes from token to token: `positions_R`, `cache_rows_R` (int64), `starts` and `lengths`.

    Tensors are read whenever a tape is played with these, where they lie.
    """

    __slots__ = ("cache_rows_R", "lengths", "native", "positions_R", "starts")

    def __init__(
        self, positions_R: Tensor, cache_rows_R: Tensor, starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.positions_R, self.cache_rows_R, self.starts, self.lengths = positions_R, cache_rows_R, starts, lengths
        self.native: Any = module().Numbers(positions_R.data_ptr(), cache_rows_R.data_ptr(), starts, lengths)


@final
class Tape:
    """The calls of native kernels in a piece of work; see `record`."""

    __slots__ = ("_calls", "_kept")

    def __init__(self, calls: Any, kept: list[Tensor]) -> None:
        self._calls, self._kept = calls, kept

    @staticmethod
    def record(work: Callable[[], object], numbers: Numbers) -> "Tape | None":
        """Do the work, and return a tape that does it with other numbers; None if more than native kernels did it.

        Only what the kernels compute is repeated, at the same places: tensors that the work is given must stay
        where they are, and nothing else may depend on the numbers. No call may be left to torch for them.
        """
        watch = _Watch(module().Tape(numbers.native))
        _under_way.numbers, _under_way.calls = numbers, watch.calls
        watch.calls.start()
        try:
            with watch:
                work()
        finally:
            watch.calls.stop()
            _under_way.numbers = _under_way.calls = None
        return Tape(watch.calls, watch.kept) if watch.calls.is_whole() else None

    def play(self, numbers: Numbers) -> list[int]:
        """Do it for as many requests; returns the tokens that each expert was given, if experts computed."""
        return self._calls.play(numbers.native)


def is_recording() -> bool:
    """Whether the calling thread records."""
    return _under_way.numbers is not None


def checked(starts: Sequence[int], lengths: Sequence[int] | None = None) -> None:
    """Have the tape under way given up if these are not its numbers but others made of them."""
    numbers = _under_way.numbers
    if numbers is None:
        return
    if starts is not numbers.starts or (lengths is not None and lengths is not numbers.lengths):
        _under_way.calls.spoil()


class _Watch(TorchDispatchMode):
    """Gives a tape up as soon as torch computes; keeps what it allocates, which calls write to."""

    def __init__(self, calls: Any) -> None:
        super().__init__()
        self.calls, self.kept = calls, list[Tensor]()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else the first tape imports torch's compiler, for a second in the middle of a run."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        if func in _ALLOCATING:
            self.kept.append(made)
        elif not func.is_view:
            self.calls.spoil()
        return made
