"""Copies by every path against torch, byte for byte, and nothing beside them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor import native
from executor.backends import make_backend
from executor.backends.base import copy_all, stage
from hrm.tasks import Lane
from hrm.units import MIB
from tests.executor.native.support import PATHS, on_threads

MOST = 5 * MIB
MARGIN = 200


@pytest.fixture(scope="module")
def memory():
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, 256, (MOST + MARGIN,), dtype=torch.uint8, generator=generator)
    return source, torch.empty(MOST + 2 * MARGIN, dtype=torch.uint8)


sizes = st.one_of(st.integers(0, 1000), st.integers(MIB - 300, MIB + 300), st.integers(0, MOST))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40)
@given(size=sizes, source_at=st.integers(0, 130), target_at=st.integers(0, 130))
def test_equals_torch(memory, path, threads, size, source_at, target_at):
    source, target = memory
    target.fill_(7)
    expected = target.clone()
    part = source[source_at : source_at + size]
    expected[target_at : target_at + size].copy_(part)
    kernels = native.Kernels(path)
    to = target[target_at : target_at + size]
    on_threads(threads, lambda: kernels.copy(to, part))
    assert torch.equal(target, expected)


@pytest.mark.parametrize("kernels", [None, *(native.Kernels(path) for path in native.paths())])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pages_are_staged_whoever_copies(kernels, dtype):
    torch.manual_seed(0)
    source = torch.randn(3 * MIB + 5).to(dtype)
    whole, strided = torch.zeros_like(source), torch.zeros(1000, 2, dtype=dtype)
    pairs = [(whole[1:], source[1:]), (strided[:, 1], source[:1000]), (strided[:0], strided[:0])]
    with native.using(kernels):
        assert copy_all(pairs, stage) == copy_all(pairs)
    assert torch.equal(whole[1:], source[1:])
    assert whole[0] == 0
    assert torch.equal(strided[:, 1], source[:1000])
    assert not strided[:, 0].any()


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_copied_is_left_to_torch(path):
    takes = native.Kernels(path).takes_copy
    one, other = torch.zeros(2 * MIB, 4), torch.ones(2 * MIB, 4)
    assert takes(one, other)
    assert not takes(one, other.double())
    assert not takes(one, other.view(4, -1))
    assert not takes(one[:, 1:], other[:, 1:])
    assert not takes(one, other[0].expand(one.shape))
    assert not takes(one[:1000], other[:1000]), "it may still be in a cache when it is read"
    assert not takes(one.to("meta"), other)


def test_the_emulated_accelerator_stages_with_the_kernels():
    from tests.contracts.test_backends import machine

    copied: list[int] = []

    class Counting:
        def takes_copy(self, *_):
            return True

        def copy(self, target, source):
            copied.append(source.nbytes)
            target.copy_(source)

    backend = make_backend("emulated", machine(1e9))
    pair = (torch.zeros(1000), torch.ones(1000))
    counting: Any = Counting()
    with native.using(counting):
        assert backend.transfer(Lane.STAGE, [pair]) == 4000
    assert copied == [4000]
    assert torch.equal(*pair)
