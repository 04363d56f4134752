"""Generators over tiny checkpoints, and the machine that they are planned for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from executor.backends import AbstractBackend, EmulatedMachine, make_backend
from executor.batching import Request
from executor.checkpoint import Checkpoint
from executor.families import family_for
from executor.generate import Completion, Generator, Planned, Prepared
from executor.model import Architecture
from executor.sampling import SamplingParams
from executor.weight_pages import StoredWeights
from hrm.hardware import Figure, HardwareProfile, Link, MemoryLevel, Processor, Rate, Source
from hrm.memory import plan_memory
from hrm.model_spec import ModelSpec
from hrm.policy import Policy
from hrm.policy_file import PolicyFile, profile_hash
from hrm.tasks import Device
from hrm.workload import Workload


def figure(value: float) -> Figure:
    return Figure(value=value, source=Source.ASSUMED)


def rate(value: float) -> Rate:
    return Rate(achieved=figure(value))


def level(name: str, capacity_bytes: float) -> MemoryLevel:
    processor = Processor(
        name=name,
        cores=1,
        compute_flops_per_s={"float32": rate(1e10), "bfloat16": rate(1e10)},
        launch_latency_s=figure(1e-5),
    )
    return MemoryLevel(
        name=name,
        capacity_bytes=figure(capacity_bytes),
        reserve_bytes=figure(0),
        read_bytes_per_s=rate(1e10),
        processor=processor,
    )


def link(source: str, target: str, bandwidth: float = 1e9, **changes: Any) -> Link:
    return Link(source=source, target=target, latency_s=figure(10e-6), bandwidth_bytes_per_s=rate(bandwidth), **changes)


def machine(*, gpu_bytes: float = 1e9, cpu_bytes: float = 8e9, bandwidth: float = 1e9) -> HardwareProfile:
    """Two levels and their links."""
    return HardwareProfile(
        name="test",
        accelerator="emulated",
        levels=(level("gpu", gpu_bytes), level("cpu", cpu_bytes)),
        links=(link("cpu", "gpu", bandwidth), link("gpu", "cpu", bandwidth), link("cpu", "cpu", 1e10, kind="staging")),
    )


def emulated(profile: HardwareProfile) -> AbstractBackend:
    return make_backend(
        "emulated", EmulatedMachine(gpu_memory_bytes=profile.top.usable_bytes, h2d=profile.h2d, d2h=profile.d2h)
    )


def make_policy(num_layers: int, **changes: Any) -> Policy:
    """A policy for tiny models: everything streams, attention on the CPU."""
    values: dict[str, Any] = {
        "batch_size": 16,
        "micro_batch_size": 4,
        "resident_experts": (0,) * num_layers,
        "kv_tokens_per_micro_batch": 256,
        "prefill_chunk_tokens": 96,
        "dtype": "float32",
    }
    resident = changes.pop("resident", None)
    if resident is not None:
        changes["resident_experts"] = (resident,) * num_layers
    return Policy(**{**values, **changes})


def policy_file(spec: ModelSpec, **changes: Any) -> PolicyFile:
    """Two micro-batches of two short requests, solved for the test's machine, changed as asked."""
    profile = changes.get("profile", machine())
    values: dict[str, Any] = {
        "policy": make_policy(spec.num_layers, batch_size=4, micro_batch_size=2),
        "memory_budget_bytes": {"gpu": 10**6, "cpu": 10**8},
        "model": spec,
        "workload": Workload(name="test", prompt_len=20, max_prompt_len=40, gen_len=5),
        "profile": profile,
        "profile_hash": profile_hash(profile),
        "predicted": {},
    }
    return PolicyFile(**{**values, **changes})


def architecture(folder: Path) -> Architecture:
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        return family.architecture(checkpoint.config, checkpoint.config_path)


@contextmanager
def generator(
    folder: Path,
    policy: Policy,
    *,
    backend: AbstractBackend | None = None,
    staged: Planned | None = None,
    **options: Any,
) -> Iterator[Generator]:
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        plan = plan_memory(arch.spec, policy, machine())
        prepared = Prepared(backend or make_backend("cpu", None), Planned(policy, plan), staged)
        made = Generator(prepared, arch, StoredWeights(checkpoint, family), **options)
    with made:
        yield made


def requests(prompts: list[list[int]], **params: Any) -> list[Request]:
    sampling = {"temperature": 0, **params}
    return [
        Request(f"request-{index}", tuple(prompt), SamplingParams(**sampling)) for index, prompt in enumerate(prompts)
    ]


def generate(made: Generator, wanted: list[Request]) -> dict[str, Completion]:
    """Completions by name."""
    done: dict[str, Completion] = {}
    for index, batch in enumerate(made.batches(iter(wanted))):
        for completion in made.generate(batch, index=index).completions:
            assert completion.request.name not in done
            done[completion.request.name] = completion
    assert done.keys() == {request.name for request in wanted}
    return done


GPU, CPU = Device.GPU, Device.CPU
