"""Our executor on the CPU against transformers' generate, in turns, on the reference checkpoint.

Prints medians and spreads, the goals, HRM's own bound, and where our time goes; asserts nothing
about speed. No lane's team of threads is there while the other side computes, and none of the other
side's: teams that together have more threads than there are cores slow one another down.
BENCH_REPEATS (3) and BENCH_WORKLOADS (32x32,128x16: requests × new tokens) change it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from executor.backends import in_thread_of_its_own
from executor.bench import Bench, BenchOptions, BenchRow
from executor.job.machine import AcceleratorOptions
from executor.model.host_kernels import host_kernels
from hrm.machines import save_profile
from hrm.model_spec import load_model
from hrm.profiling.machine import ProfileOptions, profile_machine
from hrm.tasks import Lane, Phase
from hrm.units import format_bytes, format_seconds
from tests.bench.machine import circumstances
from tests.bench.reference_checkpoint import reference_checkpoint

REPEATS = int(os.environ.get("BENCH_REPEATS", "3"))
WORKLOADS = os.environ.get("BENCH_WORKLOADS", "32x32,128x16").split(",")
PROMPT_LEN = 64
GOALS = {"32x32": 2.5, "128x16": 2.2}
BOUND_GOAL = 0.8
# Their third form, batched_mm, copies both matrices of every token's experts: 90 GB in prefill.
EXPERT_FORMS = ("eager", "grouped_mm")


@dataclass
class Theirs:
    """transformers on the same weights; `form` names its experts' code in prefill and decode."""

    model: Any
    form: tuple[str, str] = ("eager", "eager")

    def generate(self, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """The new tokens, greedy."""
        out = self.decode(self.prefill(prompts), new_tokens)
        return out[:, prompts.shape[1] :]

    def prefill(self, prompts: torch.Tensor) -> Any:
        """What `generate` returns for one new token, its cache included."""
        return self._generate(self.form[0], prompts, 1, return_dict_in_generate=True)

    def decode(self, prefilled: Any, new_tokens: int) -> torch.Tensor:
        """Prompts and new tokens; the cache is used up."""
        return self._generate(
            self.form[1], prefilled.sequences, new_tokens - 1, past_key_values=prefilled.past_key_values
        )

    def _generate(self, form: str, tokens: torch.Tensor, new_tokens: int, **options: Any) -> Any:
        self.model.set_experts_implementation(form)
        mask = torch.ones_like(tokens)  # padded on the left, by nothing: all are as long
        with torch.inference_mode():
            return self.model.generate(
                tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, attention_mask=mask, **options
            )

    def choose(self, prompts: torch.Tensor) -> None:
        """Take the fastest form of each phase over all requests and a few tokens."""
        self.generate(prompts, 2)  # first touches
        prefill_s: dict[str, float] = {}
        step_s: dict[str, float] = {}
        for form in EXPERT_FORMS:
            self.form = (form, form)
            prefill_s[form], prefilled = timed(lambda: self.prefill(prompts))
            seconds, _ = timed(lambda: self.decode(prefilled, 4))  # noqa: B023 - called at once
            step_s[form] = seconds / 3
            print(
                f"  transformers' experts as {form}: prefill {format_seconds(prefill_s[form])}, "
                f"step {format_seconds(step_s[form])}"
            )
        self.form = (min(prefill_s, key=prefill_s.__getitem__), min(step_s, key=step_s.__getitem__))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start_s = time.perf_counter()
    result = work()
    return time.perf_counter() - start_s, result


@pytest.fixture(scope="module")
def folder() -> Path:
    return reference_checkpoint()


@pytest.fixture(scope="module")
def theirs(folder) -> Theirs:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = in_thread_of_its_own(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    )
    return Theirs(model.eval())


@pytest.fixture(scope="module")
def profile(folder, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("profile") / "machine.yaml"
    spec = load_model(str(folder))
    options = ProfileOptions("cpu", quick=True, model=spec, dtypes=("bfloat16",), kernels=host_kernels())
    measured = in_thread_of_its_own(lambda: profile_machine(options))
    save_profile(path, measured)
    return str(path)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_throughput(folder, theirs, profile, workload):
    requests, new_tokens = (int(number) for number in workload.split("x"))
    print(
        f"\n{requests} × ({PROMPT_LEN} prompt + {new_tokens} new tokens), {folder.name}, bfloat16\n  {circumstances()}"
    )
    options = BenchOptions(
        model=str(folder),
        profile=profile,
        prompt_len=PROMPT_LEN,
        gen_len=new_tokens,
        num_requests=requests,
        accelerator=AcceleratorOptions(name="cpu"),
    )
    with Bench(options) as bench:
        prompts = torch.tensor([request.prompt for request in bench.requests()])
        in_thread_of_its_own(lambda: theirs.choose(prompts))
        their_s: list[float] = []
        policy = bench.policy_file.policy
        warm = bench.start(policy.schedule)
        with warm:
            warm.repeat()  # first touches and caches, as `choose` did for theirs
        ours = warm.under(policy.schedule)
        for _repeat in range(REPEATS):
            with ours:
                ours.repeat()
            seconds, _ = in_thread_of_its_own(lambda: timed(lambda: theirs.generate(prompts, new_tokens)))
            their_s.append(seconds)
        row = ours.row()
    report(row, [requests * new_tokens / seconds for seconds in their_s], theirs.form, workload)
    print(
        f"  policy: batch of {policy.batch_size} in micro-batches of {policy.micro_batch_size}, "
        f"prefill in chunks of {policy.prefill_chunk_tokens} tokens"
    )
    where_the_time_goes(row)


def report(row: BenchRow, theirs: list[float], form: tuple[str, str], workload: str) -> None:
    """Ours against theirs and against the bound, beside the goals."""
    ratio, share = row.tokens_per_s / median(theirs), row.tokens_per_s / row.bound_tokens_per_s
    print(f"  {'tokens/s':<24}{'median':>8}{'least':>8}{'most':>8}   of {REPEATS} in turns")
    mine = (row.tokens_per_s, row.least_tokens_per_s, row.most_tokens_per_s)
    for name, figures in (
        ("executor --accelerator cpu", mine),
        ("transformers", (median(theirs), min(theirs), max(theirs))),
    ):
        print(f"  {name:<26}" + "".join(f"{figure:>8.1f}" for figure in figures))
    print(f"  {'HRM predicts':<26}{row.predicted_tokens_per_s:>8.1f}, its bound {row.bound_tokens_per_s:.1f}")
    goal = f" (goal {GOALS[workload]}×)" if workload in GOALS else ""
    print(
        f"  {ratio:.2f}× transformers{goal}, whose experts run as {' then '.join(form)}; "
        f"{share:.0%} of the bound (goal {BOUND_GOAL:.0%})"
    )
    cpu = row.validation.run.memory["cpu"]
    peak, planned = (format_bytes(size) for size in (cpu.peak_total_bytes, cpu.planned_total_bytes))
    print(f"  memory {peak} at its peak of {planned} planned; loaded in {row.load_s:.1f} s")


def where_the_time_goes(row: BenchRow) -> None:
    """Each phase's share of our time, and each kind's share of its phase."""
    validation, totals = row.validation, row.validation.run.totals
    seconds = {Phase.PREFILL: totals.prefill_s, Phase.DECODE: totals.decode_s}
    whole_s = sum(seconds.values())
    for phase, phase_s in seconds.items():
        rate = validation.phase_tokens_per_s[phase]
        print(
            f"  {phase.value}: {phase_s / whole_s:.0%} of our time, {rate.measured:.0f} tokens/s "
            f"({rate.predicted:.0f} predicted)"
        )
        busy_s = validation.lane_s[phase, Lane.GPU].measured
        for (of_phase, kind), both in validation.kind_s.items():
            if of_phase is phase and both.measured > 0.001 * phase_s:
                name = kind.lower().replace("_", " ")
                print(
                    f"    {name:<20}{both.measured / phase_s:>6.1%}  {both.measured:>8.3f} s "
                    f"({both.predicted:.3f} s predicted)"
                )
        print(f"    {'between tasks':<20}{1 - busy_s / phase_s:>6.1%}")
