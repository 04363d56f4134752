"""Peak memory of whole jobs of 1,000 and 10,000 requests on the demo model: it stays flat.

Real runs of `executor run --accelerator cpu`, each in a process of its own whose greatest resident
set the kernel tells; inputs, outputs, journal and trace pass through files.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from executor.demo import MODEL_DIR
from hrm.units import format_bytes
from tests.bench.machine import circumstances

COUNTS = (1_000, 10_000)
PROMPT_LEN, NEW_TOKENS, BATCH = 8, 2, 500


def peak_bytes(*command: str) -> tuple[int, float]:
    """Greatest resident set of a command, and its seconds."""
    start_s = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_maxrss * 1024, time.monotonic() - start_s


def test_memory_of_jobs(tmp_path: Path) -> None:
    policy = str(tmp_path / "policy.json")
    peak_bytes(
        "hrm",
        "search",
        "--model",
        str(MODEL_DIR),
        "--profile",
        "paper-s2",
        "--prompt-len",
        str(PROMPT_LEN),
        "--max-prompt-len",
        str(PROMPT_LEN),
        "--gen-len",
        str(NEW_TOKENS),
        "--requests",
        str(BATCH),
        "--out",
        policy,
    )
    print(
        f"\npeak resident memory of jobs of {PROMPT_LEN} prompt and {NEW_TOKENS} new tokens in "
        f"batches of {BATCH}\n  {circumstances()}"
    )
    first = 0
    for count in COUNTS:
        requests = tmp_path / f"{count}.jsonl"
        with requests.open("w", encoding="utf-8") as file:
            for index in range(count):
                prompt = [3 + (index + position) % 500 for position in range(PROMPT_LEN)]
                body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
                line = {"custom_id": f"r{index}", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        peak, seconds = peak_bytes(
            "executor",
            "run",
            "--model",
            str(MODEL_DIR),
            "--policy",
            policy,
            "--quiet",
            "--input",
            str(requests),
            "--output-dir",
            str(tmp_path / f"run-{count}"),
            "--accelerator",
            "cpu",
        )
        first = first or peak
        print(f"  {count:>6} requests: {format_bytes(peak)} ({peak / first - 1:+.1%}), {seconds:.1f} s")
