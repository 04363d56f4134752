"""What really lies in memory for each request and token, and that it fills what is planned."""

from dataclasses import replace

import pytest
import torch

from executor.handlers.memory import Exchange, PrefillBuffers
from executor.kv_cache import cache_rows, prefix_rows
from executor.model import GpuKernels, HeadWeights, Workspace, experts_in, logits
from hrm.buffers import Purpose
from hrm.contract.rings import BUFFERS
from hrm.contract.rows import COUNT_BYTES, LOGIT_BYTES, ROUTING_BYTES
from hrm.formats import Formats
from hrm.layers import Layer
from hrm.memory import purposes
from hrm.model_spec import ModelSpec
from hrm.policy import Policy
from hrm.tasks import Device
from tests.executor.model.steps import route
from tests.executor.tiny_models import tiny_arch

ALIGNED_BYTES = 16  # flash attention reads so many at a time


def with_norm_of_sum(spec: ModelSpec) -> ModelSpec:
    """The same where something waits for the sum of all experts."""

    def after(layer: Layer) -> Layer:
        return replace(layer, ffn=(layer.experts[0].with_vectors(routed_output_norm=spec.hidden_size),))

    return spec.with_layers(map(after, spec.layers))


@pytest.mark.parametrize("kv_format", ["", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ffn_on_cpu", [False, True])
@pytest.mark.parametrize("num_requests", [1, 3, 8, 17])
def test_rows_are_aligned_and_fill_what_is_planned(num_requests, ffn_on_cpu, dtype, kv_format):
    formats = Formats.named(dtype, kv_cache=kv_format)
    spec = with_norm_of_sum(tiny_arch(hidden_size=24, experts_per_token=3).spec)
    policy = Policy(
        batch_size=num_requests,
        micro_batch_size=num_requests,
        ffn=Device.CPU if ffn_on_cpu else Device.GPU,
        prefill_ffn=Device.GPU,
        resident_experts=(0,) * spec.num_layers,
        kv_tokens_per_micro_batch=32,
        prefill_chunk_tokens=6,
        dtype=dtype,
        kv_format=kv_format,
    )
    planned = purposes(spec, policy)[1][Purpose.EXCHANGE]
    memory = torch.zeros(planned, dtype=torch.uint8)
    made = Exchange(spec, formats, memory, num_requests=num_requests, ffn_on_cpu=ffn_on_cpu)
    for rows in (made.hidden_ND, made.rows_NX, made.attention_NO, made.routed_ND):
        assert rows.data_ptr() % ALIGNED_BYTES == 0
    assert_filled(list(vars(made).values()), planned)


def assert_filled(parts: list[torch.Tensor], planned: int) -> None:
    """The parts do not overlap and are all of what is planned."""
    assert sum(part.nbytes for part in parts) == planned
    for value, part in enumerate(parts):
        part.fill_(value)
    assert all(part.eq(value).all() for value, part in enumerate(parts))


@pytest.mark.parametrize("prefill_ffn", list(Device))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_format", ["", "fp8"])
def test_chunks_fill_what_is_planned(kv_format, dtype, prefill_ffn):
    spec, tokens = with_norm_of_sum(tiny_arch(hidden_size=24, experts_per_token=3).spec), 6
    policy = Policy(
        batch_size=4,
        micro_batch_size=2,
        ffn=Device.CPU,
        prefill_ffn=prefill_ffn,
        resident_experts=(0,) * spec.num_layers,
        kv_tokens_per_micro_batch=32,
        prefill_chunk_tokens=tokens,
        prefix_buffer_tokens=5,
        dtype=dtype,
        kv_format=kv_format,
    )
    sizes, on_host = purposes(spec, policy)
    gpu, prefix = (
        torch.zeros(sizes[purpose], dtype=torch.uint8) for purpose in (Purpose.PREFILL_BUFFERS, Purpose.PREFIX_BUFFER)
    )
    host = torch.zeros(0, dtype=torch.uint8)
    routed = torch.zeros(on_host[Purpose.PREFILL_BUFFERS], dtype=torch.uint8)
    made = PrefillBuffers(
        spec, getattr(torch, dtype), gpu=gpu, host=host, host_routed=routed, prefix=prefix, chunk_tokens=tokens
    )
    assert_filled([made.numbers_BT, made.hidden_BTD, made.kv_B, *vars(made.routed).values()], len(gpu))
    assert_filled(list(vars(made.host_routed).values()), len(routed))
    if prefill_ffn is Device.CPU:
        in_turn = [made.routed.of(slot, tokens).tokens_TD for slot in range(BUFFERS)]
        assert all(rows.shape == (tokens, spec.hidden_size) for rows in in_turn)
    assert_filled([made.prefix], len(prefix))
    assert {len(made.numbers_BT), len(made.hidden_BTD), len(made.kv_B)} == {BUFFERS}
    assert made.hidden_BTD.shape[1] == tokens
    assert [len(cache_rows(spec.layers[0], policy, part)) for part in made.kv_B] == [tokens, tokens]
    assert len(prefix_rows(spec.layers[0].mixer.cached_elements, policy, made.prefix)) == 5


def test_numbers_are_as_wide_as_those_of_the_model_code():
    arch = tiny_arch()
    spec, workspace = arch.spec, Workspace(torch.empty(100_000, dtype=torch.uint8))
    x = torch.randn(7, spec.hidden_size)
    routing = route(arch, x, torch.randn(spec.num_experts, spec.hidden_size))
    assert routing.experts_TK.itemsize + routing.weights_TK.itemsize == ROUTING_BYTES
    count = spec.num_experts
    experts = experts_in(spec.layers[0], torch.randn(count * spec.expert_parameters), 0)
    counts = GpuKernels().run_experts(x, routing, experts, x.clone(), workspace, rows_at_once=7, num_experts=count)
    assert counts.nbytes == COUNT_BYTES * count
    head = torch.randn(spec.vocab_size, spec.hidden_size)
    found = logits(arch.final_norm, x, HeadWeights(torch.ones(spec.hidden_size), head), workspace)
    assert found.nbytes == LOGIT_BYTES * found.numel()
