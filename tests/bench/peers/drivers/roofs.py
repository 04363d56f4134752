"""What the machine does at best in these minutes: a bfloat16 GEMM of torch, and reading memory."""

import json
import sys
from pathlib import Path

import torch

from hrm.profiling.environment import available_ram_bytes, host_facts
from hrm.profiling.memory import array_bytes, measure_memory
from hrm.profiling.timing import summarise, time_each

TOKENS, SIDE = 1024, 4096
BUDGET_S = 2.0


def roofs(*, small: bool) -> dict[str, float]:
    """FLOP/s and bytes/s, medians of a few seconds each."""
    tokens, side = (64, 128) if small else (TOKENS, SIDE)
    budget_s = 0.1 if small else BUDGET_S
    x_TD = torch.randn(tokens, side, dtype=torch.bfloat16)
    w_DD = torch.randn(side, side, dtype=torch.bfloat16)
    out_TD = torch.empty_like(x_TD)
    with torch.inference_mode():
        gemm = summarise(time_each({None: lambda: torch.mm(x_TD, w_DD.T, out=out_TD)}, budget_s=budget_s)[None])
    cache = host_facts().last_level_cache_bytes
    threads = torch.get_num_threads()
    size = 2**22 if small else array_bytes(cache, available_ram_bytes(), quick=True)
    memory = measure_memory(num_bytes=size, last_level_cache_bytes=cache, threads=[threads], budget_s=2 * budget_s)
    return {
        "gemm_flops_per_s": 2.0 * tokens * side * side / gemm.median_s,
        "read_bytes_per_s": size / memory.read[threads].median_s,
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(roofs(small=asked["small"])), encoding="utf-8")
