"""Where the parts of a run's memory lie."""

import pytest
import torch

from executor.handlers.memory import Exchange
from hrm.formats import Formats
from hrm.memory import exchange_bytes_per_request
from tests.executor.tiny_models import tiny_arch

ALIGNED_BYTES = 16  # flash attention reads so many at a time


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ffn_on_cpu", [False, True])
@pytest.mark.parametrize("num_requests", [1, 3, 8, 17])
def test_rows_are_aligned_and_fill_what_is_planned(num_requests, ffn_on_cpu, dtype):
    spec = tiny_arch(hidden_size=24, experts_per_token=3).spec
    planned = num_requests * exchange_bytes_per_request(spec, Formats.of(dtype), ffn_on_cpu=ffn_on_cpu)
    memory = torch.zeros(planned, dtype=torch.uint8)
    made = Exchange(spec, getattr(torch, dtype), memory, num_requests=num_requests, ffn_on_cpu=ffn_on_cpu)
    for rows in (made.hidden_ND, made.qkv_NX, made.attention_NQ, made.routed_ND):
        assert rows.data_ptr() % ALIGNED_BYTES == 0
    parts = list(vars(made).values())
    assert sum(part.nbytes for part in parts) == planned
    for value, part in enumerate(parts):
        part.fill_(value)
    assert all(part.eq(value).all() for value, part in enumerate(parts)), "they do not overlap"
