import gc
import threading

import pytest


@pytest.fixture(autouse=True)
def no_thread_left_behind():
    """Every run ends all the threads that it started."""
    before = set(threading.enumerate())
    yield
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not {name for name in left if name.startswith(("lane-", "progress"))}


@pytest.fixture
def no_collection():
    """No garbage collection: an interrupt that strikes in a callback of it is lost in Python."""
    gc.disable()
    yield
    gc.enable()
