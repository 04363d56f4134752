"""NVML's answers, from a fake one: slices, tenants, clocks, and silence."""

import os
from types import SimpleNamespace

import pytest

from hrm.profiling import nvml

# ruff: noqa: N802 - NVML's names


class NVMLError(Exception):
    pass


class FakeNvml:
    """A card with the UUID GPU-1 and, if asked for, a slice MIG-2 of it; it counts its openings."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1

    def __init__(self, *, pids=(), sliced=False, busy=0, refuses=()):
        self.pids, self.sliced, self.busy, self.refuses = pids, sliced, busy, refuses
        self.opened = 0

    def __getattribute__(self, name):
        def refuse(*_):
            raise NVMLError(name)

        refused = name.startswith("nvml") and name in object.__getattribute__(self, "refuses")
        return refuse if refused else object.__getattribute__(self, name)

    def nvmlInit(self):
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        known = {"GPU-1": "card", "MIG-2": "slice"} if self.sliced else {"GPU-1": "card"}
        if uuid not in known:
            raise NVMLError("not found")
        return known[uuid]

    def nvmlDeviceGetHandleByIndex(self, index):
        if index:
            raise NVMLError("not found")
        return "card"

    def nvmlDeviceIsMigDeviceHandle(self, gpu):
        return gpu == "slice"

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, gpu):
        return "card"

    def nvmlDeviceGetName(self, gpu):
        return b"NVIDIA A100 MIG 1g.5gb" if gpu == "slice" else "NVIDIA A100"

    def nvmlSystemGetDriverVersion(self):
        return b"550.54"

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        return 1410

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        assert gpu == "card", "slices have no clock of their own"
        return 1095

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return 400_000

    def nvmlDeviceGetEccMode(self, gpu):
        return (1, 1)

    def nvmlDeviceGetMigMode(self, gpu):
        return (1 if self.sliced else 0, 0)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, gpu):
        return 4

    def nvmlDeviceGetCurrPcieLinkWidth(self, gpu):
        return 16

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        assert gpu == "card", "tenants of other slices count too"
        return [SimpleNamespace(pid=pid, usedGpuMemory=10**9) for pid in (os.getpid(), *self.pids)]

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=self.busy)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        return 0x4 | 0x20 | 0x1


@pytest.fixture
def fake(monkeypatch):
    def install(**settings):
        module = FakeNvml(**settings)
        monkeypatch.setattr(nvml, "import_module", lambda _: module)
        return module

    return install


def test_facts_of_a_card(fake):
    module = fake()
    facts = nvml.gpu_facts("GPU-1", 0)
    assert facts.lines == {
        "driver": "550.54",
        "max_sm_clock_mhz": "1410",
        "power_limit_w": "400.0",
        "ecc": "on",
        "mig": "off",
        "pcie": "generation 4 x16",
        "other_gpu_processes": "0",
    }
    assert facts.warnings == ()
    assert facts.pcie_bytes_per_s == pytest.approx(31.5e9, rel=0.001)
    assert nvml.clock_mhz("GPU-1", 0) == 1095.0
    assert nvml.slowed_by("GPU-1", 0) == ("its power cap", "its temperature")
    assert module.opened == 0, "opened as often as closed"


@pytest.mark.parametrize("uuid", ["1", "GPU-1", "unknown"])
def test_cards_are_found_by_uuid_however_it_is_written_or_else_by_index(fake, uuid):
    fake()
    assert nvml.gpu_facts(uuid, 0).lines["driver"] == "550.54"
    if uuid == "unknown":
        assert nvml.gpu_facts(uuid, 1).lines == {"nvml": "does not know this GPU"}


def test_a_slice_says_that_it_is_one_and_who_else_is_on_the_card(fake):
    fake(sliced=True, pids=(17, 18))
    facts = nvml.gpu_facts("2", 0)
    assert facts.lines["mig"] == "this is a slice, NVIDIA A100 MIG 1g.5gb"
    assert facts.warnings == (
        "the GPU is a slice of a card (MIG): this is a slice, NVIDIA A100 MIG 1g.5gb",
        "others use the card: 2 processes, holding 2.00 GB",
    )
    assert nvml.clock_mhz("2", 0) == 1095.0


def test_a_busy_card_is_named(fake):
    fake(busy=37)
    assert nvml.busy_before("GPU-1", 0) == ("the card was busy 37% of the time before it was measured",)
    fake(busy=3)
    assert nvml.busy_before("GPU-1", 0) == ()


def test_what_a_card_does_not_tell_is_left_out(fake):
    fake(
        refuses=(
            "nvmlDeviceGetEccMode",
            "nvmlDeviceGetCurrPcieLinkWidth",
            "nvmlDeviceGetClockInfo",
            "nvmlDeviceGetComputeRunningProcesses",
            "nvmlDeviceGetUtilizationRates",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
            "nvmlDeviceIsMigDeviceHandle",
        )
    )
    facts = nvml.gpu_facts("GPU-1", 0)
    assert set(facts.lines) == {"driver", "max_sm_clock_mhz", "power_limit_w", "mig"}
    assert facts.pcie_bytes_per_s is None
    assert nvml.clock_mhz("GPU-1", 0) is None
    assert nvml.slowed_by("GPU-1", 0) == ()
    assert nvml.busy_before("GPU-1", 0) == ()


def test_no_nvml_is_no_mistake(fake, monkeypatch):
    fake(refuses=("nvmlInit",))
    assert nvml.gpu_facts("GPU-1", 0).lines == {"nvml": "not available"}

    def missing(_):
        raise ImportError

    monkeypatch.setattr(nvml, "import_module", missing)
    assert nvml.clock_mhz("GPU-1", 0) is None
    assert nvml.slowed_by("GPU-1", 0) == nvml.busy_before("GPU-1", 0) == ()
