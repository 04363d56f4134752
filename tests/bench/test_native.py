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
from executor.formats import packed_in
from executor.model import Activation, ExpertWeights, Glu, Routing, Workspace, decode_attention, run_experts
from executor.model.crossings import ALWAYS, assumed
from executor.native import Kernels
from executor.native.mixers import DeltaStep, Logits, SplitQuery
from hrm.contract.rings import STAGING_PAGES
from hrm.formats import packed_format
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
PACKED = ("fp8", "fp8-b128", "int8", "int8-g32-f16", "int4-g32", "int4-g128-f16-z", "mxfp4", "nvfp4")
PACKED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
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


def products_roof(timer, dtype):
    """FLOPs per second of matrices that are in caches, by us or by torch, whichever is faster."""
    x, weight, out = (torch.randn(rows, 1024).to(dtype) for rows in (1536, 1024, 1536))
    seconds = min(
        timer.best_s(lambda: fastest().linear(x, weight, out, add=False)),
        timer.best_s(lambda: torch.mm(x, weight.T, out=out)),
    )
    return 2 * x.numel() * len(weight) / seconds


def scaling_roof(timer, memory):
    """Bytes per second, read and written, of scaling float32 where it lies."""
    numbers = memory.view(torch.float32)
    return 2 * memory.nbytes / timer.best_s(lambda: numbers.mul_(1.0))


def show(seconds, label, **roof_seconds):
    """By which roof work is limited, and which share of it was reached."""
    limit = max(roof_seconds, key=lambda name: roof_seconds[name])
    share = roof_seconds[limit] / seconds
    print(f"  {label:<42} {seconds * 1e3:8.3f} ms, {share:4.0%} of the roof of {limit}")


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
    """Also of more tokens than the kernels would be given."""
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

            with assumed(ALWAYS):
                compare(timer, memory, num_bytes, work, f"{str(dtype)[6:]}, {rows} rows an expert")


def test_packed(timer, memory):
    """Products with packed matrices: bytes as stored against the read roof, or FLOPs against that of products.

    Beside it FLOPs against the plain bfloat16 kernel's.
    """
    print(heading(timer, "products with packed weights, bfloat16 tokens"))
    size = 4096
    plain = filled(torch.bfloat16, 2, size, size)
    memory.fill_(0x33)  # numbers of moderate size in every format
    for tokens in PACKED_TOKENS:
        x, out = torch.randn(tokens, size).bfloat16(), torch.empty(tokens, size).bfloat16()

        def seconds_each(matrices, x=x, out=out):
            def work():
                for matrix in matrices:
                    fastest().linear(x, matrix, out, add=False)

            return timer.best_s(work) / len(matrices)

        plain_s = seconds_each(plain)
        for name in PACKED:
            form = packed_format(name)
            assert form is not None
            stored = form.bytes_of(size, size)
            bytes_of_all = memory[: CACHE_BYTES // stored * stored].view(-1, stored)
            some = bytes_of_all if tokens <= 8 else bytes_of_all[:2]  # what is computed longer need not be far
            packed_s = seconds_each([packed_in(form, size, size, each) for each in some])
            rate, flops = stored / packed_s, 2 * tokens * size * size / packed_s
            of_reading, of_products = rate / roof(timer, memory), flops / products_roof(timer, torch.bfloat16)
            limit = "reading" if of_reading > of_products else "products"
            print(
                f"  {name:<18} {tokens:>4} tokens  {rate / 1e9:6.1f} GB/s, {of_reading:4.0%} of reading"
                f"  {flops / 1e9:6.0f} GFLOP/s, {of_products:4.0%} of products"
                f"  {max(of_reading, of_products):4.0%} of the tighter, {limit}"
                f"  {plain_s / packed_s:4.0%} of plain bfloat16's"
            )


def test_attention_with_options(timer, memory):
    """gpt-oss's windows with sinks, and heads of 512 with a cap: each call attends to the next rows."""
    print(heading(timer, "decode attention with options, bfloat16"))
    options: tuple[tuple[str, int, int, int, int, Logits], ...] = (
        ("64/8x64 with sinks over 128", 64, 8, 64, 128, Logits(sinks_H=torch.randn(64))),
        ("64/8x64 with sinks over 4096", 64, 8, 64, 4096, Logits(sinks_H=torch.randn(64))),
        ("16/2x512 over 1024", 16, 2, 512, 1024, Logits()),
        ("16/2x512 capped over 1024", 16, 2, 512, 1024, Logits(softcap=30.0)),
    )
    for label, heads, kv_heads, head_dim, context, logits in options:
        cache = memory.view(torch.bfloat16).view(-1, 2, kv_heads, head_dim)
        batch, places = 32, len(cache) // context
        queries = torch.randn(batch, heads * head_dim).bfloat16()
        out = torch.empty_like(queries)
        calls = [[context * (c + r) for r in range(batch)] for c in range(0, places - batch + 1, batch)]

        def work(queries=queries, cache=cache, calls=calls, context=context, out=out, logits=logits):
            for starts in calls:
                fastest().decode_attention(queries, cache, starts, [context] * len(starts), out, logits)

        seconds = timer.best_s(work)
        num_bytes = len(calls) * batch * context * cache[0].nbytes
        flops = 2 * len(calls) * batch * context * heads * 2 * head_dim
        reading, products = roof(timer, memory), products_roof(timer, torch.bfloat16)
        show(seconds, label, memory=num_bytes / reading, products=flops / products)


def test_latent_attention(timer, memory):
    """DeepSeek-V3's, DeepSeek-V2-Lite's and GLM-4.7-Flash's heads."""
    print(heading(timer, "latent attention"))
    cases = [(heads, torch.bfloat16) for heads in ((128, 128, 128), (16, 128, 128), (20, 192, 256))]
    cases += [((16, 128, 128), dtype) for dtype in DTYPES[1:]]
    rank, rope = 512, 64
    for (heads, nope, value_dim), dtype in cases:
        kv_up = filled(dtype, heads, nope + value_dim, rank)
        for batch, context in ((1, 4096), (8, 1024), (32, 1024)):
            cache = filled(dtype, batch * context, rank + rope)
            queries = torch.randn(batch, heads, nope + rope).to(dtype)
            out = torch.empty(batch, heads, value_dim, dtype=dtype)
            starts, lengths = [r * context for r in range(batch)], [context] * batch

            def work(queries=queries, nope=nope, cache=cache, kv_up=kv_up, starts=starts, lengths=lengths, out=out):
                query = SplitQuery(queries[..., :nope], queries[..., nope:])
                fastest().latent_attention(query, cache, kv_up, starts, lengths, 0.1, out)

            seconds = timer.best_s(work)
            flops = 2 * batch * heads * (rank * (nope + value_dim) + context * (2 * rank + rope))
            num_bytes = cache.nbytes + kv_up.nbytes
            reading, products = roof(timer, memory), products_roof(timer, dtype)
            label = f"{heads} heads, {str(dtype)[6:]} {batch} x {context}"
            show(seconds, label, memory=num_bytes / reading, products=flops / products)


def test_gated_delta(timer, memory):
    """Qwen3-Next's heads, and Qwen3.5-397B's; each call steps the next requests of many."""
    print(heading(timer, "gated delta rule"))
    key_heads, dim, kernel = 16, 128, 4
    for value_heads in (32, 64):
        states = memory.view(torch.float32).zero_().view(-1, value_heads, dim, dim)
        channels = (2 * key_heads + value_heads) * dim
        conv_states = torch.zeros(len(states), kernel - 1, channels).bfloat16()
        convolution = torch.randn(channels, kernel).bfloat16()
        for batch in (1, 8, 32):
            qkv, gates = torch.randn(batch, channels).bfloat16(), torch.randn(batch, value_heads).bfloat16()
            numbers, out = torch.randn(value_heads), torch.empty(batch, value_heads * dim).bfloat16()
            step = DeltaStep(qkv, convolution, conv_states, states, gates, gates, numbers, numbers)
            calls = [list(range(first, first + batch)) for first in range(0, len(states), batch)]

            def work(step=step, calls=calls, out=out):
                for rows in calls:
                    fastest().gated_delta_step(step, rows, out)

            seconds = timer.best_s(work)
            num_bytes = 2 * (states.nbytes + conv_states.nbytes)
            label = f"{key_heads}/{value_heads} heads, batch {batch}"
            show(seconds, label, scaling=num_bytes / scaling_roof(timer, memory))


def test_experts_with_options(timer, memory):
    """gpt-oss's experts: biases and the clamped activation; and GELU."""
    print(heading(timer, "experts with options, bfloat16"))
    size, num_experts = 2880, 4
    weights = [
        ExpertWeights(
            filled(torch.bfloat16, 2 * size, size),
            filled(torch.bfloat16, size, size),
            torch.randn(2 * size).bfloat16(),
            torch.randn(size).bfloat16(),
        )
        for _ in range(num_experts)
    ]
    for rows in (1, 8):
        x, out = torch.randn(rows * num_experts, size).bfloat16(), torch.zeros(rows * num_experts, size).bfloat16()
        chosen = (torch.arange(len(x)) % num_experts).view(-1, 1)
        scratch = torch.empty(len(x) * fastest().activation_floats(size))
        for activation in Activation:
            glu = Glu(activation, limit=7.0)

            def work(x=x, chosen=chosen, out=out, scratch=scratch, glu=glu):
                routing, numbered = Routing(torch.ones(len(x), 1), chosen), list(enumerate(weights))
                fastest().run_experts(x, routing, numbered, out, scratch, max_tokens=len(x), glu=glu)

            seconds = timer.best_s(work)
            num_bytes = sum(each.w13.nbytes + each.w2.nbytes for each in weights)
            reading, products = roof(timer, memory), products_roof(timer, torch.bfloat16)
            label = f"{activation.name.lower()} and biases, {rows} rows an expert"
            show(seconds, label, memory=num_bytes / reading, products=rows * num_bytes / products)


def test_rotation(timer, memory):
    """Of halves of heads of 128; the roof is scaling as many rows where they lie."""
    print(heading(timer, "rotations of a part, bfloat16"))
    heads, head_dim = 36, 128
    rows = memory.view(torch.bfloat16)[: 8192 * heads * head_dim].view(-1, heads * head_dim)
    positions, frequencies = torch.arange(len(rows)), 1e4 ** -(torch.arange(32) / 32)
    for interleaved in (False, True):
        how = {"head_dim": head_dim, "interleaved": interleaved}

        def work(how=how):
            fastest().rotate(rows, heads, positions, frequencies, **how)

        label = "interleaved pairs" if interleaved else "pairs that lie apart"
        show(timer.best_s(work), label, scaling=2 * rows.nbytes / scaling_roof(timer, memory))


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
