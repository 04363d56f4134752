"""Profiles of this machine: what they hold and where it came from. No timing is asserted."""

import inspect
import subprocess
import sys

import pytest
import torch

from hrm.errors import ProfileError
from hrm.hardware import Figure, HardwareProfile, Source
from hrm.machines import load_profile, save_profile
from hrm.model_spec import ModelSpec
from hrm.profiling import ProfilingInterrupted, profile_machine
from hrm.profiling.attention import Heads, attention_call
from hrm.profiling.contention import Worker, measure_contention
from hrm.profiling.environment import host_facts, usable_cores
from hrm.profiling.gemm import GemmShape, gemm_rate, model_shapes
from hrm.profiling.link import host_transfer
from hrm.profiling.memory import array_bytes, measure_memory
from hrm.profiling.timing import clock_sampler
from hrm.units import GB, MIB

TINY = ModelSpec(
    name="tiny", family="mixtral", num_layers=2, hidden_size=64, intermediate_size=96,
    num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4, experts_per_token=2, vocab_size=100,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch):
    monkeypatch.setattr("hrm.profiling.memory.QUICK_BYTES", 8 * MIB)
    monkeypatch.setattr("hrm.profiling.gemm.POOL_BYTES", MIB)


def figures_of(node, path="") -> dict[str, Figure]:
    if isinstance(node, Figure):
        return {path: node}
    found: dict[str, Figure] = {}
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, tuple):
        items = enumerate(node)
    else:
        names = getattr(node, "__dataclass_fields__", {})
        items = ((name, getattr(node, name)) for name in names)
    for key, value in items:
        found |= figures_of(value, f"{path}.{key}")
    return found


@pytest.fixture(scope="module")
def told() -> list[tuple[float, float, str]]:
    return []


@pytest.fixture(scope="module")
def emulated(told) -> HardwareProfile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm.profiling.memory.QUICK_BYTES", 8 * MIB)
        return profile_machine(
            "emulated",
            gpu_memory_bytes=4 * MIB,
            link_bandwidth_bytes_per_s=1e9,
            quick=True,
            model=TINY,
            dtypes=("bfloat16", "float32"),
            progress=lambda done, total, text: told.append((done, total, text)),
            command="hrm profile",
            budget_s=2.0,
        )


def test_emulated_profile_is_whole(emulated):
    assert emulated.accelerator == "emulated"
    assert [level.name for level in emulated.levels] == ["gpu", "cpu"]
    assert emulated.top.usable_bytes == 4 * MIB
    assert emulated.host.usable_bytes < host_facts().usable_ram_bytes
    for level in emulated.levels:
        assert set(level.processor.compute_flops_per_s) == {"bfloat16", "float32"}
        assert level.processor.cores >= 1
    assert {(link.source, link.target, link.kind) for link in emulated.links} == {
        ("cpu", "gpu", "pinned"), ("gpu", "cpu", "pinned"), ("cpu", "cpu", "staging"),
    }  # fmt: skip
    for key in ("date", "seconds", "cpu", "torch", "contention", "usable_cores"):
        assert emulated.environment[key]
    assert emulated.environment["command"] == "hrm profile"


def test_every_rate_of_it_was_measured(emulated):
    figures = figures_of(emulated)
    assert len(figures) > 20
    for path, figure in figures.items():
        if any(
            part in path for part in ("capacity_bytes", "reserve_bytes", "datasheet", "request_s")
        ):
            continue
        assert figure.source is Source.MEASURED, path
        assert figure.samples >= 3, path


def test_its_figures_make_sense(emulated):
    for link in (emulated.h2d, emulated.d2h):
        rate = link.bandwidth_bytes_per_s
        assert rate.datasheet is not None
        assert rate.datasheet.value == 1e9
        assert rate.at() <= 1e9
        assert 0 <= link.latency_s.value < 1
    for level in emulated.levels:
        assert 1e-7 < level.processor.launch_latency_s.value < 1
        gemm = level.processor.compute_flops_per_s["float32"]
        assert gemm.ceiling is not None
        assert gemm.ceiling.value >= gemm.planned.value
        tokens = [size for size, _ in gemm.planned.curve]
        assert tokens == sorted(tokens)
        assert tokens[0] == 1
        assert "shapes of tiny" in gemm.planned.note


def test_it_is_saved_and_loaded(emulated, tmp_path):
    save_profile(tmp_path / "machine.yaml", emulated)
    assert load_profile(tmp_path / "machine.yaml") == emulated


def test_progress_runs_to_the_end(emulated, told):
    assert [text for _, _, text in told][-1] == "done"
    assert all(done <= total for done, total, _ in told)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    done_s, total_s, _ = told[-1]
    assert done_s == total_s


def test_cpu_profile_has_one_level():
    before = torch.get_num_threads()
    profile = profile_machine("cpu", quick=True, model=TINY, dtypes=("float32",), budget_s=0.5)
    assert torch.get_num_threads() == before
    assert profile.accelerator == "cpu"
    assert not profile.has_accelerator
    assert profile.top.name == "cpu"
    assert profile.links == ()


def test_cuda_profile_is_put_together(monkeypatch):
    """The CPU under another device's name: what is queued has then been done."""
    monkeypatch.setattr("hrm.profiling.machine._resolve", lambda _: ("cuda", "cpu:0"))
    monkeypatch.setattr("hrm.profiling.timing.cuda_sampler", lambda _: clock_sampler())
    facts = {"gpu": "a GPU", "driver": "1.2"}
    monkeypatch.setattr("hrm.profiling.machine.gpu_facts", lambda _: facts)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (96 * MIB, 1200 * MIB))
    monkeypatch.setattr("torch.cuda.synchronize", lambda _: None)
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    plain = host_transfer
    monkeypatch.setattr(
        "hrm.profiling.link.host_transfer", lambda size, pin_target: plain(size, pin_target=False)
    )
    squares = gemm_rate

    def gemm(dtype, *, device="cpu", **rest):
        if device != "cpu" and dtype == "bfloat16":
            raise RuntimeError("no bfloat16 here")
        return squares(dtype, **rest)

    monkeypatch.setattr("hrm.profiling.gemm.gemm_rate", gemm)
    profile = profile_machine(
        "cuda:0", quick=True, model=TINY, dtypes=("float32", "bfloat16"), budget_s=1.0
    )
    assert profile.accelerator == "cuda"
    assert profile.top.processor.name == "a GPU"
    assert profile.top.usable_bytes == 600 * MIB  # half is left of what others fill
    assert set(profile.top.processor.compute_flops_per_s) == {"float32"}
    assert set(profile.host.processor.compute_flops_per_s) == {"float32", "bfloat16"}
    assert {(item.source, item.target, item.kind) for item in profile.links} == {
        ("cpu", "gpu", "pinned"), ("cpu", "gpu", "pageable"),
        ("gpu", "cpu", "pinned"), ("gpu", "cpu", "pageable"), ("cpu", "cpu", "staging"),
    }  # fmt: skip
    assert profile.environment["driver"] == "1.2"


def test_interrupt_says_what_is_lost():
    def progress(done_s, total_s, text):
        if "GEMM" in text:
            raise_at.append(text)

    raise_at: list[str] = []
    steps = iter(range(100))

    def stop(*_args, **_kwargs):
        if next(steps) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm.profiling.gemm.gemm_rate", stop)
        with pytest.raises(ProfilingInterrupted) as caught:
            profile_machine(
                "cpu", quick=True, model=TINY, dtypes=("float32", "bfloat16"), budget_s=0.2,
                progress=progress,
            )  # fmt: skip
    assert caught.value.measured == ("cpu launch latency", "cpu GEMM float32")
    assert caught.value.lost == ("cpu GEMM bfloat16", "cpu attention", "host memory")
    assert "not measured: cpu GEMM bfloat16" in str(caught.value)
    assert len(raise_at) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accelerator": "tpu"}, r"--accelerator is 'tpu': must be auto, cuda:K, emulated or cpu"),
        ({"accelerator": "cuda:99"}, r"--accelerator is 'cuda:99': torch .* sees \d+ CUDA devices"),
        ({"accelerator": "cpu", "dtypes": ["int3"]}, r"--dtype is 'int3': must be one of float32"),
        (
            {"accelerator": "cpu", "link_bandwidth_bytes_per_s": 1e9},
            r"--link-bandwidth is 1000000000.0: is what an emulated link is paced to",
        ),
        (
            {"accelerator": "emulated", "gpu_memory_bytes": 2**60},
            r"--gpu-memory is \d+: must be less than the RAM",
        ),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ProfileError, match=message):
        profile_machine(**arguments)


# ------------------------------------------------------------------------------- benchmarks


def test_attention_is_attention():
    heads = Heads(4, 2, 16)
    call = attention_call(torch.float32, heads, 3, 40)
    call()
    held = inspect.getclosurevars(call).nonlocals
    outputs, queries = held["outputs"], held["queries"]
    keys, values = held["keys_1GCd"], held["values_1GCd"]
    for index in range(3):
        k, v = (x[:, :, 40 * index : 40 * (index + 1)] for x in (keys, values))
        scores = torch.softmax(queries[index] @ k.transpose(2, 3) / 4, dim=-1)
        torch.testing.assert_close(outputs[index], scores @ v)


def test_gemm_curve_takes_off_the_launch():
    shapes = (GemmShape(32, 64), GemmShape(64, 32))
    seconds = 1e-3  # of every call: a rate then is proportional to the work

    def sampler(call, calls):
        call()
        return calls * seconds

    rate = gemm_rate(
        "float32", shapes=shapes, shapes_note="x", quick=True, budget_s=0.01, launch_s=0.0005,
        sampler=sampler,
    )  # fmt: skip
    flops = 2 * 256 * 2 * 32 * 64
    assert rate.planned.at(256) == pytest.approx(flops / (2 * 0.0005), rel=1e-3)
    assert rate.planned.at(1) == pytest.approx(flops / 256 / (2 * 0.0005), rel=1e-3)
    assert rate.ceiling is not None
    assert rate.ceiling.value == pytest.approx(2 * 512**3 / 0.0005, rel=1e-3)


def test_shapes_of_large_models_are_scaled_down():
    (w13, w2), note = model_shapes(TINY, quick=True)
    assert (w13.inputs, w13.outputs, w2.inputs, w2.outputs) == (64, 192, 96, 64)
    assert note == "shapes of tiny"
    (w13, _), note = model_shapes(None, quick=True)
    assert (w13.inputs, w13.outputs) == (512, 3584)
    assert "divided by 2" in note


def test_memory_arrays_exceed_the_cache_or_say_so():
    assert array_bytes(32 * MIB, 10 * GB, quick=False) == 128 * MIB
    assert array_bytes(10**9, 10 * GB, quick=False) == 1024 * MIB
    assert array_bytes(32 * MIB, 80 * MIB, quick=False) == 10 * MIB
    rates = measure_memory(
        num_bytes=4 * MIB, last_level_cache_bytes=2 * MIB, threads=[1], budget_s=0.01
    )
    assert "part may be cached" in rates.note
    assert set(rates.read) == set(rates.copy) == {1}


def test_contention_of_sleepers_is_none():
    import time

    worker = Worker(lambda: time.sleep(0.002), lambda: None)
    shares = measure_contention({"a": worker, "b": worker}, budget_s=0.3)
    assert set(shares) == {"a", "b"}
    assert all(0 < share < 3 for share in shares.values()), shares


def test_contention_raises_what_a_worker_raises():
    def fail():
        raise RuntimeError("no")

    workers = {"a": Worker(lambda: None, lambda: None), "b": Worker(fail, lambda: None)}
    with pytest.raises(RuntimeError, match="no"):
        measure_contention(workers, budget_s=0.05)


def test_cgroup_quota_and_limit_count(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr("hrm.profiling.environment._CGROUP", tmp_path)
    facts = host_facts()
    assert facts.quota_cores == 1.5
    assert facts.usable_cores == usable_cores() == 1
    assert facts.usable_ram_bytes == 2**30
    assert facts.describe()["cgroup_cpu_quota"] == "1.5 cores"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_facts().quota_cores is None
    assert host_facts().usable_ram_bytes == host_facts().ram_bytes


@pytest.mark.parametrize("module", ["hrm.profiling", "hrm.profiling.pacing", "hrm.machines"])
def test_import_is_light(module):
    code = f"import sys, {module}; print({{'torch', 'numpy', 'yaml'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
