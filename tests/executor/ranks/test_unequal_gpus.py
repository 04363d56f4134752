"""Policies for GPUs that are not alike: a process for each, with its own layers, memory and link."""

from dataclasses import replace

import pytest

from executor.job.machine import AcceleratorOptions, budgeted_plan, emulated_machine, files_of_ranks
from executor.job.rank import for_rank
from hrm.estimate import estimate
from hrm.gpus import only_gpus
from hrm.hardware import GpuCard, Host
from hrm.machines import assemble_all
from hrm.policy import Parallelism
from hrm.policy_file import PolicyFile, policy_file_of, save_policy_file
from hrm.run_record import read_run
from hrm.tasks import Phase
from hrm.validate import validate
from hrm.workload import Workload
from tests.executor.runtime.jobs import PROMPTS, exit_code, line, outputs, refused, run_words, tokens_of, write_lines
from tests.executor.runtime.support import architecture, level, link, make_policy, rate
from tests.executor.tiny_models import save_tiny, transformers_greedy

pytestmark = pytest.mark.usefixtures("forked_ranks")
LAYERS = 5


def card(name: str, gpu_bytes: float, moves: float) -> GpuCard:
    return GpuCard(
        name=name,
        level=level("gpu", gpu_bytes),
        h2d=link("cpu", "gpu", moves),
        d2h=link("gpu", "cpu", moves / 2),
        peer=link("gpu", "gpu", 1e9, kind="peer"),
        default_host="none",
    )


CARDS = [card("a", 2e6, 40e6), card("old", 1e6, 1e6), card("b", 1.5e6, 20e6), card("c", 1.8e6, 10e6)]
USED = (0, 2, 3)


HOST = Host(
    name="host",
    level=level("cpu", 40e6),
    staging=link("cpu", "cpu", 1e10, kind="staging"),
    root_port_bytes_per_s=rate(1e12),
    max_gpus=4,
)


def machine():
    return replace(assemble_all([(1, one) for one in CARDS], HOST), accelerator="emulated")


def policy_for(spec, **changes) -> PolicyFile:
    """A policy of three stages on the machine's GPUs but one."""
    plain = make_policy(
        LAYERS,
        batch_size=4,
        micro_batch_size=2,
        resident_experts=(1, 2, 0, 3, 5),
        parallelism=Parallelism.PIPELINE,
        stage_lengths=(3, 1, 1),
        gpus=USED,
    )
    profile, workload = machine(), Workload(name="test", prompt_len=20, max_prompt_len=40, gen_len=5)
    predicted = estimate(spec, replace(plain, **changes), profile, workload)
    return policy_file_of(predicted, spec, profile, workload)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("tied", tmp_path_factory.mktemp("model"), num_layers=LAYERS)


@pytest.fixture(scope="module")
def spec(model):
    return architecture(model).spec


def test_stages_of_unequal_gpus_answer_as_transformers_does_each_with_its_own_memory_and_link(
    model, spec, tmp_path, capsys
):
    content = policy_for(spec)
    save_policy_file(tmp_path / "policy.json", content)
    lines = [line(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    words = run_words(model, tmp_path / "policy.json", write_lines(tmp_path, lines), tmp_path / "run", "--gpus", "3")
    assert exit_code(words) == 0, capsys.readouterr().err
    answers = {name: tokens_of(item) for name, item in outputs(tmp_path / "run").items()}
    assert answers == {f"r{n}": transformers_greedy(model, prompt, 5) for n, prompt in enumerate(PROMPTS)}

    record = read_run(tmp_path / "run")
    ranks = [record, *record.ranks]
    paces = [(own.h2d_bytes_per_s, own.d2h_bytes_per_s) for own in (record.accelerator, *record.ranks)]
    assert paces == [(40e6, 20e6), (20e6, 10e6), (10e6, 5e6)]
    for rank, of_file in zip(ranks, files_of_ranks(content), strict=True):
        plan = budgeted_plan(of_file, of_file.policy)
        for of_level in (plan.gpu, plan.cpu):
            told = rank.memory[of_level.name]
            assert told.planned_bytes == {purpose.value: size for purpose, size in of_level.purposes.items()}
            assert told.peak_total_bytes <= told.planned_total_bytes <= told.capacity_bytes
            assert told.peak_bytes.get("weights") == told.planned_bytes.get("weights")
            assert told.peak_bytes.get("resident_weights") == told.planned_bytes.get("resident_weights")
    assert [rank.memory["gpu"].capacity_bytes for rank in ranks] == [2_000_000, 1_500_000, 1_800_000]
    assert sum(rank.memory["cpu"].capacity_bytes for rank in ranks) <= 40e6
    assert len(record.routed_tokens) == LAYERS
    counts = [rank.phases[Phase.DECODE.value].kinds["POST_ATTENTION"].count for rank in ranks]
    assert counts == [3 * counts[1], counts[1], counts[1]]

    validation = validate(record)
    for phase in Phase:
        of_ranks = [validation.rank_s[phase, rank] for rank in range(3)]
        assert min(each.predicted for each in of_ranks) > 0
        assert of_ranks[0].predicted != of_ranks[1].predicted != of_ranks[2].predicted
    assert validation.slowest_rank in range(3)


def test_each_rank_has_its_own_gpu_and_of_the_hosts_memory_what_it_plans(spec):
    content = policy_for(spec)
    files = files_of_ranks(content)
    assert [one.model.num_layers for one in files] == [3, 1, 1]
    assert [one.policy.resident_experts for one in files] == [(1, 2, 0), (3,), (5,)]
    assert [(one.model.has_embedding, one.model.has_head) for one in files] == [(1, 0), (0, 0), (0, 1)]
    emulated = [emulated_machine(AcceleratorOptions(), one) for one in files]
    for own, used in zip(emulated, USED, strict=True):
        assert own is not None
        assert (own.gpu_memory_bytes, own.h2d, own.d2h) == (
            CARDS[used].level.usable_bytes,
            CARDS[used].h2d,
            CARDS[used].d2h,
        )
    plans = [budgeted_plan(one, one.policy) for one in files]
    assert all(plan.fits for plan in plans)
    of_host = [plan.cpu.planned_bytes for plan in plans]
    for plan, needed in zip(plans, of_host, strict=True):
        assert plan.cpu.capacity_bytes == int(40e6) * needed // sum(of_host)
    just = replace(content, memory_budget_bytes={"gpu": content.memory_budget_bytes["gpu"], "cpu": sum(of_host)})
    assert all(budgeted_plan(one, one.policy).fits for one in files_of_ranks(just))
    less = replace(just, memory_budget_bytes={**just.memory_budget_bytes, "cpu": sum(of_host) - 1})
    assert not all(budgeted_plan(one, one.policy).fits for one in files_of_ranks(less))


def test_ranks_in_tensor_parallel_on_unequal_gpus_have_what_the_least_has(spec):
    files = files_of_ranks(policy_for(spec, parallelism=Parallelism.TENSOR, stage_lengths=(), gpus=(0, 2)))
    assert len(files) == 2
    for one in files:
        assert one.profile.top.usable_bytes == CARDS[2].level.usable_bytes
        assert one.profile.h2d.bandwidth_bytes_per_s.at() == 20e6
        assert one.model.ranks == 2


def test_one_gpu_alone_is_run_in_one_process(spec):
    policy = {"parallelism": Parallelism.TENSOR, "stage_lengths": (), "gpus": (2,)}
    (alone,) = files_of_ranks(policy_for(spec, **policy))
    assert alone.profile.levels == only_gpus(machine(), (2,)).levels
    assert (alone.policy.gpus, alone.model) == ((), spec)
    assert for_rank(AcceleratorOptions(name="cuda"), 0, 1, (2,)).name == "cuda:2"


def test_fewer_of_equal_gpus_are_as_many_ranks(spec):
    three = replace(assemble_all([(3, CARDS[0])], HOST), accelerator="emulated")
    policy = policy_for(spec, parallelism=Parallelism.TENSOR, stage_lengths=(), gpus=(0, 1))
    files = files_of_ranks(replace(policy, profile=three))
    assert [one.model.ranks for one in files] == [2, 2]
    assert files[0].profile.top.usable_bytes == pytest.approx(2e6)
    assert files[0].profile.host.usable_bytes == pytest.approx(20e6)


@pytest.mark.parametrize(("named", "own"), [("cuda", "023"), ("cuda:1", "134"), ("cuda:5,6,9", "569")])
def test_devices_have_the_numbers_of_the_gpus_that_are_used(named, own):
    options = AcceleratorOptions(name=named)
    assert [for_rank(options, rank, 3, USED).name for rank in range(3)] == [f"cuda:{device}" for device in own]


def test_a_stage_that_does_not_fit_its_gpu_is_refused_before_anything_is_read(model, spec, tmp_path, capsys):
    content = policy_for(spec, stage_lengths=(1, 1, 3), resident_experts=(0, 0, 5, 5, 5))
    first, _, last = (budgeted_plan(one, one.policy).gpu.planned_bytes for one in files_of_ranks(content))
    all_bytes = content.profile.top.usable_bytes
    budget = 1 + first * all_bytes // CARDS[0].level.usable_bytes
    assert budget * CARDS[3].level.usable_bytes // all_bytes < last
    tight = replace(content, memory_budget_bytes={**content.memory_budget_bytes, "gpu": budget})
    save_policy_file(tmp_path / "policy.json", tight)
    lines = write_lines(tmp_path, [line("r", PROMPTS[0])])
    words = run_words(model, tmp_path / "policy.json", lines, tmp_path / "run")
    assert exit_code(words) == 2
    refused(capsys.readouterr(), "memory at level gpu", "must fit the usable")
