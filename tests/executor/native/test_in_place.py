"""What is written over and added up in place against torch, bit by bit, and nothing beside it."""

from functools import partial

import pytest
import torch

from executor import native
from executor.model.in_place import add, clear, put
from executor.native.tape import Numbers, Tape
from tests.executor.model.tolerances import DTYPES
from tests.executor.native.support import PATHS, on_threads

MARGIN = 3


def numbers(count, dtype, *, seed):
    """Normal ones, some of them infinite or no numbers."""
    found = torch.randn(count + 2 * MARGIN, generator=torch.Generator().manual_seed(seed)).mul(100).to(dtype)
    found[MARGIN : MARGIN + count : 97] = float("inf" if seed else "nan")
    return found


WORKS = {
    "add": (add, lambda out, x: out.add_(x)),
    "put": (put, lambda out, x: out.copy_(x)),
    "clear": (lambda out, _: clear(out), lambda out, _: out.zero_()),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", WORKS)
def test_equals_torch(name, path, dtype, threads):
    ours_do, torchs = WORKS[name]
    for count in (0, 1, 31, 1000, 70_001):
        within = slice(MARGIN, MARGIN + count)
        ours, x = numbers(count, dtype, seed=1), numbers(count, dtype, seed=0)[within]
        theirs, part = ours.clone(), ours[within]
        with native.using(native.Kernels(path)):
            on_threads(threads, partial(ours_do, part, x))
        torchs(theirs[within], x)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("kernels", [None, *(native.Kernels(path) for path in native.paths())])
def test_what_lies_apart_is_left_to_torch(kernels):
    whole, x = torch.ones(4, 6), torch.full((4, 2), 2.0)
    with native.using(kernels):
        add(whole[:, :2], x)
        put(whole[:, 2:4], x.double())
        clear(whole[:, 5:])
    assert whole.tolist() == 4 * [[3.0, 3.0, 2.0, 2.0, 1.0, 0.0]]


@pytest.mark.parametrize("path", PATHS)
def test_a_tape_does_it_again(path):
    hidden, output, sent = torch.ones(2, 8), torch.full((2, 8), 2.0), torch.empty(2, 8)
    rows = torch.arange(2)

    def work():
        add(hidden, output)
        put(sent, hidden)
        clear(output)

    with native.using(native.Kernels(path)):
        made = Numbers(rows, rows, [0, 1], [1, 1])
        tape = Tape.record(work, made)
        assert tape is not None
        output.fill_(5.0)
        tape.play(made)
    assert (hidden.unique().item(), sent.unique().item(), output.unique().item()) == (8.0, 8.0, 0.0)
