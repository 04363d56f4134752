"""Two ranks against one, on emulated accelerators, each with a link and half of the memory of its own.

The demo model with micro-batches of several sizes, and a larger shape of many experts with random weights under the
policy that the search chooses for each machine. Prints tokens/s, measured and predicted; asserts nothing about speed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from executor.bench import Bench, BenchOptions, BenchRow
from executor.demo import MODEL_DIR, PROMPTS
from executor.demo.run import GPU_MEMORY, LINK_BANDWIDTH, measured_lengths
from executor.model.host_kernels import host_kernels
from hrm.model_spec import spec_from_hf_config
from hrm.policy_file import policy_file_of
from hrm.profiling.machine import ProfileOptions, profile_machine
from hrm.search import Space, search
from hrm.tasks import Device
from hrm.units import GB, MB
from hrm.workload import Workload
from tests.bench.machine import circumstances

REPEATS = int(os.environ.get("BENCH_REPEATS", "3"))
REQUESTS, NEW_TOKENS = 128, 32
CHUNK_TOKENS = 158


def call(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def runs(folder: Path, profile: Path, micro_batch_size: int, lengths: list[str]) -> Iterator[dict[str, Any]]:
    """What `hrm validate` tells of each of several runs."""
    policy, lines, out = folder / "policy.json", folder / "in.jsonl", folder / "run"
    sizes = ["-u", str(micro_batch_size), "-n", str(REQUESTS // micro_batch_size)]
    rest = ["--attention", "cpu", "--stream-dense", "--prefill-chunk", str(CHUNK_TOKENS), "--out", str(policy)]
    call("hrm", "estimate", "--model", str(MODEL_DIR), "--profile", str(profile), *lengths, *sizes, *rest)
    job = ["--model", str(MODEL_DIR), "--policy", str(policy), "--input", str(lines), "--quiet"]
    for number in range(REPEATS):
        run = f"{out}-{profile.stem}-{micro_batch_size}-{number}"
        call("executor", "run", *job, "--output-dir", run)
        yield json.loads(call("hrm", "validate", run, "--json"))


def test_two_ranks_beside_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    machine = ["--gpu-memory", GPU_MEMORY, "--link-bandwidth", LINK_BANDWIDTH, "--model", str(MODEL_DIR), "--quick"]
    for path, accelerator in ((one, "emulated"), (two, "emulated:2")):
        call("hrm", "profile", "--accelerator", accelerator, *machine, "--dtype", "bfloat16", "--out", str(path))
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
    for size in (4, 8, 16):
        found = {}
        for profile in (one, two):
            told = [run["tokens_per_s"] for run in runs(tmp_path, profile, size, lengths)]
            rates = sorted((rate["measured"], rate["predicted"]) for rate in told)
            found[profile] = rates[(len(rates) - 1) // 2]
        (alone, alone_predicted), (both, both_predicted) = found[one], found[two]
        print(
            f"{size:>12}{alone:>10.0f}{alone_predicted:>11.0f}{both:>11.0f}{both_predicted:>11.0f}{both / alone:>8.2f}×"
        )
    print("goal: two ranks ≥ 1.8 times one where the link limits, predicted within 10 %")


MANY_EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "bfloat16",
}
SHAPE_MEMORY_BYTES, SHAPE_LINK_BYTES_PER_S = 80 * MB, 0.4 * GB
SHAPE_REQUESTS = Workload(name="bench", prompt_len=32, max_prompt_len=32, gen_len=16, num_requests=64)


def best_of(accelerator: str) -> BenchRow:
    """The shape under the best policy that computes experts on the accelerator, over whose link they all stream."""
    spec = spec_from_hf_config(MANY_EXPERTS, "config.json")
    options = ProfileOptions(
        accelerator,
        gpu_memory_bytes=SHAPE_MEMORY_BYTES,
        link_bandwidth_bytes_per_s=SHAPE_LINK_BYTES_PER_S,
        quick=True,
        model=spec,
        dtypes=("bfloat16",),
        command="bench",
        kernels=host_kernels(),
    )
    profile = profile_machine(options)
    found = search(Space(spec, profile, SHAPE_REQUESTS, dtype="bfloat16", ffn=Device.GPU)).require()
    policy = policy_file_of(found, spec, profile, SHAPE_REQUESTS)
    with Bench(BenchOptions(model=spec, policy=policy, repeats=REPEATS)) as bench:
        row = bench.row(policy.policy.schedule)
    chosen = policy.policy
    print(
        f"  {accelerator:11}{row.tokens_per_s:8.1f} tokens/s ({row.least_tokens_per_s:.1f} to"
        f" {row.most_tokens_per_s:.1f}), predicted {row.predicted_tokens_per_s:.1f};"
        f" {chosen.parallelism.value}, micro-batches of {chosen.micro_batch_size}, attention {chosen.attention.value}"
    )
    return row


def test_two_ranks_beside_one_with_a_larger_shape() -> None:
    print(
        f"\na shape of Qwen3-MoE with 32 experts a layer, 8 layers, 220 MB in bfloat16; {SHAPE_REQUESTS.num_requests}"
    )
    print(f"requests of 32 + 16 tokens, medians of {REPEATS} runs; emulated accelerators of 80 MB in all, each with")
    print(f"a link of 0.4 GB/s; {circumstances()}")
    one, two = best_of("emulated"), best_of("emulated:2")
    print(f"  two ranks are {two.tokens_per_s / one.tokens_per_s:.2f} times one")
