import os
from pathlib import Path

import pytest
import torch

from executor.ranks import workers
from tests.executor.ranks import forked
from tests.executor.tiny_models import MODELS, save_tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two cores are shared with the other workers of pytest-xdist."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_core():
    """All threads that the test starts take turns on a core, each worker of pytest-xdist on its own.

    Tasks of tiny models are over so soon that to wake one another across cores costs lanes as much again. They change
    places as often as on all cores, so that a wait that is missing is still seen; what is not safe at the same moment
    is for those that want `all_cores`.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield set[int]()
        return
    before = os.sched_getaffinity(0)  # 0 is the calling thread: threads that are there already stay where they are
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(before)[worker % len(before)]})
    yield before
    os.sched_setaffinity(0, before)


@pytest.fixture
def all_cores(one_core):
    """The other cores too, so that kernels of two lanes run at the same moment."""
    if one_core:
        os.sched_setaffinity(0, one_core)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    """A random checkpoint of each of the tiny models."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(name, root / name.replace(" ", "-")) for name in MODELS}


@pytest.fixture(params=MODELS)
def tiny_folder(request, tiny_folders) -> Path:
    """A random checkpoint, of each tiny model in turn."""
    return tiny_folders[request.param]


@pytest.fixture
def forked_ranks(monkeypatch) -> list[forked.Popen]:
    """Ranks that are started come of a process with all imports done; returns those that have been started."""
    started: list[forked.Popen] = []
    monkeypatch.setattr(forked.Popen, "started", started)
    monkeypatch.setattr(workers, "subprocess", forked)
    return started
