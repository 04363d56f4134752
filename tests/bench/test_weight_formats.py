"""What packed experts gain: the reference model's shape with random weights, in bfloat16 and packed, on one machine.

Over a slow link, and on the CPU with one or a few tokens an expert, the time is that of bytes. Every run has the policy
that `hrm search` finds for its weights, in the same budgets of memory; over the link all experts are computed on the
GPU's side, as otherwise the CPU would do the most of them. Prints medians, spreads and predictions, and
asserts nothing about speed. BENCH_REPEATS (3) and BENCH_FORMATS (int4-g32,mxfp4,int8,fp8) change it.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from executor.bench import Bench, BenchOptions, BenchRow
from executor.job.machine import AcceleratorOptions
from executor.model.host_kernels import host_kernels
from hrm.formats import packed_format
from hrm.machines import load_profile, save_profile
from hrm.model_spec import ModelSpec, spec_from_hf_config
from hrm.model_spec.stored_formats import packed_as
from hrm.policy_file import policy_file_of
from hrm.profiling.machine import ProfileOptions, profile_machine
from hrm.search import Space, search
from hrm.tasks import Device
from hrm.workload import Workload
from tests.bench.machine import circumstances
from tests.bench.reference_checkpoint import CONFIG

REPEATS = int(os.environ.get("BENCH_REPEATS", "3"))
FORMATS = ("bfloat16", *os.environ.get("BENCH_FORMATS", "int4-g32,mxfp4,int8,fp8").split(","))
# With 8 experts, of which a token takes 2, so many requests are 1, 2 and 8 tokens an expert.
REQUESTS_ON_CPU = (4, 8, 32)
PROMPT_LEN = 32
GPU_MEMORY_BYTES, LINK_BYTES_PER_S = 600_000_000, 300_000_000


def spec_in(name: str) -> ModelSpec:
    """The reference model with its experts in that format."""
    spec, form = spec_from_hf_config(CONFIG, "config.json"), packed_format(name)
    return spec if form is None else packed_as(replace(spec, name=f"{spec.name} {name}"), form)


def in_all_formats() -> ModelSpec:
    """The reference model with a matrix in each format, so that the rates of all are measured."""
    spec, names = spec_in("bfloat16"), ("w13", "w2", "qkv", "output")
    packed = tuple(zip(names, [name for name in FORMATS if packed_format(name)][: len(names)], strict=False))
    return spec.with_layers(replace(layer, packed=packed) for layer in spec.layers)


def measured(folder: Path, kind: str, accelerator: AcceleratorOptions) -> str:
    """A quick profile of this machine, in a file."""
    options = ProfileOptions(
        kind,
        gpu_memory_bytes=accelerator.gpu_memory_bytes,
        link_bandwidth_bytes_per_s=accelerator.link_bytes_per_s,
        quick=True,
        model=in_all_formats(),
        dtypes=("bfloat16",),
        command="bench",
        kernels=host_kernels(),
    )
    save_profile(folder / f"{kind}.yaml", profile_machine(options))
    return str(folder / f"{kind}.yaml")


def run(spec: ModelSpec, accelerator: AcceleratorOptions, profile: str, *, requests: int, gen_len: int) -> BenchRow:
    """One format."""
    workload = Workload(
        name="bench", prompt_len=PROMPT_LEN, max_prompt_len=PROMPT_LEN, gen_len=gen_len, num_requests=requests
    )
    machine, on_gpu = load_profile(profile), accelerator.name == "emulated"
    found = search(Space(spec, machine, workload, dtype="bfloat16", ffn=Device.GPU if on_gpu else None))
    policy = policy_file_of(found.require(), spec, machine, workload)
    options = BenchOptions(model=spec, policy=policy, repeats=REPEATS, accelerator=accelerator)
    with Bench(options) as ready:
        return ready.row(policy.policy.schedule)


def show(name: str, row: BenchRow, first: BenchRow | None) -> None:
    """A line of the table."""
    gain = row.decode_tokens_per_s / (first or row).decode_tokens_per_s
    whole = row.tokens_per_s / (first or row).tokens_per_s
    off = row.predicted_tokens_per_s / row.tokens_per_s - 1
    print(
        f"  {name:10}{row.tokens_per_s:9.2f} tokens/s ({row.least_tokens_per_s:.2f} to {row.most_tokens_per_s:.2f})"
        f"{whole:7.2f} x  decode {row.decode_tokens_per_s:8.2f} tokens/s{gain:7.2f} x  predicted {off:+.1%}"
    )


def compare(accelerator: AcceleratorOptions, profile: str, *, requests: int, gen_len: int) -> None:
    """All formats, one after the other."""
    first: BenchRow | None = None
    for name in FORMATS:
        row = run(spec_in(name), accelerator, profile, requests=requests, gen_len=gen_len)
        show(name, row, first)
        first = first or row


@pytest.mark.slow
def test_over_a_slow_link(tmp_path: Path) -> None:
    accelerator = AcceleratorOptions(
        name="emulated", gpu_memory_bytes=GPU_MEMORY_BYTES, link_bytes_per_s=LINK_BYTES_PER_S
    )
    print(f"\n{circumstances()}")
    print(f"600 MB of emulated GPU memory, a link of 300 MB/s; {REPEATS} repeats of 32 requests of 32 + 4 tokens")
    profile = measured(tmp_path, "emulated", accelerator)
    compare(accelerator, profile, requests=32, gen_len=4)


@pytest.mark.slow
@pytest.mark.parametrize("requests", REQUESTS_ON_CPU)
def test_on_the_cpu(tmp_path: Path, requests: int) -> None:
    accelerator = AcceleratorOptions(name="cpu")
    print(f"\n{circumstances()}")
    print(f"on the CPU, {requests // 4} tokens an expert; {REPEATS} repeats of {requests} requests of 32 + 16 tokens")
    profile = measured(tmp_path, "cpu", accelerator)
    compare(accelerator, profile, requests=requests, gen_len=16)
