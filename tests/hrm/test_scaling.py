"""More of one resource: exactly its figures change, all of them alike, and each says so."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from random import Random

import pytest

from hrm.errors import ProfileError
from hrm.estimate import estimate
from hrm.hardware import Cache, Figure, HardwareProfile, Link, MemoryLevel, Rate, Source
from hrm.machines import compose, with_memory
from hrm.model_spec import BUILT_IN_MODELS
from hrm.scaling import Resource, at_cost, resource_value, resources, scale, with_resource
from hrm.search import Space, search
from hrm.tasks import Device
from hrm.units import GB
from hrm.workload import WORKLOADS
from tests.hrm.support import figure, machine, tiny_spec

pytestmark = pytest.mark.usefixtures("rough_bounds")


def spread(value: float) -> Figure:
    return replace(figure(value, ((1.0, value / 2), (64.0, value))), p20=value / 2, p80=value * 1.1)


def full(rng: Random) -> HardwareProfile:
    """A machine with every figure that a profile may hold."""

    def a_rate() -> Rate:
        value = rng.uniform(1, 2) * 1e11
        return Rate(datasheet=figure(2 * value), ceiling=figure(1.5 * value), achieved=spread(value))

    def enrich(level: MemoryLevel) -> MemoryLevel:
        cache = Cache(name="L2", capacity_bytes=figure(4e6), read_bytes_per_s=a_rate())
        processor = replace(
            level.processor,
            compute_flops_per_s={"float32": a_rate(), "bfloat16": a_rate()},
            attention_bytes_per_s=a_rate(),
            attention_request_s=spread(3e-6),
        )
        return replace(
            level,
            reserve_bytes=figure(1e9),
            read_bytes_per_s=a_rate(),
            copy_bytes_per_s=a_rate(),
            shared_bytes_per_s=a_rate(),
            caches=(cache,),
            processor=processor,
        )

    def link(source: str, target: str, kind) -> Link:
        return Link(source=source, target=target, kind=kind, latency_s=figure(1e-5), bandwidth_bytes_per_s=a_rate())

    links = (
        link("cpu", "gpu", "pinned"),
        link("gpu", "cpu", "pinned"),
        link("cpu", "gpu", "pageable"),
        link("cpu", "gpu0", "pinned"),
        link("gpu0", "cpu", "pinned"),
        link("cpu", "cpu", "staging"),
        link("gpu", "gpu", "peer"),
    )
    plain = machine(launch_s=1e-5)
    return replace(plain, num_gpus=2, levels=tuple(map(enrich, plain.levels)), links=links)


def figures_of(node, where: str = "") -> Iterator[tuple[str, Figure]]:
    """Every figure of a profile with its path, by walking its fields."""
    if isinstance(node, Figure):
        yield where, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from figures_of(value, f"{where}.{key}")
    elif isinstance(node, tuple):
        for index, value in enumerate(node):
            yield from figures_of(value, f"{where}[{index}]")
    elif is_dataclass(node):
        for item in fields(node):
            yield from figures_of(getattr(node, item.name), f"{where}.{item.name}")


GPU, CPU = ".levels[0]", ".levels[1]"
CHANGED = {
    Resource.GPU_MEMORY: (f"{GPU}.capacity", f"{GPU}.reserve"),
    Resource.CPU_MEMORY: (f"{CPU}.capacity", f"{CPU}.reserve"),
    Resource.GPU_BANDWIDTH: tuple(f"{GPU}.{x}" for x in ("read", "copy", "shared", "processor.attention_bytes")),
    Resource.CPU_BANDWIDTH: (
        *(f"{CPU}.{x}" for x in ("read", "copy", "shared", "processor.attention_bytes")),
        ".links[5].bandwidth",
    ),
    Resource.GPU_FLOPS: (f"{GPU}.processor.compute",),
    Resource.CPU_FLOPS: (f"{CPU}.processor.compute",),
    Resource.H2D_BANDWIDTH: tuple(f".links[{i}].bandwidth" for i in (0, 2, 3)),
    Resource.D2H_BANDWIDTH: tuple(f".links[{i}].bandwidth" for i in (1, 4)),
    Resource.PEER_BANDWIDTH: (".links[6].bandwidth",),
    Resource.GPU_LAUNCH_LATENCY: (f"{GPU}.processor.launch", f"{GPU}.processor.attention_request"),
    Resource.CPU_LAUNCH_LATENCY: (f"{CPU}.processor.launch", f"{CPU}.processor.attention_request"),
    Resource.LINK_LATENCY: tuple(f".links[{i}].latency" for i in range(6)),
    Resource.PEER_LATENCY: (".links[6].latency",),
}


@pytest.mark.parametrize("resource", Resource)
def test_exactly_the_resources_figures_are_scaled_and_say_so(resource):
    rng = Random(resource.value)
    profile, factor = full(rng), rng.choice([0.5, 1.1, 8.0])
    scaled = dict(figures_of(scale(profile, resource, factor)))
    hits = 0
    for where, before in figures_of(profile):
        after = scaled.pop(where)
        if not where.startswith(CHANGED[resource]):
            assert after == before, where
            continue
        hits += 1
        assert after.value == pytest.approx(before.value * factor)
        assert after.source is Source.DERIVED
        assert after.note.endswith(f"times {factor:g}")
        assert [size for size, _ in after.curve] == [size for size, _ in before.curve]
        for size in (1.0, 9.0, 64.0):
            assert after.at(size) == pytest.approx(before.at(size) * factor)
        assert (after.p20 is None, after.p80 is None) == (before.p20 is None, before.p80 is None)
        if before.p20 is not None and before.p80 is not None:
            assert (after.p20, after.p80) == (pytest.approx(before.p20 * factor), pytest.approx(before.p80 * factor))
    assert not scaled
    assert hits >= len(CHANGED[resource])


@pytest.mark.parametrize("resource", Resource)
def test_with_resource_gives_what_resource_value_then_reads(resource):
    profile = full(Random(7))
    value = 3.21 * resource_value(profile, resource, dtype="float32")
    changed = with_resource(profile, resource, value, dtype="float32")
    assert resource_value(changed, resource, dtype="float32") == pytest.approx(value)
    for other in set(Resource) - {resource}:
        assert resource_value(changed, other) == resource_value(profile, other)


def test_a_latency_may_be_given_as_nothing_and_from_nothing():
    profile = full(Random(3))
    for resource in Resource:
        if not resource.is_latency:
            continue
        gone = with_resource(profile, resource, 0.0)
        assert resource_value(gone, resource) == 0
        assert resource_value(with_resource(gone, resource, 2e-5), resource) == 2e-5


@pytest.mark.parametrize("resource", Resource)
def test_half_the_cost_is_twice_the_rate_or_half_the_latency(resource):
    profile = full(Random(4))
    now, then = (resource_value(each, resource) for each in (profile, at_cost(profile, resource, 0.5)))
    assert then == pytest.approx(now / 2 if resource.is_latency else 2 * now)


def test_dtypes_keep_their_proportion():
    profile = full(Random(1))
    before = profile.top.processor.flops_per_s
    after = with_resource(profile, Resource.GPU_FLOPS, 5e13).top.processor.flops_per_s
    assert after("bfloat16") == pytest.approx(5e13)
    assert after("float32") / after("bfloat16") == pytest.approx(before("float32") / before("bfloat16"))


def test_memory_is_given_as_on_the_command_line():
    t4 = compose("1xT4")
    assert with_resource(t4, Resource.GPU_MEMORY, 24 * GB) == with_memory(t4, gpu_memory_bytes=24 * GB)
    assert with_resource(t4, Resource.CPU_MEMORY, 64 * GB) == with_memory(t4, cpu_memory_bytes=64 * GB)


def test_names_in_tables_carry_their_unit():
    columns = [resource.column for resource in Resource]
    assert columns[0] == "gpu_memory_bytes"
    assert columns[1] == "gpu_bandwidth_bytes_per_s"
    assert columns[2] == "gpu_flops_per_s"
    assert len(set(columns)) == len(columns)


def test_a_machine_without_a_gpu_has_the_hosts_resources_only():
    profile = full(Random(2))
    alone = replace(profile, levels=profile.levels[1:], links=())
    assert resources(profile) == tuple(Resource)
    assert resources(alone) == (
        Resource.CPU_MEMORY,
        Resource.CPU_BANDWIDTH,
        Resource.CPU_FLOPS,
        Resource.CPU_LAUNCH_LATENCY,
    )
    for resource in set(Resource) - set(resources(alone)):
        with pytest.raises(ProfileError, match=r"cpu-memory, cpu-bandwidth, cpu-flops"):
            scale(alone, resource, 1.1)
    doubled = scale(alone, Resource.CPU_BANDWIDTH, 2).top
    assert doubled.attention_bytes_per_s == 2 * alone.top.attention_bytes_per_s


def test_one_gpu_without_peers_has_no_peer_bandwidth():
    assert Resource.PEER_BANDWIDTH not in resources(machine())
    with pytest.raises(ProfileError, match="no link between GPUs"):
        scale(machine(), Resource.PEER_BANDWIDTH, 2)


@pytest.mark.parametrize("factor", [0, -1, float("inf"), float("nan")])
def test_impossible_changes_are_refused(factor):
    with pytest.raises(ProfileError, match="h2d-bandwidth"):
        scale(machine(), Resource.H2D_BANDWIDTH, factor)
    with pytest.raises(ProfileError, match="h2d-bandwidth"):
        with_resource(machine(), Resource.H2D_BANDWIDTH, factor)


def test_all_rates_twice_halve_a_job_without_latencies():
    """Seconds are bytes and FLOPs over rates: there is no rate that scaling forgets."""
    profile, spec = machine(), tiny_spec()
    workload = replace(WORKLOADS["mtbench"], num_requests=64)
    before = search(Space(spec, profile, workload)).require()
    faster = profile
    for resource in resources(profile):
        if not resource.is_memory:
            faster = scale(faster, resource, 2)
    after = estimate(spec, before.policy, faster, workload)
    assert after.seconds == pytest.approx(before.seconds / 2)
    assert after.bound_tokens_per_s == pytest.approx(2 * before.bound_tokens_per_s)


def test_a_small_job_that_streams_its_weights_is_as_fast_as_its_link():
    t4, spec = compose("1xT4"), BUILT_IN_MODELS["mixtral-8x7b"]
    few = replace(WORKLOADS["mtbench"], num_requests=16)
    found = search(Space(spec, t4, few, dtype="float16", ffn=Device.GPU))
    policy = found.require().policy
    slower, now, faster = (
        estimate(spec, policy, scale(t4, Resource.H2D_BANDWIDTH, factor), few).tokens_per_s for factor in (0.8, 1, 1.25)
    )
    assert now / slower == pytest.approx(1.25, rel=0.05)
    assert faster / now == pytest.approx(1.25, rel=0.05)
