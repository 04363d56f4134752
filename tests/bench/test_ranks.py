"""Two ranks against one: the demo model on emulated accelerators, each with a link and half of the memory of its own.

Prints tokens/s, measured and predicted, of micro-batches of several sizes; asserts nothing about speed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from executor.demo import MODEL_DIR, PROMPTS
from executor.demo.run import GPU_MEMORY, LINK_BANDWIDTH, measured_lengths
from tests.bench.machine import circumstances

REQUESTS, NEW_TOKENS, REPEATS = 128, 32, 3
CHUNK_TOKENS = 158


def call(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def runs(folder: Path, profile: Path, micro_batch_size: int, lengths: list[str]) -> Iterator[dict[str, Any]]:
    """What `hrm validate` tells of each of several runs."""
    policy, lines, out = folder / "policy.json", folder / "in.jsonl", folder / "run"
    sizes = ["-u", str(micro_batch_size), "-n", str(REQUESTS // micro_batch_size)]
    rest = ["--attention", "cpu", "--stream-dense", "--prefill-chunk", str(CHUNK_TOKENS), "--out", str(policy)]
    call("hrm.cli", "estimate", "--model", str(MODEL_DIR), "--profile", str(profile), *lengths, *sizes, *rest)
    job = ["--model", str(MODEL_DIR), "--policy", str(policy), "--input", str(lines), "--quiet"]
    for number in range(REPEATS):
        run = f"{out}-{profile.stem}-{micro_batch_size}-{number}"
        call("executor.cli", "run", *job, "--output-dir", run)
        yield json.loads(call("hrm.cli", "validate", run, "--json"))


def test_two_ranks_beside_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    machine = ["--gpu-memory", GPU_MEMORY, "--link-bandwidth", LINK_BANDWIDTH, "--model", str(MODEL_DIR), "--quick"]
    for path, accelerator in ((one, "emulated"), (two, "emulated:2")):
        call("hrm.cli", "profile", "--accelerator", accelerator, *machine, "--dtype", "bfloat16", "--out", str(path))
    with PROMPTS.open(encoding="utf-8") as lines:
        (tmp_path / "in.jsonl").write_text("".join(islice(lines, REQUESTS)), encoding="utf-8")
    mean, longest = measured_lengths(PROMPTS, MODEL_DIR, REQUESTS)
    lengths = ["--prompt-len", f"{mean:.1f}", "--max-prompt-len", str(longest)]
    lengths += ["--gen-len", str(NEW_TOKENS), "--requests", str(REQUESTS)]
    print(
        f"\ndemo model, {REQUESTS} requests × {NEW_TOKENS} tokens, medians of {REPEATS} runs; emulated accelerators of"
    )
    print(f"{GPU_MEMORY} in all, each with a link of {LINK_BANDWIDTH}; {circumstances()}")
    print(f"{'micro-batch':>12}{'one rank':>10}{'predicted':>11}{'two ranks':>11}{'predicted':>11}{'two are':>9}")
    for size in (8, 16):
        found = {}
        for profile in (one, two):
            told = [run["tokens_per_s"] for run in runs(tmp_path, profile, size, lengths)]
            rates = sorted((rate["measured"], rate["predicted"]) for rate in told)
            found[profile] = rates[len(rates) // 2]
        (alone, alone_predicted), (both, both_predicted) = found[one], found[two]
        print(
            f"{size:>12}{alone:>10.0f}{alone_predicted:>11.0f}{both:>11.0f}{both_predicted:>11.0f}{both / alone:>8.2f}×"
        )
    print("goal: two ranks ≥ 1.8 times one where the link limits, predicted within 10 %")
