"""The native kernels against the memory's read roof and against torch.

Each table is taken twice: on all cores by the clock on the wall, which other programs disturb, and
on one core by the time that it really computed, which they hardly do. The roof is measured beside
each line, by reading memory with the same number of threads.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from executor import native
from executor.backends.base import host_memory, stage
from executor.model import ExpertWeights, Routing, Workspace, decode_attention, experts, run_experts
from executor.native import Kernels
from hrm.contract.rings import STAGING_PAGES
from hrm.profiling.environment import usable_cores
from hrm.units import MIB, format_bytes
from tests.executor.tiny_models import tiny_arch

CONTEXTS = (128, 512, 1024, 4096)
BATCHES = (1, 4, 32)
HEADS = ((32, 8, 128), (16, 4, 64))
PAGES = (MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MANY_ROWS = (128, 256, 512)  # in bfloat16 only: in the others torch would take minutes
CACHED_BYTES = MIB // 2  # of keys and values that a core attends over again and again
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CACHE_BYTES = 256 * MIB  # beyond what a core finds in a shared cache on a busy machine
REPEATS = 3

pytestmark = pytest.mark.skipif(not native.paths(), reason="the native kernels are not built")


@dataclass(frozen=True)
class Timer:
    name: str
    threads: int
    clock: Callable[[], float]

    def best_s(self, work):
        work()
        seconds = []
        for _ in range(REPEATS):
            start_s = self.clock()
            work()
            seconds.append(self.clock() - start_s)
        return min(seconds)


TIMERS = (
    Timer("all cores, by the wall's clock", usable_cores(), time.perf_counter),
    Timer("one core, by its own time", 1, time.thread_time),
)


@pytest.fixture(params=TIMERS, ids=lambda timer: timer.name)
def timer(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param.threads)
    with torch.inference_mode():
        yield request.param
    torch.set_num_threads(before)


def filled(dtype, *shape):
    """Random numbers in memory as a run has it."""
    numbers = host_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    for part in numbers:
        part.copy_(torch.randn(part.shape).mul_(0.02))
    return numbers


@pytest.fixture(scope="module")
def memory():
    return host_memory(CACHE_BYTES).fill_(1)


def fastest():
    return Kernels(native.paths()[0])


def heading(timer, title):
    load = os.getloadavg()[0]
    path = native.paths()[0]
    return f"\n{title}: {timer.name} ({timer.threads}), {path}, load average {load:.1f}"


def roof(timer, memory):
    return memory.nbytes / timer.best_s(lambda: fastest().read(memory))


def compare(timer, memory, num_bytes, work, label):
    speeds = []
    for kernels in (fastest(), None):
        with native.using(kernels):
            speeds.append(num_bytes / timer.best_s(work))
    limit = roof(timer, memory)
    print(
        f"  {label:<34} native {speeds[0] / 1e9:5.1f}  torch {speeds[1] / 1e9:5.1f}  "
        f"roof {limit / 1e9:5.1f} GB/s  {speeds[0] / limit:4.0%} of it"
    )


def test_attention(timer, memory):
    print(heading(timer, "decode attention, GB/s of keys and values"))
    for heads, kv_heads, head_dim in HEADS:
        arch = tiny_arch(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
        width = (heads + 2 * kv_heads) * head_dim
        for dtype in DTYPES:
            token_bytes = 2 * kv_heads * head_dim * dtype.itemsize
            tokens = CACHE_BYTES // token_bytes
            cache = filled(dtype, 16, tokens // 16, 2, kv_heads, head_dim).flatten(0, 1)
            for batch in BATCHES:
                for context in CONTEXTS:
                    places = tokens // context  # each call attends to the next part of the cache
                    calls = places // batch
                    if not calls:
                        continue
                    qkv = torch.randn(batch, width).to(dtype)
                    out = torch.empty(batch, heads * head_dim, dtype=dtype)
                    starts = [[context * (c * batch + r) for r in range(batch)] for c in range(calls)]
                    lengths = [context] * batch

                    def work(arch=arch, cache=cache, qkv=qkv, out=out, starts=starts, lengths=lengths):
                        for places in starts:
                            decode_attention(arch.spec.attention, qkv, cache, places, lengths, out)

                    num_bytes = calls * batch * context * token_bytes
                    label = f"{heads}/{kv_heads}x{head_dim} {str(dtype)[6:]} {batch} x {context}"
                    compare(timer, memory, num_bytes, work, label)
            context = CACHED_BYTES // token_bytes

            def again(arch=arch, cache=cache, qkv=qkv, out=out, context=context):
                decode_attention(arch.spec.attention, qkv, cache, [0] * len(qkv), [context] * len(qkv), out)

            label = f"{heads}/{kv_heads}x{head_dim} {str(dtype)[6:]} over one that is cached"
            compare(timer, memory, len(qkv) * context * token_bytes, again, label)


def test_experts(timer, memory):
    """Where torch's speed passes ours is what `max_native_tokens` is set by."""
    print(heading(timer, "experts, GB/s of weights"))
    hidden, intermediate, num_experts = 2048, 5632, 3
    for dtype in DTYPES:
        weights = [
            ExpertWeights(filled(dtype, 2 * intermediate, hidden), filled(dtype, hidden, intermediate))
            for _ in range(num_experts)
        ]
        num_bytes = sum(each.w13.nbytes + each.w2.nbytes for each in weights)
        for rows in (*ROWS, *(MANY_ROWS if dtype is torch.bfloat16 else ())):
            tokens = rows * num_experts
            x, out = torch.randn(tokens, hidden).to(dtype), torch.zeros(tokens, hidden).to(dtype)
            chosen = (torch.arange(tokens) % num_experts).view(tokens, 1)
            routing = Routing(torch.rand(tokens, 1), chosen)
            workspace = Workspace(torch.empty(64 * MIB, dtype=torch.uint8))

            def work(x=x, out=out, routing=routing, weights=weights, workspace=workspace):
                run_experts(x, routing, enumerate(weights), out, workspace)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(experts, "max_native_tokens", lambda _: 1 << 30)
                compare(timer, memory, num_bytes, work, f"{str(dtype)[6:]}, {rows} rows an expert")


def test_staging(timer, memory):
    """Pages one after the other into a ring of a few; what is copied is read and written."""
    print(heading(timer, "staging, GB/s of what is copied"))
    for page_bytes in PAGES:
        ring = host_memory(STAGING_PAGES * page_bytes).fill_(1).view(STAGING_PAGES, -1)
        pages = list(memory.view(-1, page_bytes))
        copies = [(ring[i % STAGING_PAGES], page) for i, page in enumerate(pages)]

        def work(copies=copies):
            for copy in copies:
                stage(*copy)

        compare(timer, memory, memory.nbytes, work, f"pages of {format_bytes(page_bytes)}")
