"""What a benchmark says about the machine that it ran on."""

import os
from datetime import UTC, datetime
from pathlib import Path

import torch


def cpu() -> str:
    """The processor and how many of its cores this process may use."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next(line.partition(": ")[2] for line in info if line.startswith("model name"))
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def circumstances() -> str:
    """Machine, threads, date, and what else was running."""
    load, _, _ = os.getloadavg()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    threads = torch.get_num_threads()
    return f"{cpu()}; torch {torch.__version__}, {threads} threads; {now}; load average of the last minute {load:.1f}"
