"""What is run when the system does not pin as much as a policy needs, and what is told of it."""

import json
from dataclasses import replace

import pytest

from executor.bench import Bench, BenchOptions
from executor.cli import main
from executor.errors import RunError
from executor.generate import Planned
from executor.handlers import HostArenas
from executor.job import machine as job_machine
from hrm.buffers import Purpose
from hrm.errors import PolicyError
from hrm.estimate import estimate
from hrm.hardware import Figure, HardwareProfile, Source
from hrm.memory import MemoryPlan, plan_memory, purposes
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile, save_policy_file
from hrm.run_record import read_run
from hrm.tasks import Lane
from hrm.validate import predict_ranks, runtime_with
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.jobs import run_words
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import (
    architecture,
    generate,
    generator,
    link,
    machine,
    make_policy,
    policy_file,
    requests,
)
from tests.executor.runtime.test_parity import MAX_TOKENS, POLICIES, PROMPTS, expected, policy_of
from tests.executor.tiny_models import random_prompts

FEW = PROMPTS[:8]  # two micro-batches: of each lane's copies some are late
PINNED = ("exchange", "prefill_hidden", "kv_cache", "weights")


@pytest.fixture
def device():
    made = FakeDevice(late_s=1e-4)
    yield made
    made.close()


@pytest.fixture
def late(device):
    def make(pinned_bytes: int) -> LateBackend:
        return LateBackend(device, kernels_named("plain"), pinned_bytes=pinned_bytes)

    return make


def first_tokens(folder):
    return dict(list(expected(folder).items())[: len(FEW)])


def staged(spec, policy) -> Planned:
    wanted = replace(policy, staging=True)
    return Planned(wanted, plan_memory(spec, wanted, machine()))


def host_bytes(spec, policy, *names: str) -> int:
    sizes = purposes(spec, policy)[1]
    return sum(sizes[Purpose(name)] for name in names)


@pytest.mark.parametrize("name", ["all streamed, both on the gpu", "both on the cpu", "kv split, gpu"])
def test_weights_that_cannot_be_pinned_are_staged(folder, late, name):
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name])
    spec = architecture(folder).spec
    assert not policy.staging
    wanted = host_bytes(spec, policy, *PINNED)
    with generator(folder, policy, backend=late(wanted), staged=staged(spec, policy)) as made:
        assert not made.policy.staging
        assert made.notice == ""
    backend = late(wanted - 1)
    fallback = staged(spec, policy)
    with generator(folder, policy, backend=backend, staged=fallback) as made:
        assert made.policy == fallback.policy
        assert made.plan == fallback.memory
        assert made.pageable == ()
        done = generate(made, requests(FEW, max_tokens=MAX_TOKENS))
        assert sum(made.peak_bytes["cpu"].values()) <= made.plan.cpu.planned_bytes
    assert {name: one.tokens for name, one in done.items()} == first_tokens(folder)
    assert backend.pageable_bytes[Lane.STAGE] > 0
    assert backend.pageable_bytes[Lane.H2D] == backend.pageable_bytes[Lane.D2H] == 0


@pytest.mark.parametrize("name", ["all streamed, both on the gpu", "both on the cpu", "kv split, gpu"])
@pytest.mark.parametrize("staging", [False, True])
def test_what_a_plan_pins_is_what_the_executor_pins(folder, late, name, staging):
    policy = replace(policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name]), staging=staging)
    spec = architecture(folder).spec
    needed = with_pinnable(1e12, spec, policy).pinned
    assert needed is not None
    assert not with_pinnable(needed.planned_bytes - 1, spec, policy).fits
    assert with_pinnable(needed.planned_bytes, spec, policy).fits
    backend = late(needed.planned_bytes)
    with generator(folder, policy, backend=backend, staged=staged(spec, policy)) as made:
        assert made.policy == policy
        assert sum(backend.pinned.values()) == needed.planned_bytes
        assert set(made.pageable) <= {"kv_cache"} - set(needed.purposes)


def with_pinnable(num_bytes: float, spec, policy) -> MemoryPlan:
    """The plan on a machine whose host can pin so many bytes."""
    profile = machine()
    pinnable = Figure(value=num_bytes, source=Source.ASSUMED)
    host = replace(profile.host, pinnable_bytes=pinnable)
    return plan_memory(spec, policy, replace(profile, levels=(profile.top, host)))


@pytest.mark.parametrize("schedule", [ScheduleName.CGOPIPE, ScheduleName.DEEPSPEED])
@pytest.mark.parametrize("attention", ["both on the cpu", "all streamed, both on the gpu"])
def test_what_else_is_pinned_is_what_there_is_room_for(folder, late, attention, schedule):
    policy = policy_of(folder, schedule, POLICIES[attention])
    spec = architecture(folder).spec
    fallback = staged(spec, policy)
    always = host_bytes(spec, fallback.policy, "staging", "exchange")
    hidden = host_bytes(spec, policy, "prefill_hidden")
    backend = late(always + hidden)
    with generator(folder, policy, backend=backend, staged=fallback) as made:
        assert made.pageable == ("kv_cache",)
        assert "no room to pin kv cache" in made.notice
        assert sum(backend.pinned.values()) == always + hidden
        done = generate(made, requests(FEW, max_tokens=MAX_TOKENS))
    assert {name: one.tokens for name, one in done.items()} == first_tokens(folder)
    assert backend.pageable_bytes[Lane.D2H] > 0


def test_asked_for_staging_is_not_told_of(folder, late):
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["staged"])
    spec = architecture(folder).spec
    pinned = host_bytes(spec, policy, "staging", *PINNED[:-1])
    arenas = HostArenas.allocate(late(pinned), spec, policy)
    assert (arenas.policy, arenas.pageable, arenas.notice) == (policy, (), "")
    arenas = HostArenas.allocate(late(pinned - 1), spec, policy)
    assert (arenas.policy, arenas.pageable) == (policy, ("kv_cache",))
    assert arenas.notice.startswith("no room to pin kv cache (")


def test_what_cannot_be_run_is_refused_with_the_numbers(folder, late):
    spec, policy = architecture(folder).spec, make_policy(architecture(folder).spec.num_layers)
    with pytest.raises(RunError, match=r"does not pin so much; .* --staging, or .* --cpu-memory"):
        HostArenas.allocate(late(50_000), spec, policy)
    with pytest.raises(RunError, match=r"does not pin so much; .* fewer requests at once"):
        HostArenas.allocate(late(10), spec, policy, replace(policy, staging=True))


@pytest.fixture
def solved(folder) -> PolicyFile:
    return policy_file(architecture(folder).spec, predicted={"tokens_per_s": 1.0})


@pytest.fixture
def short(monkeypatch, late, solved):
    """Every backend is one that pins all but the last byte of what is wanted."""
    wanted = host_bytes(solved.model, solved.policy, *PINNED)
    monkeypatch.setattr(job_machine, "make_backend", lambda *_, **__: late(wanted - 1))


def test_run_reports_what_was_run(folder, solved, short, tmp_path, capsys):
    save_policy_file(tmp_path / "policy.json", solved)
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": prompt, "max_tokens": 5, "temperature": 0},
        }
        for i, prompt in enumerate(random_prompts(6, seed=1))
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    main(run_words(folder, tmp_path / "policy.json", tmp_path / "in.jsonl", tmp_path / "run"))
    told = [line for line in capsys.readouterr().err.splitlines() if "does not pin" in line]
    assert len(told) == 1
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["notice"] == told[0]
    assert content["memory"]["cpu"]["planned_bytes"]["staging"] > 0
    record = read_run(tmp_path / "run")
    run = record.policy_file
    assert run.policy == replace(solved.policy, staging=True)
    assert run.memory_budget_bytes == solved.memory_budget_bytes
    spec, profile = solved.model, solved.profile
    predicted = estimate(spec, run.policy, profile, solved.workload)
    assert run.predicted["tokens_per_s"] == predicted.tokens_per_s
    prediction = predict_ranks(record)[0]
    for (phase, kind), seconds in prediction.kind_s.items():
        assert (seconds > 0) == (kind in content["phases"][phase.value]["kinds"]), kind


def test_bench_predicts_what_it_runs_and_says_so_once(folder, solved, short):
    told: list[str] = []
    options = BenchOptions(model=str(folder), policy=solved, repeats=1)
    with Bench(options, tell=told.append) as bench:
        unstaged = bench.predicted
        rows = [bench.row(ScheduleName.CGOPIPE) for _ in range(2)]
        assert bench.policy_file.policy.staging
        assert bench.predicted.policy.staging
        assert bench.predicted.seconds != unstaged.seconds
    assert len(told) == 1
    for row in rows:
        assert row.decode_busy_share["STAGE"] > 0
        assert row.predicted_tokens_per_s <= row.bound_tokens_per_s * 1.001


def test_without_room_for_the_ring_or_figures_of_it_there_is_no_staging(solved, short):
    options = job_machine.AcceleratorOptions()
    policy = solved.policy
    prepared = job_machine.prepare(options, solved, policy)
    assert prepared.staged is not None
    assert prepared.staged.policy.staging
    needed = prepared.planned.memory.cpu.planned_bytes
    tight = replace(solved, memory_budget_bytes={"gpu": 10**6, "cpu": needed})
    assert job_machine.prepare(options, tight, policy).staged is None
    unknown = replace(solved.profile, links=solved.profile.links[:2])
    assert job_machine.prepare(options, replace(solved, profile=unknown), policy).staged is None


@pytest.mark.parametrize("name", ["weight_format", "kv_format"])
def test_what_has_formats_of_its_own_is_planned_and_not_run(solved, name):
    policy = replace(solved.policy, **{name: "float16"})
    dtype = policy.dtype
    refusal = f"policy: {name} is 'float16': must be {dtype}.*, as {dtype} is .*; .* hrm search --dtype {dtype}"
    with pytest.raises(PolicyError, match=refusal):
        job_machine.prepare(job_machine.AcceleratorOptions(), solved, policy)


def test_pageable_caches_cross_the_pageable_link_if_that_was_measured():
    def kv_link(profile: HardwareProfile, *pageable: str) -> str:
        return runtime_with(pageable, profile).kv_link

    assert kv_link(machine(), "kv_cache") == "pinned"
    links = (*machine().links, link("cpu", "gpu", 1e8, kind="pageable"))
    assert kv_link(replace(machine(), links=links), "kv_cache") == "pageable"
    assert kv_link(replace(machine(), links=links), "prefill_hidden") == "pinned"
