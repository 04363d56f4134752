"""Weights on their way to where they stay: read by several threads, and how far that is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Final

from torch import Tensor

from executor.model.layout import Tensors

READERS: Final = 4  # so many reads under way keep an NVMe disk busy


@dataclass(slots=True)
class Loading:
    """Bytes of weights that are here or in their places, of all; read by live displays in another thread."""

    total_bytes: int = 0
    done_bytes: int = 0

    def set(self, done_bytes: int, total_bytes: int) -> None:
        """Have it be so far."""
        self.done_bytes, self.total_bytes = done_bytes, total_bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A vector with room for tensors: an expert's, a layer's others, or those outside of layers."""

    tensors: Tensors
    flat: Tensor
    layer: int = 0
    expert: int | None = None


def fill(places: Sequence[Target], read: Callable[[Target], None], loading: Loading) -> None:
    """Have each of the places read by one of READERS threads; raises what the first to fail does."""
    loading.set(0, sum(place.flat.nbytes for place in places))
    left, lock = iter(places), Lock()
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            with lock:
                place = next(left, None)
            if place is None:
                return
            try:
                read(place)
            except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
                failures.append(error)
                return
            with lock:
                loading.done_bytes += place.flat.nbytes

    # Daemons: Ctrl-C must not wait until all is read.
    threads = [Thread(target=work, name=f"reader {index}", daemon=True) for index in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
