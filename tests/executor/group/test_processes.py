"""Real processes against plain sums, rows and lists."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from executor.group import Alone, share_of
from executor.group.measure import sums_between
from executor.group.processes import ProcessGroup
from executor.group.store import open_store
from tests.executor.group.ranks import in_ranks
from tests.executor.group.together import ROWS, all_logits, do_all, lose, summand
from tests.executor.runtime.device_tensor import DeviceTensor, WithDevice


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_ranks_do_together(size):
    found = in_ranks(size, do_all)
    for rank, (sums, is_sum_of_pieces, shares, gathered, agreed, told, collected) in enumerate(found):
        assert is_sum_of_pieces
        for (dtype, shape), total in sums.items():
            terms = [summand(other, dtype, shape).double() for other in range(size)]
            eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0
            slack = size * eps * sum(term.abs() for term in terms)
            assert ((total.double() - sum(terms)).abs() <= slack).all()
            assert torch.equal(total.view(torch.uint8), found[0][0][dtype, shape].view(torch.uint8))
        for rows in ROWS:
            own = share_of(rank, size, rows)
            assert torch.equal(shares[rows], all_logits(rows, 7 * size)[own.start : own.stop])
            for numbers in gathered[rows]:
                assert numbers.tolist() == list(range(rows))
        assert agreed == [0, 1, 2]
        assert told == [b"", b"batch", bytes(range(256)) * 999]
        assert collected == [b"x" * other for other in range(size)]


def test_one_rank_alone_has_everything_already():
    alone, rows = Alone(), torch.randn(3, 5)
    alone.all_reduce(rows)
    assert alone.exchange_rows(rows) is rows
    assert alone.gather(rows[0], 5) is not None
    assert (alone.agree(7), alone.broadcast(b"x"), alone.collect(b"y")) == (7, b"x", [b"y"])


@pytest.mark.parametrize("cards", [("a", "a"), ("a", "b")])
def test_ranks_meet_on_their_cards_unless_they_share_one(cards, monkeypatch):
    """On cards that are none, with a stand-in for NCCL, which refuses two ranks on a card."""
    made, here = [], threading.local()

    class Nccl:
        def __init__(self, store, rank, size, timeout):
            made.append((rank, size, timeout.total_seconds()))

        def allreduce(self, tensors):
            tensors[0].fill_(-1.0)
            return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr("torch.distributed.ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=here.card))
    store = HashStore()

    def rank(number):
        here.card = cards[number]
        group = ProcessGroup(store, number, 2, timeout=60.0)
        with WithDevice():
            tensor = DeviceTensor(torch.full((3,), 1.0 + number))
            group.all_reduce(tensor)
        group.close()
        return tensor.tolist()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    if cards[0] == cards[1]:
        assert (made, found) == ([], 2 * [[3.0] * 3])
    else:
        assert (sorted(made), found) == ([(0, 2, 60.0), (1, 2, 60.0)], 2 * [[-1.0] * 3])


@pytest.mark.parametrize(("how", "said"), [("killed", "has ended"), ("late", "did not come within 1 s")])
def test_a_rank_that_is_gone_or_late_fails_what_waits_for_it_and_all_that_follows(how, said):
    told, _ = in_ranks(2, lose, how, timeout=1.0 if how == "late" else 60.0)
    assert len(told) == 3
    assert all(told[0] == one for one in told), told
    assert "rank 0" in told[0], told[0]
    assert said in told[0]


class GoneError(Exception):
    """What whoever watches the other rank finds out."""


@pytest.mark.parametrize("told", [(), ("process", "memory")])
def test_a_rank_that_is_gone_before_all_have_met_is_waited_for_only_as_long_as_nobody_knows(told):
    """It has come, and perhaps told what it has, but forms no group any more, for which torch waits a year."""
    store, _ = open_store()
    store.set("rank 1 is here", "")
    for what in told:
        store.set(f"shared/{what} of rank 1", "0")
    looks = iter(range(3))

    def look():
        if next(looks, None) is None:
            raise GoneError

    with pytest.raises(GoneError):
        ProcessGroup(store, 0, 2, look=look)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_all_there_is_and_even(size):
    for count in range(12):
        shares = [share_of(rank, size, count) for rank in range(size)]
        assert [index for share in shares for index in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sums_are_timed_between_processes_of_their_own():
    found = sums_between(2, (64, 4096))
    assert set(found) == {64, 4096}
    assert all(0 < seconds < 10 for taken in found.values() for seconds in taken)
