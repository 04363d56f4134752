"""Two ranks against one: the demo model on emulated accelerators, each with a link and half of the memory of its own.

Prints tokens/s, measured and predicted, of micro-batches of several sizes; asserts nothing about speed.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from executor.demo import MODEL_DIR, PROMPTS
from executor.demo.run import GPU_MEMORY, LINK_BANDWIDTH, measured_lengths
from executor.group import Group
from hrm.hardware import Figure, HardwareProfile, Link, Rate, Source
from hrm.machines import load_profile, save_profile
from tests.bench.machine import circumstances
from tests.executor.group.ranks import in_ranks

REQUESTS, NEW_TOKENS, REPEATS = 128, 32, 3
CHUNK_TOKENS = 158
FEW, MANY = 64, 250_000  # numbers of a sum


def call(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def sum_s(group: Group, count: int) -> float:
    """What a sum of so many numbers takes, the median of many."""
    numbers, taken = torch.ones(count), list[float]()
    for _ in range(200):
        start_s = time.perf_counter()
        group.all_reduce(numbers.fill_(1))
        taken.append(time.perf_counter() - start_s)
    return sorted(taken)[len(taken) // 2]


def between_ranks() -> Link:
    """The link that two ranks' sums go over, of which each takes two turns with half of the numbers."""
    few_s, many_s = (in_ranks(2, sum_s, count)[0] for count in (FEW, MANY))
    bandwidth = 4 * (MANY - FEW) / (many_s - few_s)
    measured = (Figure(value=value, source=Source.MEASURED) for value in (few_s / 2, bandwidth))
    latency, rate = measured
    return Link(source="gpu", target="gpu", kind="peer", latency_s=latency, bandwidth_bytes_per_s=Rate(achieved=rate))


def of_two(one: HardwareProfile) -> HardwareProfile:
    """A machine with the same memory on two accelerators, each with such a link."""

    def of_both(link: Link) -> Link:
        if link.kind == "staging":
            return link
        return replace(
            link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s.each(lambda figure: figure.times(2, size_factor=2))
        )

    return replace(one, name="two emulated", num_gpus=2, links=(*map(of_both, one.links), between_ranks()))


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
    machine = ["--accelerator", "emulated", "--gpu-memory", GPU_MEMORY, "--link-bandwidth", LINK_BANDWIDTH]
    call("hrm.cli", "profile", *machine, "--model", str(MODEL_DIR), "--dtype", "bfloat16", "--quick", "--out", str(one))
    save_profile(two, of_two(load_profile(one)))
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
    for size in (8, 16, 32):
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
