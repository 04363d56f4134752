"""Five times as many requests take no more memory: inputs, outputs and trace pass through files."""

import itertools
import json
import tracemalloc

import pytest

from executor.job import JobOptions, run_job
from executor.job.machine import AcceleratorOptions
from executor.null_generator import NullGenerator
from hrm.policy_file import save_policy_file
from hrm.trace import read_chrome_trace
from hrm.workload import Workload
from tests.executor.runtime.support import architecture, make_policy, policy_file

PROMPT = list(range(3, 35))
PER_REQUEST_BYTES = 250  # 70 for now: a name, to find one that occurs twice


@pytest.fixture
def job(folder, tmp_path, monkeypatch):
    """Run so many requests on the null backend; the most bytes that Python held at once from its first batch on.

    Before, files of settings are read, for which more room is made than all the rest takes.
    """
    generate = NullGenerator.generate

    def counted(self, batch, *, index=0, **how):
        if index == 0:
            tracemalloc.reset_peak()
        return generate(self, batch, index=index, **how)

    monkeypatch.setattr(NullGenerator, "generate", counted)
    spec = architecture(folder).spec
    policy_path = tmp_path / "policy.json"
    policy = make_policy(
        spec.num_layers,
        batch_size=256,
        micro_batch_size=128,
        kv_tokens_per_micro_batch=128 * 48,
        prefill_chunk_tokens=4096,
    )
    workload = Workload(name="test", prompt_len=32, max_prompt_len=32, gen_len=3)
    budget = {"gpu": 10**9, "cpu": 10**9}
    save_policy_file(policy_path, policy_file(spec, policy=policy, workload=workload, memory_budget_bytes=budget))
    numbers = itertools.count()

    def run(count: int) -> int:
        lines = tmp_path / f"{count}.jsonl"
        with lines.open("w", encoding="utf-8") as file:
            for index in range(count):
                body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
                line = {"custom_id": f"r{index:06}", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        options = JobOptions(
            model=folder,
            policy=policy_path,
            input=lines,
            output_dir=tmp_path / f"run-{next(numbers)}",
            accelerator=AcceleratorOptions(name="null"),
        )
        tracemalloc.start()
        record = run_job(options)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert record is not None
        assert record.totals.requests == count
        trace = read_chrome_trace(options.output_dir / "trace.json")
        assert record.trace is not None
        assert len(trace.spans) == record.trace.spans > 0
        assert {span.batch for span in trace.spans} == set(range(-(-count // 256)))
        return peak_bytes

    return run


def test_memory_stays_flat(job):
    few, many = 256, 1_280  # a batch and five
    job(16)  # imports and caches
    growth = job(many) - job(few)
    assert growth < PER_REQUEST_BYTES * (many - few), f"{growth} bytes"
