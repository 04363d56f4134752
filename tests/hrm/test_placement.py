"""Bytes at every place against a count of all units, one by one."""

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from hrm.closed_form import Point
from hrm.model_spec import ModelSpec
from hrm.placement import Place, Placement, caches_at, experts_of_layers
from hrm.policy import Policy
from hrm.tasks import Device, Phase
from tests.hrm.support import random_varied_spec
from tests.hrm.test_memory import a_policy

BYTES = 2  # of an element


def case(seed: int) -> tuple[ModelSpec, Policy]:
    rng = Random(seed)
    spec = random_varied_spec(rng)
    policy = a_policy(rng, spec)
    held = tuple(min(count, most) for count, most in zip(policy.resident_experts, experts_of_layers(spec), strict=True))
    return spec, replace(policy, resident_experts=held)


def units(spec: ModelSpec, policy: Policy, layer: int, phase: Phase) -> Counter[Place]:
    """Bytes by place of a layer's units, each of whole 16 bytes: what is outside its experts, and each of them."""
    kind = spec.layer_kind(layer)
    found: Counter[Place] = Counter()
    found[Place.GPU if policy.resident_dense else Place.STREAMED] += 16 * -(-BYTES * kind.dense_parameters // 16)
    for expert in range(kind.num_experts):
        place = Place.IN_PARTS if policy.experts_per_part else Place.STREAMED
        if expert < policy.resident_experts[layer]:
            place = Place.GPU
        elif (policy.ffn if phase is Phase.DECODE else policy.prefill_ffn) is Device.CPU:
            place = Place.HOST
        found[place] += 16 * -(-BYTES * spec.expert_parameters // 16)
    return found


@pytest.mark.parametrize("phase", Phase)
def test_bytes_at_a_place_are_those_of_its_units(phase):
    for seed in range(100):
        spec, policy = case(seed)
        of_layers = [units(spec, policy, layer, phase) for layer in range(spec.num_layers)]
        placement = policy.placement(spec, phase)
        for place in Place:
            held = [units_at[place] for units_at in of_layers]
            layers = [((spec.layer_kind(layer), 1),) for layer in range(spec.num_layers)]
            found = [
                placement.bytes_at(place, layer, count)
                for layer, count in zip(layers, policy.resident_experts, strict=True)
            ]
            assert found == held, (seed, place)
            assert placement.bytes_in_all(place, sum(policy.resident_experts)) == sum(held), (seed, place)
        streamed = [units_at[Place.STREAMED] for units_at in of_layers]
        assert [policy.streamed_bytes(spec, layer, phase) for layer in range(spec.num_layers)] == streamed
        mean = Point.of_policy(policy, spec).streamed_bytes(spec, policy.formats.weights, phase)
        assert mean == pytest.approx(sum(streamed) / spec.num_layers), seed
        on_host = [sum(units_at[place] for place in Place if place is not Place.GPU) for units_at in of_layers]
        assert [policy.host_bytes(spec, layer) for layer in range(spec.num_layers)] == on_host


def test_many_policies_are_counted_as_each_of_them():
    spec, policy = case(3)
    weights = policy.formats.weights
    dense, cpu, residents = (np.array(x) for x in ([0, 1, 1, 0], [1, 0, 1, 0], [0, 2, 1, 3]))
    grid = Placement(spec=spec, weights=weights, resident_dense=dense, cpu_experts=cpu)
    for place in Place:
        each = [
            Placement(spec=spec, weights=weights, resident_dense=d, cpu_experts=c).bytes_in_all(place, r)
            for d, c, r in zip(dense.tolist(), cpu.tolist(), residents.tolist(), strict=True)
        ]
        assert np.broadcast_to(grid.bytes_in_all(place, residents), 4).tolist() == each


def test_every_micro_batch_has_its_cache_at_one_place():
    for seed in range(50):
        _, policy = case(seed)
        places = Counter[Place]()
        for j in range(policy.num_micro_batches):
            on_host = Place.STREAMED if policy.attention is Device.GPU else Place.HOST
            places[Place.GPU if policy.kv_on_gpu(j) else on_host] += 1
        held = {place: policy.kv_caches_at(place) for place in Place}
        assert held == {place: places[place] for place in Place}
        assert policy.streams_kv == (places[Place.STREAMED] > 0)
    split = caches_at(Place.HOST, number=np.array([4, 4]), on_gpu=np.array([0, 3]), gpu_attention=np.array([1, 0]))
    assert np.asarray(split).tolist() == [0, 1]
