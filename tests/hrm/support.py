"""Small models and machines that the tests of hrm share."""

from dataclasses import replace
from random import Random

from hrm.hardware import Figure, HardwareProfile, Link, MemoryLevel, Processor, Rate, Source
from hrm.model_spec import ModelSpec
from hrm.schedules import Pipeline
from hrm.tasks import Device, Phase
from hrm.units import GB


def figure(value: float, curve: tuple[tuple[float, float], ...] = ()) -> Figure:
    return Figure(value=value, source=Source.ASSUMED, curve=curve)


def rate(value: float, curve: tuple[tuple[float, float], ...] = ()) -> Rate:
    return Rate(achieved=figure(value, curve))


def level(
    name: str, capacity_bytes: float, flops: float, read: float, launch_s: float = 0.0
) -> MemoryLevel:
    return MemoryLevel(
        name=name,
        capacity_bytes=figure(capacity_bytes),
        reserve_bytes=figure(0),
        read_bytes_per_s=rate(read),
        processor=Processor(
            name=f"{name} processor",
            compute_flops_per_s={"bfloat16": rate(flops)},
            launch_latency_s=figure(launch_s),
        ),
    )


def machine(
    *,
    gpu_bytes: float = 16 * GB,
    cpu_bytes: float = 192 * GB,
    gpu_flops: float = 50e12,
    cpu_flops: float = 1e12,
    gpu_read: float = 300e9,
    cpu_read: float = 100e9,
    link: float = 12e9,
    latency_s: float = 0.0,
    launch_s: float = 0.0,
) -> HardwareProfile:
    """A GPU, a host and the three links between them; rates without curves."""

    def between(source: str, target: str, bandwidth: float, kind: str = "pinned") -> Link:
        assert kind in {"pinned", "staging"}
        return Link(
            source=source,
            target=target,
            kind="staging" if kind == "staging" else "pinned",
            latency_s=figure(latency_s),
            bandwidth_bytes_per_s=rate(bandwidth),
        )

    return HardwareProfile(
        name="test machine",
        accelerator="catalog",
        levels=(
            level("gpu", gpu_bytes, gpu_flops, gpu_read, launch_s),
            level("cpu", cpu_bytes, cpu_flops, cpu_read, launch_s),
        ),
        links=(
            between("cpu", "gpu", link),
            between("gpu", "cpu", link),
            between("cpu", "cpu", cpu_read / 2, "staging"),
        ),
    )


def tiny_spec(**changes: int) -> ModelSpec:
    spec = ModelSpec(
        name="tiny",
        family="mixtral",
        num_layers=4,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_experts=4,
        experts_per_token=2,
        vocab_size=256,
    )
    return replace(spec, **changes)


def random_spec(rng: Random) -> ModelSpec:
    kv_heads = rng.choice([1, 2])
    num_experts = rng.choice([1, 2, 4, 7])
    return tiny_spec(
        num_layers=rng.randint(1, 6),
        hidden_size=rng.choice([32, 64, 96]),
        intermediate_size=rng.choice([48, 128, 320]),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * rng.choice([1, 4]),
        num_experts=num_experts,
        experts_per_token=rng.randint(1, num_experts),
    )


def random_pipeline(rng: Random, phase: Phase | None = None) -> Pipeline:
    """Any pipeline that a policy may lead to, and many that no sensible policy would."""
    phase = phase or rng.choice([Phase.DECODE, Phase.DECODE, Phase.DECODE, Phase.PREFILL])
    prefill = phase is Phase.PREFILL
    layers, n = rng.randint(1, 5), rng.choice([1, 2, 3, 5])
    num_pages = rng.choice([1, n, n, 4])

    def some(count: int, p: float) -> tuple[bool, ...]:
        return tuple(rng.random() < p for _ in range(count))

    return Pipeline(
        phase=phase,
        num_layers=layers,
        num_micro_batches=n,
        num_steps=1 if prefill else rng.randint(1, 3),
        attention=rng.choice(list(Device)),
        kv_on_gpu=(rng.random() < 0.4,) * n if prefill else some(n, rng.choice([0.0, 0.3, 1.0])),
        streamed=some(layers, rng.choice([0.6, 1.0])),
        cpu_experts=(False,) * layers if prefill else some(layers, rng.choice([0.0, 0.5, 1.0])),
        num_pages=num_pages,
        dense_pages=rng.randint(0, num_pages),
        staging=rng.random() < 0.5,
    )
