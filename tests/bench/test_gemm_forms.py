"""bfloat16 GEMMs of prefill as torch runs them, and as float32 products of converted weights.

Where a processor's bfloat16 products are no faster than its float32 ones (AVX-512 without AMX), the
second form wins from about a hundred tokens an expert on, conversions of weights and result
included. One thread, its processor time, so that a busy machine disturbs little.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from executor.backends import in_thread_of_its_own
from tests.bench.machine import circumstances
from tests.bench.reference_checkpoint import CONFIG

REPEATS = 9
TOKENS = (8, 32, 64, 128, 256, 512)


def seconds(work: Callable[[], object]) -> float:
    taken: list[float] = []
    for _ in range(REPEATS):
        start_s = time.thread_time()
        work()
        taken.append(time.thread_time() - start_s)
    return median(taken)


def compare() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, twice = CONFIG["hidden_size"], 2 * CONFIG["intermediate_size"]
    weight = (torch.randn(twice, hidden) * hidden**-0.5).to(torch.bfloat16)
    wide = torch.empty(twice, hidden)
    print(f"\ngate and up projection of an expert, {hidden} to {twice}, one thread\n  {circumstances()}")
    print(f"  {'tokens':>6}{'bfloat16':>12}{'converted':>12}   ratio   GFLOP/s of each")
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden).to(torch.bfloat16)
        out, wide_out = x.new_empty(tokens, twice), torch.empty(tokens, twice)

        def narrow(x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            torch.mm(x, weight.T, out=out)

        def converted(x: torch.Tensor = x, out: torch.Tensor = out, wide_out: torch.Tensor = wide_out) -> None:
            wide.copy_(weight)
            out.copy_(torch.mm(x.float(), wide.T, out=wide_out))

        with torch.inference_mode():
            both = seconds(narrow), seconds(converted)
        rates = [2 * tokens * hidden * twice / each_s / 1e9 for each_s in both]
        print(
            f"  {tokens:>6}{both[0] * 1e3:>9.2f} ms{both[1] * 1e3:>9.2f} ms"
            f"{both[0] / both[1]:>8.2f}   {rates[0]:.0f}, {rates[1]:.0f}"
        )


def test_gemm_forms():
    in_thread_of_its_own(compare)
