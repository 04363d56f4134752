"""The GPU's operators one by one, at the sizes of decode and prefill of Mixtral-8x7B."""

import time
from collections.abc import Callable
from statistics import median
from typing import Final

import torch

from executor.backends.cuda import kernels_of
from executor.model.gpu import GpuKernels, grouped_gemm
from tests.bench.first_run.figures import Figures
from tests.bench.first_run.setting import RunSetting

ROWS_OF_AN_EXPERT: Final = (21, 250, 1670)
CONTEXT: Final = 109
REPEATS: Final = 10


def operators(setting: RunSetting, figures: Figures) -> None:
    """Seconds and rates of flash attention and of grouped products, some of whose experts get nothing."""
    suite = setting.suite
    device = "cpu" if suite.emulated else suite.accelerator
    kernels = (
        GpuKernels(None, grouped_gemm()) if suite.emulated else kernels_of(torch.cuda.get_device_capability(device))
    )
    spec, small = suite.scale.spec, suite.scale.name == "small"
    dtype = torch.bfloat16
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    hidden, experts = spec.hidden_size, spec.num_experts
    width = 2 * spec.expert_parameters // (3 * hidden)  # gate and up of three matrices alike
    if kernels.grouped is not None:
        weights = make(experts, width, hidden)
        for rows in ROWS_OF_AN_EXPERT[: 1 if small else None]:
            counts = torch.tensor([rows] * (experts - 2) + [0, 2 * rows], device=device)
            ends, x = counts.cumsum(0).to(torch.int32), make(experts * rows, hidden)
            product = _grouped(kernels, x, weights, ends)
            seconds = _seconds(product, device)
            flops = 2 * experts * rows * hidden * width
            figures.put(f"grouped product, {rows} rows", {"s": seconds, "flops_per_s": flops / seconds})
    if kernels.flash is None:
        figures.leave_out("flash attention", "this accelerator has none")
        return
    heads, groups, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    for requests in (84, 512):
        query, keys, values = (
            make(requests, heads, head_dim),
            *(make(requests * 112, groups, head_dim) for _ in range(2)),
        )
        starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * 112
        queries = torch.arange(requests + 1, dtype=torch.int32, device=device)
        used = torch.full((requests,), CONTEXT, dtype=torch.int32, device=device)
        flash = kernels.flash

        def decode() -> object:
            given = (query, keys, values, queries, starts, 1, CONTEXT, 0.0, False, False)  # noqa: B023
            return flash(*given, seqused_k=used)  # noqa: B023

        seconds = _seconds(decode, device)
        read = requests * CONTEXT * 2 * groups * head_dim * dtype.itemsize
        figures.put(f"flash decode, {requests} requests", {"s": seconds, "bytes_per_s": read / seconds})
    tokens = 4 * 1024
    q, k, v = make(tokens, heads, head_dim), make(tokens, groups, head_dim), make(tokens, groups, head_dim)
    ends = torch.arange(0, tokens + 1, 128, dtype=torch.int32, device=device)
    flash = kernels.flash
    seconds = _seconds(lambda: flash(q, k, v, ends, ends, 128, 128, 0.0, True, False), device)
    figures.put("flash prefill, 128 tokens each", {"s": seconds, "tokens_per_s": tokens / seconds})


def _grouped(
    kernels: GpuKernels, x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> Callable[[], torch.Tensor]:
    assert kernels.grouped is not None
    grouped = kernels.grouped
    return lambda: grouped(x, weights.transpose(-2, -1), offs=ends)


def _seconds(call: Callable[[], object], device: str) -> float:
    """Of one call among several queued, so that launches are hidden as in a run; the median of three rounds."""

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    rounds = list[float]()
    for _ in range(4):
        wait()
        start_s = time.perf_counter()
        for _ in range(REPEATS):
            call()
        wait()
        rounds.append((time.perf_counter() - start_s) / REPEATS)
    return median(rounds[1:])
