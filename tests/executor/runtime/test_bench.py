"""`executor bench`, on a checkpoint and on shapes with random weights."""

import json
import weakref
from contextlib import ExitStack
from dataclasses import replace

import psutil
import pytest

from executor.bench import Bench, BenchOptions
from executor.bench.plan import model_of, solved
from executor.cli import main
from executor.errors import JobError
from executor.generate import Generator
from executor.job.machine import AcceleratorOptions
from hrm.errors import WorkloadError
from hrm.layers import ExpertDivision
from hrm.machines import save_profile
from hrm.memory import plan_memory
from hrm.model_spec import BUILT_IN_MODELS, Dimensions, ModelSpec
from hrm.policy import Parallelism, ScheduleName
from hrm.policy_file import PolicyFile, save_policy_file
from hrm.tasks import Device, Phase
from tests.executor.runtime.support import architecture, level, machine, make_policy, policy_file

REQUESTS, PROMPT_LEN, GEN_LEN = 6, 8, 5
LENGTHS = ("--requests", str(REQUESTS), "--prompt-len", str(PROMPT_LEN), "--gen-len", str(GEN_LEN), "--repeats", "2")
ONE_LEVEL = replace(machine(), accelerator="cpu", levels=(level("cpu", 8e9),), links=())


@pytest.fixture(params=["mixtral", "dbrx"])
def shape(request, monkeypatch) -> ModelSpec:
    """A built-in shape of a family, small enough for a test."""
    spec = Dimensions(
        name="tiny",
        family=request.param,
        num_layers=4,
        hidden_size=32,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_experts=8,
        experts_per_token=2,
        vocab_size=97,
    ).spec
    monkeypatch.setitem(BUILT_IN_MODELS, spec.name, spec)
    return spec


@pytest.fixture
def profile(tmp_path):
    """A function that writes a profile and returns its path."""

    def write(content) -> str:
        path = tmp_path / "machine.yaml"
        save_profile(path, content)
        return str(path)

    return write


def bench_json(capsys, *arguments: str) -> dict:
    main(["bench", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        (["--gen-len", "99999999"], "--gen-len is 99999999: must be at most 10,000,000; correct it"),
        (
            ["--prompt-len", "9", "--max-prompt-len", "3"],
            "--max-prompt-len is 3: must be at least the mean --prompt-len 9",
        ),
        (["--requests", "9" * 20], f"--requests is {'9' * 20}: must lie between 1 and 1,000,000"),
    ],
)
def test_impossible_lengths_are_told_by_the_options_that_give_them(shape, profile, capsys, lengths, told):
    assert told in refused(capsys, "--model", shape.name, "--profile", profile(machine()), *lengths)


@pytest.mark.parametrize("accelerator", ["emulated", "cpu", "null"])
def test_shape_is_planned_for_and_run_without_a_checkpoint(shape, profile, capsys, accelerator):
    on = ONE_LEVEL if accelerator == "cpu" else machine()
    report = bench_json(
        capsys, "--model", shape.name, "--layers", "2", "--profile", profile(on), "--accelerator", accelerator, *LENGTHS
    )
    assert len(report["model"]["order"]) == len(report["policy"]["resident_experts"]) == 2
    assert report["workload"]["num_requests"] == REQUESTS
    # All orders on two levels; on one level they hardly differ.
    schedules = ["cgopipe"] if accelerator == "cpu" else [name.value for name in ScheduleName]
    assert [row["schedule"] for row in report["rows"]] == schedules
    for row in report["rows"]:
        assert 0 < row["least_tokens_per_s"] <= row["tokens_per_s"] <= row["most_tokens_per_s"]
        assert row["ratio"] == row["tokens_per_s"] / report["rows"][0]["tokens_per_s"]
        decode_s = REQUESTS * (GEN_LEN - 1) / row["decode_tokens_per_s"]
        step_s = row["decode_step_s"]
        assert step_s["n"] == (GEN_LEN - 1) * -(-REQUESTS // report["policy"]["batch_size"])
        assert 0 < step_s["p20"] <= step_s["median"] <= step_s["p80"] < decode_s
        prefill_s = REQUESTS * PROMPT_LEN / row["prefill_tokens_per_s"]
        assert row["tokens_per_s"] == pytest.approx(REQUESTS * GEN_LEN / (prefill_s + decode_s))
        assert 0 < row["decode_busy_share"]["GPU"] <= 1
        assert 0 < row["predicted_tokens_per_s"] <= row["bound_tokens_per_s"] * 1.001
        compared = row["validation"]["tokens_per_s"]
        assert compared["measured"] == row["tokens_per_s"]
        assert compared["predicted"] == row["predicted_tokens_per_s"]
        if accelerator != "null":
            for memory in row["validation"]["memory"].values():
                assert 0 < memory["peak_total_bytes"] <= memory["planned_total_bytes"]


def test_orders_that_need_the_same_memory_run_on_the_same_weights(shape, monkeypatch):
    """One that needs more has its own, after the others have given theirs back."""
    made = list[weakref.ref[Generator]]()

    def counted(*given, **named) -> Generator:
        assert all(one() is None for one in made)
        generator = Generator(*given, **named)
        made.append(weakref.ref(generator))
        return generator

    monkeypatch.setattr("executor.job.model_part.Generator", counted)
    policy = make_policy(shape.num_layers, batch_size=4, micro_batch_size=2, staging=True)
    with Bench(BenchOptions(model=shape.name, policy=policy_file(shape, policy=policy), repeats=1)) as bench:
        rows = {order: bench.row(order) for order in ScheduleName}
        assert [rows[order].schedule for order in bench.schedules] == [order.value for order in ScheduleName]
    assert len(made) == 2
    assert made[1]() is None
    assert {row.tokens_crc32 for row in rows.values()} == {rows[ScheduleName.CGOPIPE].tokens_crc32}


def test_planned_memory_is_that_of_the_shape(shape, profile, capsys):
    report = bench_json(capsys, "--model", shape.name, "--profile", profile(machine()), *LENGTHS)
    memory = report["rows"][0]["validation"]["memory"]
    fields = dict(report["policy"], resident_experts=tuple(report["policy"]["resident_experts"]))
    fields |= {name: Device(fields[name]) for name in ("attention", "ffn", "prefill_ffn")}
    fields |= {"expert_division": ExpertDivision(fields["expert_division"])}
    del fields["num_micro_batches"], fields["paper_tuple"]
    plan = plan_memory(shape, make_policy(shape.num_layers, **fields), machine())
    for planned in (plan.gpu, plan.cpu):
        assert memory[planned.name]["planned_total_bytes"] == planned.planned_bytes


def test_fewer_layers_are_the_first_of_the_model():
    """Though a later one reaches further back."""
    with ExitStack() as stack:
        (_, _, arch), _ = model_of(BenchOptions(model="gpt-oss-20b", num_layers=1), stack)
    assert len(arch.layers) == arch.spec.num_layers == 1
    assert [reach.rows for reach in arch.reaches] == [128]


def test_this_machine_is_measured_if_none_is_given(shape, monkeypatch, capsys):
    found = []

    def measure(options):
        found.append(options)
        return machine()

    monkeypatch.setattr("hrm.profiling.machine.profile_machine", measure)
    main(
        [
            "bench",
            "--model",
            shape.name,
            "--accelerator",
            "emulated",
            "--gpu-memory",
            "1GB",
            "--link-bandwidth",
            "1GB/s",
            "--schedules",
            "flexgen",
            *LENGTHS,
        ]
    )
    (asked,) = found
    assert asked.accelerator == "emulated"
    assert asked.quick
    assert asked.model == shape
    assert asked.gpu_memory_bytes == asked.link_bandwidth_bytes_per_s == 1e9
    text = capsys.readouterr().out
    for word in ("flexgen ", "tokens/s, decode", "predicted", "lane GPU", "planned"):
        assert word in text


def test_schedules_are_compared_on_a_checkpoint_with_its_policy(folder, policy_path, capsys):
    rows = bench_json(
        capsys,
        "--model",
        str(folder),
        "--policy",
        str(policy_path),
        "--repeats",
        "1",
        "--prompt-len",
        "8",
        "--gen-len",
        "3",
        "--schedules",
        "cgopipe,flexgen-c",
    )["rows"]
    assert [row["schedule"] for row in rows] == ["cgopipe", "flexgen-c"]
    assert rows[0]["ratio"] == 1
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_mistakes_are_refused_in_one_line(folder, policy_path, profile, capsys):
    given = ("--model", str(folder), "--policy", str(policy_path))
    for schedules in ("magic", ","):
        message = refused(capsys, *given, "--schedules", schedules)
        assert all(name in message for name in (repr(schedules), *ScheduleName))
    assert "--policy" in refused(capsys, *given, "--profile", profile(machine()))
    message = refused(capsys, "--model", str(folder), "--accelerator", "null")
    assert "--profile" in message
    message = refused(capsys, *given, "--layers", "4")
    assert "3" in message


@pytest.mark.parametrize("accelerator", ["emulated", "null"])
def test_runs_in_two_orders_share_a_generator_and_each_keeps_its_own(folder, policy_path, accelerator):
    options = BenchOptions(model=str(folder), policy=policy_path, accelerator=AcceleratorOptions(name=accelerator))
    with Bench(options) as bench, bench.start(ScheduleName.CGOPIPE) as paged:
        whole = paged.under(ScheduleName.FLEXGEN)
        for run, pages in ((paged, 2), (whole, 1), (paged, 2)):
            loads = run.repeat().phases[Phase.DECODE].by_kind["LOAD_PAGE"].count
            assert loads == pages * 4 * bench.spec.num_layers, "a step's pages, in 4 steps after the first token"
        assert (paged.policy.schedule, paged.row().schedule) == (ScheduleName.CGOPIPE, "cgopipe")
        assert (whole.policy.schedule, whole.row().schedule) == (ScheduleName.FLEXGEN, "flexgen")
        assert paged.row().tokens_crc32 == whole.row().tokens_crc32
        assert len(paged.row().tokens_crc32) == 1
        paged.repeat(gen_len=3)
        assert len(paged.row().tokens_crc32) == 2, "other tokens have another sum"


@pytest.mark.parametrize("field", ["num_requests", "prompt_len", "gen_len"])
def test_zero_is_refused_and_not_taken_for_the_usual_number(field):
    spec = BUILT_IN_MODELS["mixtral-8x7b"]
    with pytest.raises(WorkloadError, match=f"{field} is 0"):
        solved(replace(BenchOptions(model=spec), **{field: 0}), spec)


def for_two(spec: ModelSpec, **changes) -> PolicyFile:
    """A policy for two GPUs."""
    one = machine()
    peer = replace(one.h2d, source="gpu", target="gpu", kind="peer")
    layers = len(changes.get("resident_experts", range(spec.num_layers)))
    policy = make_policy(layers, batch_size=4, micro_batch_size=2, **changes)
    budgets = {"gpu": 2 * 10**6, "cpu": 2 * 10**8}
    profile = replace(one, num_gpus=2, links=(*one.links, peer))
    return policy_file(spec, policy=policy, profile=profile, memory_budget_bytes=budgets)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("shape", ["mixtral"], indirect=True)
@pytest.mark.parametrize("random", [False, True])
def test_ranks_are_measured_and_compared_one_by_one(folder, shape, tmp_path, capsys, random):
    spec = shape if random else architecture(folder).spec
    save_policy_file(tmp_path / "policy.json", for_two(spec))
    words = ["--model", spec.name if random else str(folder), "--policy", str(tmp_path / "policy.json"), *LENGTHS]
    if random:
        words += ["--layers", "2"]
    report = bench_json(capsys, *words, "--gpus", "2", "--schedules", "cgopipe,flexgen")
    for row in report["rows"]:
        of_ranks = row["validation"]["rank_s"]["decode"]
        assert set(of_ranks) == {"0", "1"}
        assert all(seconds > 0 for one in of_ranks.values() for seconds in (one["measured"], one["predicted"]))
        assert row["tokens_crc32"] == report["rows"][0]["tokens_crc32"]
    save_policy_file(tmp_path / "one.json", policy_file(spec, policy=for_two(spec).policy))
    words[3] = str(tmp_path / "one.json")
    alone = bench_json(capsys, *words, "--schedules", "cgopipe")
    assert alone["rows"][0]["tokens_crc32"] == report["rows"][0]["tokens_crc32"], "the same weights and requests"


def test_stages_are_measured_and_none_is_left(forked_ranks, folder, tmp_path, capsys):
    spec = architecture(folder).spec
    content = for_two(spec, parallelism=Parallelism.PIPELINE, stage_lengths=(1, 2))
    with Bench(BenchOptions(model=str(folder), policy=content, repeats=2)) as bench:
        row = bench.row(ScheduleName.CGOPIPE)
        assert {rank for _, rank in row.validation.rank_s} == {0, 1}
        assert [one.decode_steps for one in row.validation.run.batches] == [4, 4], "two batches were under way"
        (other,) = (psutil.Process(rank.pid) for rank in forked_ranks)
    assert not other.is_running()
    save_policy_file(tmp_path / "policy.json", content)
    words = ["--model", str(folder), "--policy", str(tmp_path / "policy.json")]
    assert "goes with no policy of 2 stages" in refused(capsys, *words, "--layers", "2")
    assert "--gpus is 3: must be 2" in refused(capsys, *words, "--gpus", "3")


@pytest.mark.parametrize("shape", ["mixtral"], indirect=True)
@pytest.mark.parametrize(
    ("accelerator", "measured"), [("emulated", "emulated:2"), ("cuda", "cuda:0,1"), ("cuda:2", "cuda:2,3")]
)
def test_as_many_gpus_of_this_machine_are_measured_as_are_asked_for(shape, monkeypatch, accelerator, measured):
    found = []

    def measure(options):
        found.append(options.accelerator)
        raise WorkloadError("the machine", "<this>", "was measured", "go on")

    monkeypatch.setattr("hrm.profiling.machine.profile_machine", measure)
    options = BenchOptions(model=shape, gpus=2, accelerator=AcceleratorOptions(name=accelerator, link_bytes_per_s=1e9))
    with pytest.raises(WorkloadError, match="was measured"):
        solved(options, shape)
    assert found == [measured]
    with pytest.raises(JobError, match="--accelerator is 'cpu': must be cuda or emulated for 2 of them"):
        solved(replace(options, accelerator=AcceleratorOptions(name="cpu")), shape)
