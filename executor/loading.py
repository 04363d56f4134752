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
    """What of a model or of its memory is done, in bytes of all; read by live displays in another thread.

    `stage` says in words what is being done, where that is more than the job's own stage.
    """

    total_bytes: int = 0
    done_bytes: int = 0
    stage: str = ""

    def begin(self, stage: str, total_bytes: int) -> None:
        """Have another stage begin."""
        self.stage, self.done_bytes, self.total_bytes = stage, 0, total_bytes

    def end(self) -> None:
        """Have nothing be under way any more."""
        self.begin("", 0)

    def add(self, num_bytes: int) -> None:
        """Have so much more be done."""
        self.done_bytes += num_bytes

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
    loading.begin("loading weights", sum(place.flat.nbytes for place in places))
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
                loading.add(place.flat.nbytes)

    # Daemons: Ctrl-C must not wait until all is read.
    threads = [Thread(target=work, name=f"reader {index}", daemon=True) for index in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
