"""Where ranks find one another: a store of torch's, which listens on this machine's own loop alone."""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch.distributed
from torch.distributed.distributed_c10d import Store

LOOP: Final = "127.0.0.1"
_MEETING: Final = timedelta(minutes=5)  # for others to have come this far: each imports torch first
_LOOK_S: Final = 0.01

_T = TypeVar("_T")

_TCP_STORE: Any = torch.distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage]


def open_store() -> tuple[Store, int]:
    """A new store and its port, one that is free; it is closed with the object."""
    # Torch by itself would listen on every network.
    server = socket.create_server((LOOP, 0))
    port = server.getsockname()[1]
    store = _TCP_STORE(
        LOOP, port, is_master=True, timeout=_MEETING, wait_for_workers=False, master_listen_fd=server.detach()
    )
    return store, port


def join_store(host: str, port: int) -> Store:
    """The store that another process has opened."""
    return _TCP_STORE(host, port, timeout=_MEETING)


def meet(store: Store, rank: int, size: int, look: Callable[[], object]) -> None:
    """Return on rank 0 when all other ranks have called this too, and there at once."""
    others = [f"rank {other} is here" for other in range(1, size)]
    if rank:
        store.set(others[rank - 1], "")
    else:
        wait_until_told(store, others, look)


def wait_until_told(store: Store, keys: Sequence[str], look: Callable[[], object]) -> None:
    """Return when the store has all keys.

    Until then this calls `look`, which may raise: what waits within the store itself cannot be interrupted.
    """
    while not store.check(list(keys)):
        look()
        time.sleep(_LOOK_S)


def beside(look: Callable[[], object], work: Callable[[], _T]) -> _T:
    """What `work` returns, which cannot be interrupted; until then this calls `look`, which may raise.

    The work goes on in a thread of its own then, with nobody to wait for it.
    """
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, name="meeting", daemon=True).start()
    while not wait([done], timeout=_LOOK_S).done:
        look()
    return done.result()
