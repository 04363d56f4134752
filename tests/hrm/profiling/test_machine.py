"""Profiles of this machine: what they hold and where it came from. No timing is asserted."""

import inspect
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hrm.contract.host_kernels import HostKernels, installed_kernels
from hrm.contract.pacing import EMULATED_LATENCY_S
from hrm.errors import ProfileError
from hrm.formats import USUAL_FORMATS, packed_format
from hrm.hardware import HardwareProfile, Source
from hrm.machines import load_profile, one_part, save_profile
from hrm.model_spec import BUILT_IN_MODELS, packed_as
from hrm.profiling import ProfileOptions, ProfilingInterrupted, profile_machine
from hrm.profiling.attention import Heads, KvCache, attention_call, attention_rate, batch_call
from hrm.profiling.environment import host_facts
from hrm.profiling.gemm import GemmShape, Shapes, gemm_rate, model_shapes
from hrm.profiling.machine.host import attention_worker, staging_worker
from hrm.profiling.machine.run import Run
from hrm.profiling.timing import Computer
from hrm.units import KIB, MIB
from tests.hrm.profiling.fakes import TINY, figures_of, small_sizes


@pytest.fixture(autouse=True)
def small():
    with small_sizes():
        yield


@pytest.fixture(scope="module")
def told() -> list[tuple[float, float, str]]:
    return []


@pytest.fixture(scope="module")
def emulated(told, tmp_path_factory) -> HardwareProfile:
    with small_sizes(passes=3):
        return profile_machine(
            ProfileOptions(
                "emulated",
                gpu_memory_bytes=4 * MIB,
                link_bandwidth_bytes_per_s=1e9,
                quick=True,
                model=TINY,
                dtypes=("bfloat16", "float32"),
                disk=tmp_path_factory.mktemp("disk"),
                command="hrm profile",
                budget_s=2.0,
            ),
            progress=lambda done, total, text: told.append((done, total, text)),
        )


def test_emulated_profile_is_whole(emulated):
    assert emulated.accelerator == "emulated"
    assert [level.name for level in emulated.levels] == ["gpu", "cpu"]
    assert emulated.top.usable_bytes == 4 * MIB
    assert emulated.host.usable_bytes < host_facts().usable_ram_bytes
    for level in emulated.levels:
        assert set(level.processor.compute_flops_per_s) == {"bfloat16", "float32"}
        assert level.processor.cores >= 1
    assert [cache.name for cache in emulated.host.caches] == ["L1", "L2"]
    assert emulated.top.caches == ()
    assert {(link.source, link.target, link.kind) for link in emulated.links} == {
        ("cpu", "gpu", "pinned"),
        ("gpu", "cpu", "pinned"),
        ("cpu", "cpu", "staging"),
    }
    assert emulated.disk is not None
    assert emulated.disk.read_bytes_per_s.at() > 0
    for key in ("date", "seconds", "cpu", "torch", "usable_cores", "threads", "others"):
        assert emulated.environment[key]
    assert emulated.environment["command"] == "hrm profile"


def test_every_rate_of_it_was_measured(emulated):
    figures = figures_of(emulated)
    assert len(figures) > 40
    for path, figure in figures.items():
        if any(part in path for part in ("capacity_bytes", "reserve_bytes", "datasheet", "request_s")):
            continue
        assert figure.source is Source.MEASURED, path
        assert figure.samples >= 3, path
        assert figure.p20 is not None, path
        assert figure.p80 is not None, path
        assert figure.p20 <= figure.value <= figure.p80, path


def test_its_figures_make_sense(emulated):
    for link in (emulated.h2d, emulated.d2h):
        rate = link.bandwidth_bytes_per_s
        assert rate.datasheet is not None
        assert rate.datasheet.value == 1e9
        assert rate.at() <= 1e9
        assert 0 <= link.latency_s.value < 1
    for level in emulated.levels:
        assert 1e-7 < level.processor.launch_latency_s.value < 1
        assert "with the other lane busy too" in level.processor.launch_latency_s.note
        gemm = level.processor.compute_flops_per_s["float32"]
        assert gemm.ceiling is not None
        assert gemm.ceiling.value >= gemm.planned.value
        tokens = [size for size, _ in gemm.planned.curve]
        assert tokens == sorted(tokens)
        assert tokens[0] == 1
        assert "shapes of tiny" in gemm.planned.note


def test_all_its_lanes_at_once_get_more_than_can_be_read_or_are_no_roof(emulated):
    shared = emulated.host.shared_bytes_per_s
    assert shared is None or shared.at() >= emulated.host.read_bytes_per_s.at()


def test_it_is_saved_and_loaded(emulated, tmp_path):
    save_profile(tmp_path / "machine.yaml", emulated)
    assert load_profile(tmp_path / "machine.yaml") == emulated


def test_progress_runs_to_the_end(emulated, told):
    assert [text for _, _, text in told][-1] == "done"
    assert all(done <= total for done, total, _ in told)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    done_s, total_s, _ = told[-1]
    assert done_s == total_s


def test_slow_links_are_swept_over_small_transfers():
    """At 1 MB/s a transfer of the arena would take seconds, and samples of it minutes."""
    profile = profile_machine(
        ProfileOptions(
            "emulated",
            gpu_memory_bytes=64 * MIB,
            link_bandwidth_bytes_per_s=1e6,
            quick=True,
            model=TINY,
            dtypes=("float32",),
            budget_s=0.5,
        )
    )
    assert profile.h2d.bandwidth_bytes_per_s.at() <= 1e6
    assert "4.10 kB to 32.8 kB" in profile.h2d.bandwidth_bytes_per_s.planned.note
    assert profile.h2d.seconds(64 * KIB) >= EMULATED_LATENCY_S


def test_cpu_profile_has_one_level():
    before = torch.get_num_threads()
    profile = profile_machine(ProfileOptions("cpu", quick=True, model=TINY, dtypes=("float32",), budget_s=0.5))
    assert torch.get_num_threads() == before
    assert profile.accelerator == "cpu"
    assert not profile.has_accelerator
    assert profile.top.name == "cpu"
    assert profile.top.caches
    assert profile.links == ()
    assert profile.disk is None


def test_threads_are_no_more_than_torch_was_told(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    profile = profile_machine(ProfileOptions("cpu", quick=True, model=TINY, dtypes=("float32",), budget_s=0.1))
    assert profile.top.processor.cores == 1
    assert profile.environment["threads"].startswith("1 of torch's")


def test_nodes_are_compared_where_there_are_several(monkeypatch):
    cpus = host_facts().threads
    monkeypatch.setattr("hrm.profiling.topology.numa_nodes", lambda _: {0: frozenset(range(cpus)), 1: frozenset([0])})
    profile = profile_machine(ProfileOptions("cpu", quick=True, model=TINY, dtypes=("float32",), budget_s=0.1))
    assert "cores of node 1 read that of node 0 at" in profile.environment["numa"]


def test_a_disk_that_cannot_be_measured_is_named_and_the_rest_is_kept(tmp_path):
    profile = profile_machine(
        ProfileOptions("cpu", quick=True, model=TINY, dtypes=("float32",), budget_s=0.1, disk=tmp_path / "none")
    )
    assert profile.disk is None
    assert profile.environment["disk"].startswith("not measured: ")
    assert "No such file" in profile.environment["disk"]


# ---------------------------------------------------------------------- interrupted, gone on


def measure(partial, *, resume=False, stop=None, dtypes=("float32", "bfloat16"), **changes):
    """A profile of the CPU in three passes, whose second GEMM is interrupted if `stop`."""
    steps, ran = iter(range(100)), []
    real = gemm_rate

    def gemm(*args, **rest):
        if next(steps) == 1 and stop is not None:
            raise stop
        return real(*args, **rest)

    options = {"quick": True, "model": TINY, "dtypes": dtypes, "budget_s": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm.profiling.gemm.gemm_rate", gemm)
        patch.setattr("hrm.profiling.machine.PASSES", 3)
        profile = profile_machine(
            ProfileOptions("cpu", **(options | changes), partial=partial, resume=resume),
            progress=lambda _done, _total, text: ran.append(text),
        )
    return profile, ran


def test_interrupt_says_what_is_measured_and_keeps_it(tmp_path):
    partial = tmp_path / "machine.yaml.partial"
    with pytest.raises(ProfilingInterrupted) as caught:
        measure(partial, stop=KeyboardInterrupt)
    turns = [*caught.value.measured, *caught.value.lost]
    steps = [turn.removesuffix(" (1 of 3)") for turn in turns if turn.endswith(" (1 of 3)")]
    assert steps[:4] == ["cpu launch latency", "cpu GEMM float32", "cpu GEMM bfloat16", "cpu attention"]
    assert turns == [f"{step} ({which} of 3)" for which in (1, 2, 3) for step in steps]
    assert caught.value.measured == ("cpu launch latency (1 of 3)", "cpu GEMM float32 (1 of 3)")
    assert "not measured: cpu GEMM bfloat16 (1 of 3)" in str(caught.value)
    profile, ran = measure(partial, resume=True)
    assert ran == [*caught.value.lost, "done"]
    assert profile.environment["resumed"].startswith(f"2 of {len(turns)} measurements are of ")
    assert set(profile.top.processor.compute_flops_per_s) == {"float32", "bfloat16"}


def test_what_goes_wrong_keeps_what_was_measured(tmp_path):
    partial = tmp_path / "partial"
    with pytest.raises(MemoryError):
        measure(partial, stop=MemoryError)
    assert "cpu GEMM bfloat16" in measure(partial, resume=True)[1][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtypes": ("float32",)}, "partial: --dtype is 'float32, bfloat16': differs from float32"),
        ({"model": None}, "partial: model is .* differs from not given"),
    ],
)
def test_other_options_do_not_go_on(tmp_path, changes, message):
    partial = tmp_path / "partial"
    with pytest.raises(ProfilingInterrupted):
        measure(partial, stop=KeyboardInterrupt)
    with pytest.raises(ProfileError, match=message):
        measure(partial, resume=True, **changes)
    assert partial.exists()


def test_a_mistake_in_the_options_leaves_no_file(tmp_path):
    partial = tmp_path / "partial"
    with pytest.raises(ProfileError):
        profile_machine(ProfileOptions("emulated", gpu_memory_bytes=2**60, partial=partial))
    assert not partial.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accelerator": "tpu"}, r"--accelerator is 'tpu': must be auto, cuda:K, cuda:K,K"),
        ({"accelerator": "cuda:0,x"}, r"--accelerator is 'cuda:0,x': must be auto"),
        ({"accelerator": "cuda:99"}, r"--accelerator is 'cuda:99': torch .* sees \d+ CUDA devices"),
        ({"accelerator": f"cuda:{'9' * 5000}"}, r"--accelerator is 'cuda:9+\.\.\.9+': must be auto"),
        ({"accelerator": f"emulated:{'9' * 5000}"}, r"--accelerator is 'emulated:9+\.\.\.9+': must be emulated"),
        ({"accelerator": "cuda:0,0"}, r"--accelerator is 'cuda:0,0': names a device twice"),
        ({"accelerator": "cpu", "dtypes": ["int3"]}, r"--dtype is 'int3': must be one of float32"),
        (
            {"accelerator": "cpu", "link_bandwidth_bytes_per_s": 1e9},
            r"--link-bandwidth is <1.00 GB/s>: is what an emulated link is paced to",
        ),
        (
            {"accelerator": "emulated", "gpu_memory_bytes": 2**60},
            r"--gpu-memory is <1152922 TB>: must be less than the .* of RAM",
        ),
        ({"accelerator": "emulated", "gpu_memory_bytes": 1}, r"--gpu-memory is <1 B>: must be at least 4.10 kB"),
        (
            {"accelerator": "emulated", "link_bandwidth_bytes_per_s": 1.0},
            r"--link-bandwidth is <1 B/s>: must be at least 16.4 kB/s, or a measurement would take hours; ask for more",
        ),
    ],
)
def test_bad_requests(monkeypatch, arguments, message):
    monkeypatch.setattr("hrm.profiling.machine.steps.Steps.run", lambda _: pytest.fail("nothing may be measured"))
    with pytest.raises(ProfileError, match=message):
        profile_machine(ProfileOptions(**arguments))


@pytest.mark.parametrize(
    ("accelerator", "devices"), [("cuda:all", (0, 1, 2)), ("cuda:2,0", (2, 0)), ("cuda", (0,)), ("auto", (0,))]
)
def test_which_cuda_devices(monkeypatch, accelerator, devices):
    from hrm.profiling.machine import _resolve

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert _resolve(accelerator) == ("cuda", devices)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    if accelerator != "auto":
        with pytest.raises(ProfileError, match="sees 0 CUDA devices"):
            _resolve(accelerator)


# ------------------------------------------------------------------------------- benchmarks


def test_attention_is_attention():
    """Every request of every window against its definition."""
    heads = Heads(4, 2, 16)
    cache = KvCache(torch.float32, heads, 3 * 40 * 2 * 2 * 16 * 4 * 2, "cpu")
    torch.manual_seed(0)
    call = attention_call(cache, 3, 40)
    torch.manual_seed(0)
    queries = torch.randn(3, 1, 2, 2, 16)
    outputs = inspect.getclosurevars(call).nonlocals["outputs"]
    for window in range(3):
        call()
        start = window * 120 % (cache.tokens // 120 * 120)
        for index in range(3):
            mine = cache.data_C2Gd[start + 40 * index : start + 40 * (index + 1)]
            k, v = (mine[:, which].permute(1, 0, 2) for which in (0, 1))
            scores = torch.softmax(queries[index, 0] @ k.transpose(1, 2) / 4, dim=-1)
            torch.testing.assert_close(outputs[index, 0], scores @ v)


def test_attention_of_a_batch_at_once_is_that_of_its_requests():
    heads = Heads(4, 2, 16)
    cache = KvCache(torch.float32, heads, 3 * 40 * 2 * 2 * 16 * 4 * 2, "cpu")
    torch.manual_seed(0)
    one_by_one = attention_call(cache, 3, 40)
    torch.manual_seed(0)
    at_once = batch_call(cache, 3, 40)
    expected = inspect.getclosurevars(one_by_one).nonlocals["outputs"]
    for _ in range(3):
        one_by_one()
        torch.testing.assert_close(at_once(), expected.squeeze(1))


def test_attention_is_told_over_contexts_and_batches():
    """A request costs 10 µs and its cache is read at 1 GB/s; alone it costs half as much more."""
    heads, calls = Heads(4, 2, 16), {}
    per_token = 2 * 2 * 16 * 4

    def fake_call(cache, requests, context):
        def call():
            alone = 1.5 if requests == 1 else 1.0
            calls["seconds"] = requests * alone * (10e-6 + context * per_token / 1e9)

        return call

    def sampler(call, count):
        call()
        return count * calls["seconds"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm.profiling.attention.attention_call", fake_call)
        patch.setattr("hrm.profiling.attention.QUICK_CONTEXTS", (128, 1024))
        rate = attention_rate("float32", heads, Computer(most_bytes=MIB, sampler=sampler), quick=True, budget_s=1.0)
    assert rate.planned.value == pytest.approx(1e9, rel=1e-3)
    assert "each request costs 10.0 µs besides" in rate.planned.note
    assert "in batches of 16, at context 1024 67% in batches of 1" in rate.planned.note


def test_gemm_curve_takes_off_the_launch():
    shapes = Shapes((GemmShape(32, 64), GemmShape(64, 32)), "x")
    seconds = 1e-3  # of every call: a rate then is proportional to the work

    def sampler(call, calls):
        call()
        return calls * seconds

    rate = gemm_rate("float32", shapes, Computer(sampler=sampler), quick=True, budget_s=0.01, launch_s=0.0005)
    flops = 2 * 256 * 2 * 32 * 64
    assert rate.planned.at(256) == pytest.approx(flops / (2 * 0.0005), rel=1e-3)
    assert rate.planned.at(1) == pytest.approx(flops / 256 / (2 * 0.0005), rel=1e-3)
    assert rate.ceiling is not None
    assert rate.ceiling.value == pytest.approx(2 * 128**3 / 0.0005, rel=1e-3)


def test_kernels_handed_in_are_what_is_measured():
    """A runtime's own compute the shapes and the attention, with the right operands."""
    shapes, heads = Shapes((GemmShape(32, 64), GemmShape(64, 32)), "x"), Heads(4, 2, 16)
    multiplied, attended = set(), set()

    def multiply(x, weight, out):
        torch.mm(x, weight.T, out=out)
        multiplied.add((len(x), *weight.shape))

    def attend(queries, cache, starts, lengths, out):
        assert queries.shape == out.shape == (len(starts), 4 * 16)
        assert cache.shape[1:] == (2, 2, 16)
        assert cache.is_contiguous()
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        assert [0, *ends] == [*starts, len(cache)]
        attended.add((len(starts), *lengths))

    kernels = HostKernels(name="mine", multiply=multiply, attend=attend, stage=torch.Tensor.copy_)
    computer = Computer(kernels=kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm.profiling.attention.QUICK_CONTEXTS", (16, 32))
        patch.setattr("hrm.profiling.attention.QUICK_BATCHES", (1, 2))
        rates = (
            gemm_rate("float32", shapes, computer, quick=True, budget_s=0.01, launch_s=0.0),
            attention_rate("float32", heads, replace(computer, most_bytes=MIB), quick=True, budget_s=0.01),
        )
    assert multiplied == {(n, s.outputs, s.inputs) for n in (1, 4, 16, 64, 256) for s in shapes.of_expert}
    assert attended == {(1, 16), (2, 16, 16), (1, 32), (2, 32, 32)}
    assert all("; mine" in rate.planned.note for rate in rates)


def test_products_with_packed_weights_are_those_of_the_kernels():
    """By what they pack themselves, in the model's formats, or one of every code in a full measurement."""
    shapes, packed = Shapes((GemmShape(32, 64), GemmShape(64, 32)), "x"), set()

    def pack(rows, width, name):
        packed.add((rows, width, name))
        return torch.zeros(rows, width)

    kernels = HostKernels(
        name="mine",
        multiply=lambda x, weight, out: torch.mm(x, weight.T, out=out),
        attend=lambda *_: None,
        stage=torch.Tensor.copy_,
        pack=pack,
    )
    computer = Computer(kernels=kernels)
    rate = gemm_rate("float32", shapes, computer, quick=True, budget_s=0.01, launch_s=0.0, packed="int4-g32")
    assert packed == {(s.outputs, s.inputs, "int4-g32") for s in shapes.of_expert}
    assert rate.planned.note.endswith("weights in int4-g32; mine")
    assert [count for count, _ in rate.planned.curve] == [1, 4, 16, 64, 256]

    def measured(**changes):
        given = ProfileOptions("cpu", **{"model": TINY, "kernels": kernels, **changes})
        return dict(Run(host=cast("Any", None), threads=1, options=given, steps=cast("Any", None)).packed)

    form = packed_format("int4-g16")
    assert form is not None
    assert measured(quick=True) == {}
    assert measured(quick=True, model=packed_as(TINY, form)) == {"int4": "int4-g16"}
    assert measured(model=packed_as(TINY, form)) == {**USUAL_FORMATS, "int4": "int4-g16"}
    assert measured(kernels=None) == measured(kernels=replace(kernels, pack=None)) == {}


def test_staging_is_measured_by_the_kernels_that_are_given():
    staged = []

    def stage(target, source):
        staged.append(len(source))
        target.copy_(source)

    def refuse(*_):
        pytest.fail("only copies")

    kernels = HostKernels(name="mine", multiply=refuse, attend=refuse, stage=stage)
    host = SimpleNamespace(last_level_cache_bytes=MIB, usable_ram_bytes=10**9)
    for given, expected in ((kernels, [MIB]), (None, [])):
        staged.clear()
        run: Any = SimpleNamespace(host=host, options=ProfileOptions("cpu", quick=True, kernels=given))
        staging_worker(run, MIB, threads=1).call()
        assert staged == expected


def test_what_attention_takes_from_others_is_measured_by_the_kernels_that_are_given():
    attended = []

    def attend(queries, cache, starts, lengths, out):
        attended.append((len(queries), len(cache)))

    def refuse(*_):
        pytest.fail("only attention")

    kernels = HostKernels(name="mine", multiply=refuse, attend=attend, stage=refuse)
    host = SimpleNamespace(usable_ram_bytes=10**9)
    for given, expected in ((kernels, [(16, 16 * 512)]), (None, [])):
        attended.clear()
        run: Any = SimpleNamespace(
            host=host, dtypes=("float32",), options=ProfileOptions("cpu", model=TINY, kernels=given)
        )
        worker = attention_worker(run, threads=1)
        worker.call()
        assert attended == expected
        assert worker.host_bytes == 16 * 512 * 2 * 2 * 16 * 4


def test_staging_is_measured_with_the_threads_of_its_lane():
    host = SimpleNamespace(last_level_cache_bytes=MIB, usable_ram_bytes=10**9)
    run: Any = SimpleNamespace(host=host, options=ProfileOptions("cpu", quick=True))
    before = torch.get_num_threads()
    try:
        staging_worker(run, MIB, threads=before + 1).enter()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_weights_of_a_pool_are_taken_in_turn():
    from hrm.profiling.gemm import _Pool

    pool = _Pool("float32", GemmShape(64, 64), "cpu")
    seen = [weights.data_ptr() for weights in islice(pool.weights, 32)]
    assert len(set(seen)) == 16
    assert seen[:16] == seen[16:]


def test_shapes_of_large_models_are_scaled_down(monkeypatch):
    monkeypatch.setattr("hrm.profiling.gemm.QUICK_WEIGHTS", 2**23)
    (w13, w2), note = model_shapes(TINY, quick=True)
    assert (w13.inputs, w13.outputs, w2.inputs, w2.outputs) == (64, 192, 96, 64)
    assert note == "shapes of tiny"
    (w13, _), note = model_shapes(BUILT_IN_MODELS["mixtral-8x7b"], quick=True)
    assert (w13.inputs, w13.outputs) == (1024, 7168)
    assert "divided by 4" in note


@pytest.mark.parametrize("module", ["hrm.profiling", "hrm.contract.pacing", "hrm.machines"])
def test_import_is_light(module):
    code = f"import sys, {module}; print({{'torch', 'numpy', 'yaml'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_two_emulated_accelerators_are_shares_of_the_machine_with_sums_between(tmp_path):
    """A sum takes 1 ms and 1 ms a MiB here: in the ring of two, half of the first in each of two turns."""
    asked: list[int] = []

    def sums_between(ranks: int, sizes: Sequence[int]) -> dict[int, list[float]]:
        asked.append(ranks)
        return {size: [1e-3 + size / MIB * 1e-3] * 10 for size in sizes}

    installed = installed_kernels()
    assert installed is not None
    kernels = replace(installed, sums_between=sums_between, seconds_a_task=lambda ranks: [ranks * 1e-5] * 3)
    options = ProfileOptions(
        "emulated:2",
        gpu_memory_bytes=4 * MIB,
        link_bandwidth_bytes_per_s=1e9,
        quick=True,
        model=TINY,
        dtypes=("bfloat16",),
        disk=tmp_path,
        kernels=kernels,
        budget_s=2.0,
    )
    found = profile_machine(options)
    assert asked == [2]
    assert (found.accelerator, found.num_gpus, found.top.usable_bytes) == ("emulated", 2, 4 * MIB)
    assert found.peer.latency_s.value == pytest.approx(0.5e-3, rel=0.01)
    assert found.peer.bandwidth_bytes_per_s.at() == pytest.approx(MIB / 1e-3, rel=0.01)
    part = one_part(found, is_stage=False)
    assert part.lane_threads == found.lane_threads
    assert part.lane_threads is not None
    assert part.lane_threads.task_s.value == pytest.approx(2e-5)
    assert part.lane_threads.cores == max(1, host_facts().compute_threads // 2)
    lanes_wait = part.lane_threads.cores < sum(level.processor.cores for level in part.levels)
    for level in part.levels:
        assert ("with the other lane busy too" in level.processor.launch_latency_s.note) != lanes_wait
    assert part.top.usable_bytes == 2 * MIB
    assert part.h2d.bandwidth_bytes_per_s.at() <= 1e9 < found.h2d.bandwidth_bytes_per_s.at()
    assert found.host.usable_bytes < host_facts().usable_ram_bytes
    of_one = max(1, host_facts().compute_threads // 2 - host_facts().compute_threads // 4)
    of_both = max(of_one, min(2 * of_one, host_facts().usable_cores))
    read = found.host.read_bytes_per_s
    assert read.achieved is not None
    assert read.ceiling is not None
    assert f"with {of_both} thread" in read.achieved.note, "what both read at once"
    assert read.achieved.value <= read.ceiling.value, "as both are of the machine"


@pytest.mark.parametrize("accelerator", ["emulated:0", "emulated:x", "emulated:2,3", "emulated:9"])
def test_a_number_of_emulated_accelerators_that_there_cannot_be_is_refused(accelerator):
    with pytest.raises(ProfileError, match=r"emulated:N for up to 8"):
        profile_machine(ProfileOptions(accelerator, quick=True))


def test_several_need_something_that_sums(tmp_path):
    with pytest.raises(ProfileError, match=r"emulated:2.*needs the executor"):
        profile_machine(ProfileOptions("emulated:2", quick=True, disk=tmp_path))
