"""Profiles of machines with GPUs, put together from fake ones whose tensors live on the CPU."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hrm.catalog import list_files
from hrm.contract.host_kernels import HostKernels
from hrm.contract.libraries import ATTENTION, WORKSPACES, settle_libraries
from hrm.errors import ProfileError
from hrm.hardware import Figure, HardwareProfile, Source
from hrm.machines import load_profile, save_profile
from hrm.profiling import ProfileOptions, ProfilingInterrupted, profile_machine
from hrm.profiling.gemm import gemm_rate
from hrm.profiling.gpu import CudaGpu, together
from hrm.profiling.gpu_link import gpu_transfer, peer_transfer
from hrm.profiling.machine.gpu_level import DATASHEETS
from hrm.profiling.nvml import GpuFacts
from hrm.profiling.settle import Settling, settle
from hrm.profiling.timing import clock_sampler
from hrm.units import GB, KIB, MIB
from tests.executor.runtime.device_tensor import DEVICE, DeviceTensor, WithDevice, waits
from tests.hrm.profiling.fakes import TINY, Clock, FakeGpu, figures_of, small_sizes


def measure(gpus, *, patch, dtypes=("float32",), passes=1, progress=None, **changes) -> HardwareProfile:
    """A profile with these GPUs in the place of CUDA's."""
    machine = "hrm.profiling.machine"
    patch.setattr(f"{machine}.PASSES", passes)
    indices = tuple(range(len(gpus)))
    patch.setattr(f"{machine}._resolve", lambda _: ("cuda", indices))
    patch.setattr(f"{machine}._gpus", lambda _: list(gpus))
    options = {"quick": True, "model": TINY, "dtypes": dtypes, "budget_s": 0.5}
    return profile_machine(ProfileOptions("cuda:all", **(options | changes)), progress=progress)


@pytest.fixture(scope="module")
def one() -> HardwareProfile:
    with small_sizes() as patch:
        real = gemm_rate

        def gemm(dtype, shapes, computer, **rest):
            if computer.sampler is not None and dtype == "bfloat16":  # asked of the GPU
                raise RuntimeError("no bfloat16 here")
            return real(dtype, shapes, replace(computer, device="cpu", sampler=None), **rest)

        patch.setattr("hrm.profiling.gemm.gemm_rate", gemm)
        facts = GpuFacts({"gpu": "a GPU", "driver": "1.2"}, ("others use the card: 1 process",))
        gpu = FakeGpu(facts=facts, busy=("the card was busy 37% of the time",), clocks=(300.0, 1500.0))
        return measure([gpu], patch=patch, dtypes=("float32", "bfloat16"), passes=3)


@pytest.fixture(scope="module")
def four() -> HardwareProfile:
    with small_sizes() as patch:

        def known(gpu, *, seconds):
            rate = next(settled)
            return Settling(None, None, None, rate, rate)

        settling = "hrm.profiling.settle.settle"
        patch.setattr(settling, known)
        # After the first GPU under load, all four in every pass; the second of them is slow.
        settled = chain([1e12], cycle([1e12, 0.5e12, 1.1e12, 1e12]))
        gpus = [FakeGpu(i, name="a GPU", free_bytes=(12 - i) * MIB) for i in range(4)]
        return measure(gpus, patch=patch, passes=3)


def kinds(profile):
    return {(link.source, link.target, link.kind) for link in profile.links}


def test_one_gpu(one):
    assert one.accelerator == "cuda"
    assert one.num_gpus == 1
    assert one.top.processor.name == "a GPU"
    assert one.top.usable_bytes == 600 * MIB  # half is left of what others fill
    assert set(one.top.processor.compute_flops_per_s) == {"float32"}
    assert set(one.host.processor.compute_flops_per_s) == {"float32", "bfloat16"}
    assert kinds(one) == {
        ("cpu", "gpu", "pinned"),
        ("cpu", "gpu", "pageable"),
        ("gpu", "cpu", "pinned"),
        ("gpu", "cpu", "pageable"),
        ("cpu", "cpu", "staging"),
    }
    assert one.environment["driver"] == "1.2"
    assert one.environment["sm_clock_mhz"].startswith("300 idle, 1500 highest under load")


@pytest.fixture(scope="module")
def under_wsl() -> tuple[HardwareProfile, list[int]]:
    """A machine under WSL whose GPU has no memory of its own, and the batches it attended to."""
    batches: list[int] = []

    def attend(queries, keys, values):
        batches.append(len(queries))
        return queries

    with small_sizes() as patch:
        patch.setattr("hrm.profiling.attention.scaled_dot_product_attention", attend)
        patch.setattr("platform.release", lambda: "6.6.87-microsoft-standard-WSL2")
        return measure([FakeGpu(shares_memory=True)], patch=patch), batches


def test_a_gpu_attends_to_whole_batches(under_wsl):
    profile, batches = under_wsl
    assert 16 in batches
    assert profile.top.processor.attention_request_s is None
    assert profile.host.processor.attention_request_s is not None


def test_memory_that_is_shared_or_pinned_in_part_is_told(under_wsl, one):
    profile, _ = under_wsl
    pinnable = profile.host.pinnable_bytes
    assert pinnable is not None
    assert pinnable.value == profile.host.capacity_bytes.value / 2
    assert pinnable.source is Source.ASSUMED
    assert "share one memory, which these levels count twice" in profile.environment["warnings"]
    assert one.host.pinnable_bytes is None
    assert "share one memory" not in one.environment["warnings"]


class NamedDevice(WithDevice):
    """A device's name does for the device."""

    def __torch_function__(self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and not isinstance(args[0], DeviceTensor):
            return func(*args)  # the host's own
        args = tuple(DEVICE if arg == str(DEVICE) else arg for arg in args)
        named = dict(kwargs or {})
        if named.get("device") == str(DEVICE):
            named["device"] = DEVICE
        return super().__torch_function__(func, types, args, named)


def test_what_is_timed_on_a_gpu_lies_there_and_waits_for_copies_alone():
    gpu = FakeGpu(free_bytes=64 * MIB)
    gpu.device = str(DEVICE)
    with small_sizes() as patch, NamedDevice():
        patch.setattr(torch, "inference_mode", torch.no_grad)  # such tensors cannot be wrapped
        waits.clear()
        profile = measure([gpu], patch=patch, dtypes=("bfloat16", "float32"))
    assert set(profile.top.processor.compute_flops_per_s) == {"bfloat16", "float32"}
    assert {wait.operator for wait in waits} == {"aten.copy_.default", "aten._to_copy.default"}
    rates = {level.name: level.processor.compute_flops_per_s["bfloat16"].achieved for level in profile.levels}
    most = {name: rate.curve[-1][0] for name, rate in rates.items() if rate is not None and rate.curve}
    assert most == {"gpu": 2048, "cpu": 256}, "what a chunk gives an expert is beyond a GPU's ridge"


def test_one_gpu_tells_who_else_uses_it(one):
    warnings = one.environment["warnings"]
    assert "the card was busy 37% of the time" in warnings
    assert "gpu0: others use the card: 1 process" in warnings


def test_its_rates_were_measured(one):
    for path, figure in figures_of(one).items():
        if not any(part in path for part in ("capacity_bytes", "reserve_bytes", "request_s")):
            assert figure.source is Source.MEASURED, path
            assert figure.samples >= 3, path


def test_four_gpus_are_one_level(four):
    assert four.num_gpus == 4
    assert four.name.startswith("4x a GPU in ")
    assert four.top.processor.name == "a GPU", "as torch names each of them"
    assert four.top.capacity_bytes.value == 4 * 1200 * MIB
    read = four.top.read_bytes_per_s.planned
    assert read.source is Source.DERIVED
    assert "times 2, measured on gpu0" in read.note, "plans wait for the one at half of the rate"
    assert "gpu1 reaches 50% of gpu0" in four.environment["warnings"]


def test_four_gpus_have_links_together_alone_and_among_them(four):
    alone = {
        (source, target, "pinned")
        for index in range(4)
        for source, target in (("cpu", f"gpu{index}"), (f"gpu{index}", "cpu"))
    }
    ring = {(f"gpu{index}", f"gpu{(index + 1) % 4}", "peer") for index in range(4)}
    assert kinds(four) == {
        ("cpu", "gpu", "pinned"),
        ("cpu", "gpu", "pageable"),
        ("gpu", "cpu", "pinned"),
        ("gpu", "cpu", "pageable"),
        ("cpu", "cpu", "staging"),
        ("gpu", "gpu", "peer"),
        *alone,
        *ring,
    }
    for planned, ends in ((four.h2d, ("cpu", "gpu")), (four.d2h, ("gpu", "cpu"))):
        own = [four.link(*(f"{end}{index}" if end == "gpu" else end for end in ends)) for index in range(4)]
        ceiling = planned.bandwidth_bytes_per_s.ceiling
        assert ceiling is not None
        assert ceiling.value == pytest.approx(sum(link.bandwidth_bytes_per_s.at() for link in own))
        assert ceiling.source is Source.DERIVED
        assert "all 4 GPUs at once" in planned.bandwidth_bytes_per_s.planned.note
    peers = [link for link in four.links if link.kind == "peer" and link.source != "gpu"]
    slowest = min(link.bandwidth_bytes_per_s.at() for link in peers)
    assert four.link("gpu", "gpu", "peer").bandwidth_bytes_per_s.at() == slowest
    notes = {(link.source, link.target): link.bandwidth_bytes_per_s.planned.note for link in peers}
    assert notes["gpu0", "gpu1"].startswith("straight")
    assert notes["gpu3", "gpu0"].startswith("through the host's memory")


def test_they_are_saved_and_loaded(one, four, tmp_path):
    for profile in (one, four):
        save_profile(tmp_path / "machine.yaml", profile)
        assert load_profile(tmp_path / "machine.yaml") == profile


def test_full_mode_measures_every_pair(tmp_path):
    with small_sizes() as patch:
        for name in ("gemm.FULL_TOKENS", "attention.FULL_CONTEXTS", "attention.FULL_BATCHES"):
            patch.setattr(f"hrm.profiling.{name}", (1, 4))
        patch.setattr("hrm.profiling.gemm.FULL_SQUARES", (64, 128))
        patch.setattr("hrm.profiling.attention.FULL_BYTES", MIB)
        patch.setattr("hrm.profiling.memory.FULL_BYTES", 4 * MIB)
        profile = measure([FakeGpu(0), FakeGpu(1)], patch=patch, quick=False)
    pairs = {(x.source, x.target) for x in profile.links if x.kind == "peer"}
    assert pairs == {("gpu", "gpu"), ("gpu0", "gpu1"), ("gpu1", "gpu0")}


def test_a_gpu_without_bfloat16_is_measured_and_planned_in_float16():
    with small_sizes() as patch:
        profile = measure([FakeGpu(has_bfloat16=False)], patch=patch, dtypes=("bfloat16",))
    assert "float16" in profile.top.processor.compute_flops_per_s
    assert profile.default_dtype == "float16"


@pytest.mark.parametrize("groups", [True, False])
def test_a_gpu_issues_its_own_operators_whatever_the_hosts_kernels_fuse(groups):
    def multiply(x, weight, out):
        torch.mm(x, weight.T, out=out)

    def attend(_, cache, *__):
        time.sleep(1e-5 * len(cache))  # more tokens take longer: what takes nothing has a rate without end now and then

    def leave(*_):
        pass

    kernels = HostKernels(name="some", multiply=multiply, attend=attend, stage=leave, fuses_operators=True)
    with small_sizes() as patch:
        profile = measure([FakeGpu(groups_experts=groups)], patch=patch, kernels=kernels)
    assert profile.host.processor.fuses_operators
    assert not profile.top.processor.fuses_operators
    assert profile.top.processor.groups_experts is groups


def test_memory_may_be_capped_but_not_raised():
    with small_sizes() as patch:
        profile = measure([FakeGpu(0), FakeGpu(1)], patch=patch, gpu_memory_bytes=64 * MIB)
        assert profile.top.capacity_bytes.value == 64 * MIB
        assert profile.top.reserve_bytes.value == 32 * MIB
        with pytest.raises(ProfileError, match=r"--gpu-memory is \d+: cpu and cpu have \d+ bytes"):
            measure([FakeGpu(0), FakeGpu(1)], patch=patch, gpu_memory_bytes=3000 * MIB)
        with pytest.raises(ProfileError, match=r"--gpu-memory is <5.00 kB>: must be at least 8.19 kB, a page for each"):
            measure([FakeGpu(0), FakeGpu(1)], patch=patch, gpu_memory_bytes=5000)


@pytest.mark.parametrize(("pcie", "is_told"), [(1e15, True), (1e3, False)])
def test_pcie_is_laid_beside_the_link_unless_the_driver_errs(pcie, is_told):
    facts = GpuFacts({"gpu": "a GPU"}, (), pcie)
    with small_sizes() as patch:
        profile = measure([FakeGpu(facts=facts)], patch=patch)
    assert (profile.h2d.bandwidth_bytes_per_s.datasheet is not None) is is_told
    assert ("more than PCIe" in profile.environment.get("warnings", "")) is not is_told


def test_known_cards_have_their_data_sheet_unless_they_are_slices():
    assert set(DATASHEETS.values()) <= set(list_files().gpus)
    with small_sizes() as patch:
        card = measure([FakeGpu(name="NVIDIA L4"), FakeGpu(1, name="NVIDIA L4")], patch=patch)
        mixed = measure([FakeGpu(name="NVIDIA L4"), FakeGpu(1, name="Tesla T4")], patch=patch)
        facts = GpuFacts({"gpu": "NVIDIA L4", "mig": "this is a slice, 1g"}, ("a slice",))
        part = measure([FakeGpu(name="NVIDIA L4", facts=facts)], patch=patch)
    sheet = card.top.read_bytes_per_s.datasheet
    assert sheet is not None
    assert sheet.value == pytest.approx(2 * 300 * GB)
    assert card.top.processor.compute_flops_per_s["float32"].datasheet is not None
    assert part.top.read_bytes_per_s.datasheet is None
    assert "the GPUs differ: NVIDIA L4, Tesla T4" in mixed.environment["warnings"]
    assert "gpu0: a slice" in part.environment["warnings"]


def test_faster_than_the_data_sheet_is_no_machine(monkeypatch):
    """A GPU whose memory is read in no time has read its cache, or its clock is wrong."""

    class Instant(FakeGpu):
        def sampler(self):
            def sample(call, calls):
                call()
                return 1e-9 * calls

            return sample

    with small_sizes() as patch, pytest.raises(ProfileError, match="above the data sheet"):
        measure([Instant(name="NVIDIA L4")], patch=patch)


def test_it_goes_on_after_an_interruption(tmp_path):
    path = tmp_path / "partial"
    with small_sizes() as patch:
        with pytest.MonkeyPatch.context() as stop:

            def interrupt(*_args, **_kwargs):
                raise KeyboardInterrupt

            stop.setattr("hrm.profiling.contention.bytes_together", interrupt)
            with pytest.raises(ProfilingInterrupted, match="not measured: host memory, all at once") as caught:
                measure([FakeGpu(0), FakeGpu(1)], patch=patch, passes=3, partial=path)
        ran, at_once = [], []

        def bytes_together(workers, *, budget_s):
            at_once.append(list(workers))
            return Figure(value=1e15, source=Source.MEASURED)

        patch.setattr("hrm.profiling.contention.bytes_together", bytes_together)
        profile = measure(
            [FakeGpu(0), FakeGpu(1)],
            patch=patch,
            passes=3,
            partial=path,
            resume=True,
            progress=lambda _done, _total, text: ran.append(text),
        )
    assert ran[0] == "host memory, all at once (1 of 3)"
    assert ran == [*caught.value.lost, "done"]
    assert "gpu under load" in caught.value.measured
    assert at_once == [["attention", "staging", "h2d"]] * 3
    assert profile.host.shared_bytes_per_s is not None
    assert profile.host.shared_bytes_per_s.at() == 1e15
    done, lost = len(caught.value.measured), len(caught.value.lost)
    assert profile.environment["resumed"].startswith(f"{done} of {done + lost} measurements are of ")


# ------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("to_device", [True, False])
def test_transfers_are_shared_out_and_arrive(count, to_device):
    gpus = [FakeGpu(index) for index in range(count)]
    transfer = gpu_transfer(gpus, to_device=to_device, pinned=True, largest_bytes=MIB)
    call = transfer(64 * KIB)
    assert together(gpus)(call, 3) > 0
    assert [gpu.queued_calls for gpu in gpus] == [0 if count == 1 else 1] * count
    transfer(MIB)()


def test_a_transfer_that_arrives_changed_is_no_transfer(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *_args, **_rest: self)
    with pytest.raises(RuntimeError, match="65536 bytes arrived changed"):
        peer_transfer(FakeGpu(0), FakeGpu(1), MIB)(64 * KIB)


def test_together_waits_for_every_gpu():
    waited = []

    class Slow(FakeGpu):
        def wait(self):
            waited.append(self.index)

    together([Slow(0), Slow(1)])(lambda: None, 5)
    assert waited == [0, 1]


class Hot(FakeGpu):
    """A GPU that computes and clocks slower with every product."""

    def __init__(self, clock, *, slower_by=0.0, **settings):
        super().__init__(**settings)
        self.clock, self.slower_by, self.waits = clock, slower_by, 0

    def wait(self):
        self.waits += 1
        self.clock.pass_(1.0 + self.slower_by * min(self.waits, 10) / 10)


def settled(gpu, clock) -> Settling:
    return settle(gpu, seconds=20.0, side=16, clock=clock)


def test_a_gpu_that_keeps_its_clock_is_not_named():
    clock = Clock()
    found = settled(Hot(clock, clocks=(300.0, 1500.0, 1490.0)), clock)
    assert found.idle_mhz == 300
    assert found.settled_mhz == 1490
    assert found.warnings("gpu0") == []


def test_a_gpu_that_throttles_is_named_with_its_clocks_and_the_reason():
    clock = Clock()
    clocks = (300.0, 1500.0, 1500.0, 1500.0, 1200.0)
    found = settled(Hot(clock, slower_by=0.25, clocks=clocks, slowed=("its temperature",)), clock)
    assert found.peak_mhz == 1500
    assert found.settled_mhz == 1200
    assert found.settled_flops_per_s == pytest.approx(2 * 16**3 / 1.25)
    (warning,) = found.warnings("gpu0")
    assert "gpu0 throttles: it got 20% slower under load (clock 1500 to 1200 MHz), by" in warning
    assert "by its temperature" in warning


def test_without_clocks_the_rate_tells():
    clock = Clock()
    found = settled(Hot(clock, slower_by=1.0), clock)
    assert found.peak_mhz is None
    assert found.settled_flops_per_s < 0.7 * found.peak_flops_per_s
    assert found.warnings("gpu0")[0].startswith("gpu0 throttles: it got 3")


def test_no_cuda_call_outside_the_seam():
    """Everything else runs in these tests; these few alone need a card."""
    root = Path(__file__).parents[3] / "hrm" / "profiling"
    with_cuda = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if "torch.cuda." in path.read_text(encoding="utf-8")
    }
    assert with_cuda == {"gpu.py", "pinned.py", "machine/__init__.py"}


def test_the_host_clock_times_what_is_queued():
    assert clock_sampler(iter([1.0, 3.0]).__next__)(lambda: None, 2) == 2.0


def test_libraries_are_told_what_to_take_and_do_unless_the_user_says_how():
    untouched, given = {"OTHER": "x"}, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    settle_libraries(untouched)
    settle_libraries(given)
    assert untouched == {"OTHER": "x", **WORKSPACES, **ATTENTION}
    assert given == {**WORKSPACES, **ATTENTION, "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    pairs = WORKSPACES["CUBLAS_WORKSPACE_CONFIG"].strip(":").split(":")
    total_kib = sum(int(a) * int(b) for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert total_kib == int(WORKSPACES["CUBLASLT_WORKSPACE_SIZE"])


def test_a_gpu_is_measured_with_the_workspaces_and_the_attention_that_runs_have(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    told = SimpleNamespace(name="a GPU", uuid="1234", is_integrated=0, major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    assert CudaGpu(0).device == "cuda:0"
    assert CudaGpu(0).has_bfloat16
    assert not CudaGpu(0).groups_experts
    told.major = 9
    assert CudaGpu(0).groups_experts
    told.major = 7
    assert not CudaGpu(0).has_bfloat16, "a T4 only emulates it"
    assert os.environ == WORKSPACES | ATTENTION
