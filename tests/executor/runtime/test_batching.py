"""Algorithm 2: nobody is dropped, no cache is exceeded, μ is kept."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.batching import Batch, Batcher, ChunkPart, MicroBatch, Request, chunks, pack
from executor.sampling import SamplingParams
from hrm.contract.rows import KV_BLOCK_TOKENS
from hrm.policy import kv_tokens_for
from hrm.schedules import pages_of
from hrm.workload import Workload
from tests.executor.runtime.support import make_policy

policies = st.builds(
    lambda micro, count, last, blocks, on_gpu: make_policy(
        2,
        micro_batch_size=micro,
        batch_size=max((count - 1) * micro + min(last, micro), micro),
        kv_tokens_per_micro_batch=blocks * KV_BLOCK_TOKENS,
        gpu_kv_micro_batches=min(on_gpu, count),
        prefill_chunk_tokens=256,
    ),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(16, 40),
    st.integers(0, 5),
)
request_lists = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 56)), max_size=60).map(
    lambda sizes: [
        Request(str(index), (1,) * length, SamplingParams(max_tokens=new)) for index, (length, new) in enumerate(sizes)
    ]
)

kinds = st.sampled_from([lambda _: None, lambda request: len(request.prompt) > 100])


def test_prompts_that_are_all_alike_come_in_as_many_chunks_as_planned():
    for length in (1, 7, 32, 200):
        for count in (1, 3, 5, 8, 17):
            micro_batch = MicroBatch([])
            for index in range(count):
                micro_batch.add(Request(str(index), (1,) * length, SamplingParams(max_tokens=1)))
            workload = Workload(name="alike", prompt_len=length, max_prompt_len=length, gen_len=1)
            for most in (1, 6, 31, 32, 33, 100, 114, 10**6):
                assert len(chunks(Batch((micro_batch,)), most)) == workload.chunks(count, most), (length, count, most)


@given(request_lists, policies, kinds)
def test_no_request_is_dropped_and_no_limit_exceeded(requests, policy, kind):
    seen: list[str] = []
    for batch in Batcher(iter(requests), policy, kind):
        assert len({kind(request) for request in batch.requests}) == 1
        assert 1 <= len(batch.micro_batches) <= policy.num_micro_batches
        assert batch.num_requests <= policy.batch_size
        for micro_batch in batch.micro_batches:
            assert 1 <= len(micro_batch.placed) <= policy.micro_batch_size
            end = 0
            for placed in micro_batch.placed:
                assert placed.start == end
                assert placed.start % KV_BLOCK_TOKENS == 0
                end += placed.request.kv_tokens
                seen.append(placed.request.name)
            assert end <= policy.kv_tokens_per_micro_batch
    assert sorted(seen) == sorted(request.name for request in requests)


LENGTHS: dict[str, Callable[[Random], int]] = {
    "skewed": lambda rng: min(512, 1 + int(80 * rng.lognormvariate(0, 1))),
    "few long": lambda rng: 512 if rng.random() < 0.1 else rng.randint(1, 128),
    "even": lambda rng: rng.randint(1, 512),
    "nearly equal": lambda rng: rng.randint(510, 512),
}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_planned_cache_holds_a_whole_batch_with_no_few_requests_left_over(lengths):
    rng = Random(lengths)
    for _trial in range(60):
        size, count = rng.choice([1, 2, 3, 6, 13, 36]), rng.choice([2, 3, 8, 43])
        requests = [
            Request("", (1,) * LENGTHS[lengths](rng), SamplingParams(max_tokens=32))
            for _ in range(size * count - rng.randrange(size))
        ]
        contexts = [len(request.prompt) + 32 for request in requests]
        policy = make_policy(
            2,
            micro_batch_size=size,
            batch_size=len(requests),
            kv_tokens_per_micro_batch=kv_tokens_for(size, sum(contexts) / len(contexts), max(contexts)),
        )
        assert not pack(requests, policy)[1], (size, count)


@given(request_lists, policies, kinds)
def test_nothing_waits_for_more_than_one_batch_while_later_ones_run(requests, policy, kind):
    order = {request.name: index for index, request in enumerate(requests)}
    waiting: set[str] = set()
    done: set[str] = set()
    for batch in Batcher(iter(requests), policy, kind):
        names = {p.request.name for mb in batch.micro_batches for p in mb.placed}
        if waiting:
            assert min(waiting, key=order.__getitem__) in names
        done |= names
        last = max(order[name] for name in names)
        waiting = {request.name for request in requests[: last + 1]} - done


@given(request_lists.filter(bool), policies, st.sampled_from([1, 2, 7, 40, 100, 200, 256]))
def test_chunks_hold_every_prompt_once_within_the_limit(requests, policy, limit):
    batch, _ = pack(requests[: policy.batch_size], policy)
    made = chunks(batch, limit)
    offset = 0
    seen: dict[str, list[ChunkPart]] = {}
    for chunk in made:
        assert chunk.offset == offset
        assert 1 <= chunk.num_tokens <= limit
        offset += chunk.num_tokens
        end = 0
        for part in chunk.parts:
            assert part.first == end
            end = part.last
            seen.setdefault(part.placed.request.name, []).append(part)
    prompts = {p.request.name: p.request.prompt for mb in batch.micro_batches for p in mb.placed}
    assert seen.keys() == prompts.keys()
    for name, parts in seen.items():
        assert parts[0].start == 0
        assert all(before.end == after.start for before, after in pairwise(parts))
        assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
        assert sum((part.tokens for part in parts), ()) == prompts[name]
        assert len(parts) == 1 or len(prompts[name]) > limit, "what fits a chunk is not split"


@given(request_lists.filter(bool), policies, st.sampled_from([1, 2, 7, 40, 100, 200]))
def test_no_more_than_one_prompt_is_under_way_between_chunks(requests, policy, limit):
    batch, _ = pack(requests[: policy.batch_size], policy)
    under_way: ChunkPart | None = None
    for chunk in chunks(batch, limit):
        for number, part in enumerate(chunk.parts):
            if part.start:
                assert number == 0
                assert under_way is not None
                assert (under_way.placed, under_way.end) == (part.placed, part.start)
                under_way = None
            assert under_way is None
            if not part.ends:
                under_way = part
                assert part.last == chunk.num_tokens == limit
    assert under_way is None


@given(policies, st.integers(1, 5))
def test_smaller_batch_fits_the_memory_of_the_whole(policy, count):
    count = min(count, policy.num_micro_batches)
    smaller = Batch((MicroBatch([]),) * count).policy(policy)
    assert smaller.num_micro_batches == count
    assert smaller.gpu_kv_micro_batches <= policy.gpu_kv_micro_batches
    on_host = policy.num_micro_batches - policy.gpu_kv_micro_batches
    assert count - smaller.gpu_kv_micro_batches <= on_host
    assert pages_of(smaller) == pages_of(policy)


def test_longest_first_into_the_emptiest():
    policy = make_policy(1, micro_batch_size=2, batch_size=4, kv_tokens_per_micro_batch=256)
    wanted = [Request(str(length), (1,) * length, SamplingParams(max_tokens=1)) for length in (10, 100, 60, 40)]
    batch, waiting = pack(wanted, policy)
    assert waiting == []
    names = [[p.request.name for p in mb.placed] for mb in batch.micro_batches]
    assert names == [["100", "10"], ["60", "40"]]
