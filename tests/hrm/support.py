"""Small models and machines that the tests of hrm share."""

from dataclasses import replace
from random import Random
from typing import Any, Final

from hrm.hardware import Figure, HardwareProfile, Link, LinkKind, MemoryLevel, Processor, Rate, Source
from hrm.layers import GatedDeltaNet
from hrm.model_spec import Dimensions, ModelSpec
from hrm.model_spec.dimensions import LatentSizes
from hrm.schedules import Pipeline
from hrm.tasks import Device, Phase
from hrm.units import GB


def figure(value: float, curve: tuple[tuple[float, float], ...] = ()) -> Figure:
    return Figure(value=value, source=Source.ASSUMED, curve=curve)


def rate(value: float, curve: tuple[tuple[float, float], ...] = ()) -> Rate:
    return Rate(achieved=figure(value, curve))


def level(name: str, capacity_bytes: float, flops: float, read: float, launch_s: float = 0.0) -> MemoryLevel:
    return MemoryLevel(
        name=name,
        capacity_bytes=figure(capacity_bytes),
        reserve_bytes=figure(0),
        read_bytes_per_s=rate(read),
        processor=Processor(
            name=f"{name} processor", compute_flops_per_s={"bfloat16": rate(flops)}, launch_latency_s=figure(launch_s)
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
    num_gpus: int = 1,
    peer: float = 10e9,
    shared: float | None = None,
) -> HardwareProfile:
    """One or more GPUs, a host and the links between them; rates without curves."""

    def between(source: str, target: str, bandwidth: float, kind: LinkKind = "pinned") -> Link:
        return Link(
            source=source, target=target, kind=kind, latency_s=figure(latency_s), bandwidth_bytes_per_s=rate(bandwidth)
        )

    return HardwareProfile(
        name="test machine",
        accelerator="catalog",
        num_gpus=num_gpus,
        levels=(
            level("gpu", gpu_bytes, gpu_flops, gpu_read, launch_s),
            replace(
                level("cpu", cpu_bytes, cpu_flops, cpu_read, launch_s),
                shared_bytes_per_s=None if shared is None else rate(shared),
            ),
        ),
        links=(
            between("cpu", "gpu", link),
            between("gpu", "cpu", link),
            between("cpu", "cpu", cpu_read / 2, "staging"),
            *([between("gpu", "gpu", peer, "peer")] if num_gpus > 1 else []),
        ),
    )


TINY: Final = Dimensions(
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


def tiny_spec(**changes: Any) -> ModelSpec:
    return replace(TINY, **changes).spec


def random_dimensions(rng: Random) -> Dimensions:
    kv_heads = rng.choice([1, 2])
    num_experts = rng.choice([1, 2, 4, 7])
    return replace(
        TINY,
        num_layers=rng.randint(1, 6),
        hidden_size=rng.choice([32, 64, 96]),
        intermediate_size=rng.choice([48, 128, 320]),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * rng.choice([1, 4]),
        num_experts=num_experts,
        experts_per_token=rng.randint(1, num_experts),
    )


def random_spec(rng: Random) -> ModelSpec:
    return random_dimensions(rng).spec


def random_varied_spec(rng: Random) -> ModelSpec:
    """As `random_spec`, with what newer families have: all of it, some or none, in any order."""
    plain = random_dimensions(rng)
    if rng.random() < 0.5:
        plain = replace(plain, shared_intermediate_size=rng.choice([16, 200]))
    if rng.random() < 0.5 and plain.num_layers > 1:
        dense = rng.randint(1, plain.num_layers - 1)
        plain = replace(plain, num_dense_layers=dense, dense_intermediate_size=256)
    if rng.random() < 0.5:
        windows = tuple(rng.choice([0, 16, 64]) for _ in range(plain.num_layers))
        plain = replace(plain, attention_windows=windows)
    if rng.random() < 0.5:
        latent = LatentSizes(
            kv_rank=24, rope_head_dim=8, nope_head_dim=16, value_head_dim=12, query_rank=rng.choice([0, 20])
        )
        plain = replace(plain, latent_attention=latent, head_dim=24, num_kv_heads=plain.num_heads)
    layers = list(plain.spec.layers)
    if rng.random() < 0.5:
        rng.shuffle(layers)
    if rng.random() < 0.5:
        layers = [
            replace(layer, mixer=gated_delta(plain.hidden_size)) if rng.random() < 0.5 else layer for layer in layers
        ]
    return plain.spec.with_layers(layers)


def gated_delta(hidden_size: int) -> GatedDeltaNet:
    """A small linear attention."""
    return GatedDeltaNet(hidden_size=hidden_size, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=12)


def random_ffn(rng: Random) -> dict[str, Any]:
    """Where experts that are not resident are computed, in decode and in prefill."""
    ffn = rng.choice(list(Device))
    return {"ffn": ffn, "prefill_ffn": rng.choice([ffn, Device.GPU])}


def random_experts_per_part(rng: Random, spec: ModelSpec, prefill_ffn: Device, *, staging: bool) -> int:
    """How many experts stream at a time, now and then, where a policy may have them stream in parts."""
    may = prefill_ffn is Device.GPU and not staging
    return min(rng.choice([0, 1, 2, 3]), spec.num_experts) if may else 0


def random_pipeline(rng: Random, phase: Phase | None = None, *, most_ranks: int = 1, most_parts: int = 0) -> Pipeline:
    """Any pipeline that a policy may lead to, and many that no sensible policy would."""
    phase = phase or rng.choice([Phase.DECODE, Phase.DECODE, Phase.DECODE, Phase.PREFILL])
    prefill = phase is Phase.PREFILL
    layers, n = rng.randint(1, 5), rng.choice([1, 2, 3, 5])
    num_pages = rng.choice([1, n, n, 4])

    def some(count: int, p: float) -> tuple[bool, ...]:
        return tuple(rng.random() < p for _ in range(count))

    made = Pipeline(
        phase=phase,
        num_layers=layers,
        num_micro_batches=n,
        num_steps=1 if prefill else rng.randint(1, 3),
        attention=rng.choice(list(Device)),
        kv_on_gpu=(rng.random() < 0.4,) * n if prefill else some(n, rng.choice([0.0, 0.3, 1.0])),
        streamed=some(layers, rng.choice([0.6, 1.0])),
        cpu_experts=some(layers, rng.choice([0.0, 0.5, 1.0])),
        num_pages=num_pages,
        dense_pages=rng.randint(0, num_pages),
        staging=rng.random() < 0.5,
        states=() if prefill else some(layers, rng.choice([0.0, 0.5, 1.0])),
        ranks=rng.choice([1, most_ranks]),
    )
    if not most_parts:
        return made
    return replace(made, parts=tuple(0 if on_cpu else rng.randint(0, most_parts) for on_cpu in made.cpu_experts))
