"""The demo model under every schedule on the emulated accelerator: CGOPipe against the others.

Prints medians over repeats within one run, beside the goals; asserts nothing about speed.
"""

import json
import subprocess
import sys
from pathlib import Path

from executor.demo import MODEL_DIR
from executor.demo.run import GPU_MEMORY, LINK_BANDWIDTH
from tests.bench.machine import cpu

REPEATS = 3


def call(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def test_schedules_on_the_demo_model(tmp_path: Path) -> None:
    profile, policy = str(tmp_path / "machine.yaml"), str(tmp_path / "policy.json")
    call(
        "hrm",
        "profile",
        "--accelerator",
        "emulated",
        "--gpu-memory",
        GPU_MEMORY,
        "--link-bandwidth",
        LINK_BANDWIDTH,
        "--model",
        str(MODEL_DIR),
        "--quick",
        "--out",
        profile,
    )
    plan = json.loads(
        call(
            "hrm",
            "search",
            "--model",
            str(MODEL_DIR),
            "--profile",
            profile,
            "--prompt-len",
            "32",
            "--max-prompt-len",
            "128",
            "--gen-len",
            "16",
            "--requests",
            "96",
            "--ffn",
            "gpu",
            "--json",
            "--out",
            policy,
        )
    )
    rows = json.loads(
        call(
            "executor",
            "bench",
            "--model",
            str(MODEL_DIR),
            "--policy",
            policy,
            "--requests",
            "96",
            "--repeats",
            str(REPEATS),
            "--json",
        )
    )["rows"]
    bottleneck = plan["predicted"]["bottleneck"]["decode"]
    print(
        f"\ndemo model, 96 requests × 16 tokens, medians of {REPEATS}; emulated accelerator "
        f"{GPU_MEMORY}, link {LINK_BANDWIDTH}; {cpu()}"
    )
    print(f"predicted: decode limited by {bottleneck}, {plan['predicted']['tokens_per_s']:.0f} tokens/s")
    print(f"{'schedule':<12}{'tokens/s':>10}{'decode':>10}{'H2D busy':>10}{'CGOPipe is':>12}")
    ours = rows[0]
    assert ours["schedule"] == "cgopipe"
    for row in rows:
        print(
            f"{row['schedule']:<12}{row['tokens_per_s']:>10.0f}{row['decode_tokens_per_s']:>10.0f}"
            f"{row['decode_busy_share']['H2D']:>10.1%}"
            f"{ours['tokens_per_s'] / row['tokens_per_s']:>11.2f}×"
        )
    print("goals: H2D ≥ 95 % busy in decode when link-bound; CGOPipe ≥ 1.3× flexgen-c")
