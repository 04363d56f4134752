"""A format that is added from outside, as CONTRIBUTING says: its row."""

from dataclasses import replace

import pytest

from hrm.buffers import Purpose
from hrm.errors import PolicyError
from hrm.formats import FORMATS, Format
from hrm.memory import plan_memory
from hrm.model_spec import BUILT_IN_MODELS
from hrm.policy import Policy, kv_tokens_for
from tests.hrm.support import machine
from tests.hrm.test_formats import moved, works

SPEC = BUILT_IN_MODELS["mixtral-8x7b"]
POLICY = Policy(
    batch_size=8,
    micro_batch_size=4,
    resident_experts=(0,) * SPEC.num_layers,
    resident_dense=False,
    kv_tokens_per_micro_batch=kv_tokens_for(4, 60, 69),
    prefill_chunk_tokens=60,
)
MACHINE = machine(gpu_bytes=40e9, cpu_bytes=400e9)


def test_a_format_with_its_row_is_planned_with(monkeypatch):
    with pytest.raises(PolicyError, match="weight_format is 'int8'"):
        replace(POLICY, weight_format="int8")
    monkeypatch.setitem(FORMATS, "int8", Format("int8", 1))
    small = replace(POLICY, weight_format="int8")
    for before, after in zip(works(SPEC, POLICY), works(SPEC, small), strict=True):
        whole, half = moved(before, POLICY), moved(after, small)
        assert whole.keys() == half.keys()
        for act, (num_bytes, _) in whole.items():
            assert half[act][0] == (num_bytes / 2 if act == "LOAD_PAGE" else num_bytes), act
    kept, halved = (plan_memory(SPEC, policy, MACHINE).cpu.purposes for policy in (POLICY, small))
    assert halved == {**kept, Purpose.WEIGHTS: kept[Purpose.WEIGHTS] / 2}
