"""Which kernels are taken: those built, the fastest path, or what EXECUTOR_NATIVE says."""

import pytest
import torch

from executor import native
from executor.errors import RunError
from tests.executor.native.support import PATHS


@pytest.fixture
def choose(monkeypatch):
    """What is chosen with that in the environment, and with those paths built."""

    def chosen(value, paths=("avx2", "portable")):
        if value is None:
            monkeypatch.delenv(native.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(native.VARIABLE, value)
        monkeypatch.setattr(native, "paths", lambda: list(paths))
        native._chosen.cache_clear()
        return native.kernels()

    yield chosen
    native._chosen.cache_clear()


def test_the_fastest_path_is_taken(choose):
    assert choose(None) == choose("1") == native.Kernels("avx2")
    assert native.description() == "native (avx2)"


def test_a_path_can_be_named(choose):
    assert choose("portable") == native.Kernels("portable")


def test_native_kernels_can_be_turned_off(choose):
    assert choose("0") is None
    assert native.description() == "torch (EXECUTOR_NATIVE=0)"


@pytest.mark.parametrize(("compiler", "why"), [(None, "no C++ compiler"), ("/usr/bin/g++", "pip install --verbose")])
def test_without_kernels_torch_does_the_work_and_says_why(choose, monkeypatch, compiler, why):
    monkeypatch.setattr(native, "which", lambda name: compiler)
    assert choose(None, paths=()) is None
    assert native.description().startswith("torch")
    assert why in native.description()


def test_a_path_that_is_not_there_is_the_users_mistake(choose):
    with pytest.raises(RunError, match=r"EXECUTOR_NATIVE.*avx9.*0, 1, avx2, portable"):
        choose("avx9")


@pytest.mark.parametrize("path", PATHS)
def test_every_path_reads(path):
    native.Kernels(path).read(torch.ones(10_000_000, dtype=torch.uint8))
