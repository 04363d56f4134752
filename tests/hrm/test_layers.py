"""Blocks against what transformers keeps and computes, and blocks and families from outside."""

from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Literal, final

import numpy as np
import pytest
import torch

from hrm.buffers import Purpose
from hrm.costs import Costs
from hrm.estimate import estimate
from hrm.formats import Formats
from hrm.layers import GatedDeltaNet, Layer, Mixer, Operator, TensorSpec, Unit, linear
from hrm.memory import purposes
from hrm.model_spec import ModelSpec, spec_from_hf_config
from hrm.model_spec.decoder import grouped_query, model, routed_experts
from hrm.model_spec.families import FAMILY_READERS, FamilyReader
from hrm.policy_file import load_policy_file, policy_file_of, save_policy_file
from hrm.search import Space, search
from hrm.workload import Workload
from tests.hrm.small_configs import SMALL_NEXT
from tests.hrm.support import gated_delta, machine, random_varied_spec, tiny_spec

pytestmark = pytest.mark.usefixtures("rough_bounds")

BF16, FLOAT32 = Formats.of("bfloat16"), Formats.of("float32")


def test_a_layer_of_linear_attention_keeps_what_transformers_keeps():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3_next", **SMALL_NEXT)
    torch.manual_seed(0)
    with torch.inference_mode():
        cache = (
            AutoModelForCausalLM.from_config(config).eval()(torch.arange(1, 8)[None], use_cache=True).past_key_values
        )
    spec = spec_from_hf_config({"model_type": "qwen3_next", **SMALL_NEXT}, "x")
    for layer, kept in zip(spec.layers, cache.layers, strict=True):
        mixer = layer.mixer
        if isinstance(mixer, GatedDeltaNet):
            (recurrent,), (convolved,) = kept.recurrent_states.values(), kept.conv_states.values()
            assert recurrent.numel() == mixer.state_elements
            assert recurrent.dtype is torch.float32
            width = convolved.numel() // mixer.convolved_elements  # its buffer also holds the newest token
            assert width - 1 == mixer.conv_kernel - 1
            kernel_bytes = 2 * mixer.convolved_elements * (width - 1)
            assert mixer.state_bytes(BF16) == 4 * recurrent.numel() + kernel_bytes
            assert mixer.cached_elements == 0
        else:
            assert kept.keys.numel() + kept.values.numel() == 7 * mixer.cached_elements
            assert mixer.state_bytes(BF16) == 0


def test_a_step_of_linear_attention_has_the_flops_of_the_rule_written_out():
    mixer = gated_delta(64)
    heads, keys, values = mixer.num_value_heads, mixer.key_head_dim, mixer.value_head_dim
    decay = heads * keys * values
    products = 3 * 2 * heads * keys * values  # read for the key, add the outer product, read for the query
    convolution = 2 * mixer.conv_kernel * (2 * mixer.num_key_heads * keys + heads * values)
    step = mixer.attend(BF16, 5, 1000)
    assert step.flops == 5 * (decay + products + convolution)
    assert step.num_bytes == 5 * 2 * mixer.state_bytes(BF16)
    assert mixer.attend(BF16, 5, 10_000) == step  # no context makes it longer
    assert step.num_bytes == 2 * mixer.cache_bytes(BF16, 5, 5000)


def test_prefill_of_linear_attention_is_linear_in_the_prompt():
    mixer = gated_delta(64)
    work = [mixer.prefill(BF16, 4096, length).kernels[1] for length in (512, 4096)]
    assert work[0].flops == work[1].flops
    softmax = [tiny_spec().attention.prefill(BF16, 4096, length).kernels[1].flops for length in (512, 4096)]
    assert softmax[1] == 8 * softmax[0]


@pytest.mark.parametrize("seed", range(12))
def test_work_of_blocks_grows_with_tokens_and_is_the_same_for_arrays(seed):
    spec = random_varied_spec(Random(seed))
    tokens = np.array([1.0, 7.0, 64.0])
    for kind in spec.layer_kinds():
        works = {
            "project": lambda m, kind=kind: kind.mixer.project(FLOAT32, m),
            "attend": lambda m, kind=kind: kind.mixer.attend(FLOAT32, m, 50.0),
            "prefill": lambda m, kind=kind: kind.mixer.prefill(FLOAT32, m, 20.0),
            "after": lambda m, kind=kind: kind.after_attention(FLOAT32, m, 0),
        }
        if kind.has_experts:
            works["experts"] = lambda m, kind=kind: kind.experts[0].run(FLOAT32, m, 1)
        for work in works.values():
            alone = [work(float(m)) for m in tokens]
            together = work(tokens)
            assert np.allclose(together.flops, [float(one.flops) for one in alone], rtol=1e-12)
            assert np.allclose(together.num_bytes, [float(one.num_bytes) for one in alone], rtol=1e-12)
            assert alone[0].flops < alone[1].flops < alone[2].flops


@pytest.mark.parametrize("seed", range(12))
def test_tensors_that_gpus_divide_can_be_divided_where_nothing_is_in_the_way(seed):
    spec = random_varied_spec(Random(seed))
    for kind in spec.layer_kinds():
        for block in kind.blocks:
            if not block.obstacle_to(2):
                divided = [tensor.shape[tensor.split] for tensor in block.tensors if tensor.split is not None]
                assert all(size % 2 == 0 for size in divided)


# -- planning what newer models have ------------------------------------------------------------

WORKLOAD = Workload(name="short", prompt_len=60, max_prompt_len=80, gen_len=20, num_requests=200)
SMALL_MACHINE = machine(gpu_bytes=0.9e6, cpu_bytes=1e9)


def hybrid() -> ModelSpec:
    """Three of four layers with linear attention, dense layers between those with experts."""
    plain = tiny_spec(num_layers=8, num_dense_layers=3, dense_intermediate_size=80, shared_intermediate_size=24)
    experts, dense = plain.layers[-1].ffn, plain.layers[0].ffn
    return plain.with_layers(
        Layer(
            mixer=plain.attention if layer % 4 == 3 else gated_delta(64), ffn=dense if layer in {1, 4, 6} else experts
        )
        for layer in range(8)
    )


def test_a_hybrid_with_interleaved_dense_layers_is_searched_for_and_estimated():
    spec = hybrid()
    found = search(Space(spec, SMALL_MACHINE, WORKLOAD))
    policy = found.require().policy
    assert [count for layer, count in enumerate(policy.resident_experts) if layer in {1, 4, 6}] == [0, 0, 0]
    predicted = estimate(spec, policy, SMALL_MACHINE, WORKLOAD)
    assert 0 < predicted.tokens_per_s <= predicted.bound_tokens_per_s * (1 + 1e-9)
    assert predicted.memory.fits


def test_memory_of_a_hybrid_counts_states_by_request_and_caches_by_token():
    spec = hybrid()
    policy = search(Space(spec, SMALL_MACHINE, WORKLOAD)).require().policy
    state = gated_delta(64).state_bytes(Formats.of(policy.dtype))
    per_micro_batch = 6 * policy.micro_batch_size * state + 2 * policy.kv_tokens_per_micro_batch * 2 * 32 * 2
    gpu, cpu = purposes(spec, policy)
    assert gpu[Purpose.KV_CACHE] == policy.gpu_kv_micro_batches * per_micro_batch
    on_host = policy.num_micro_batches - policy.gpu_kv_micro_batches
    assert cpu[Purpose.KV_CACHE] == on_host * per_micro_batch


def test_linear_attention_takes_no_longer_for_longer_contexts():
    linear_only = tiny_spec().with_layers([replace(tiny_spec().layers[0], mixer=gated_delta(64))] * 4)
    costs = Costs(linear_only, SMALL_MACHINE, BF16)
    kind = linear_only.layers[0]
    from hrm.tasks import Device

    for device in Device:
        assert costs.attention(device, 8, 100, kind) == costs.attention(device, 8, 100_000, kind) > 0


# -- from outside -------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class ShortConvolution(Mixer):
    """A mixer that no module knows: a gated convolution over the last few tokens, as LFM2 has."""

    hidden_size: int
    kernel: int = 3
    vectors: tuple[tuple[str, int], ...] = ()
    block: Literal["short_convolution"] = "short_convolution"

    words: ClassVar[str] = "short convolution"
    cached_elements: ClassVar[int] = 0
    prefix_in_cache: ClassVar[bool] = True

    @property
    def tensors(self):
        hidden = self.hidden_size
        return (
            TensorSpec("norm", (hidden,), Unit.MIXER),
            TensorSpec("in", (3 * hidden, hidden), Unit.MIXER, 0),
            TensorSpec("convolution", (hidden, self.kernel), Unit.MIXER, 0),
            TensorSpec("out", (hidden, hidden), Unit.MIXER, 1),
        )

    returned_elements = property(lambda self: self.hidden_size)
    sent_elements = property(lambda self: 3 * self.hidden_size)
    host_tensors = property(lambda self: ("convolution",))
    kept_elements = property(lambda self: 4 * self.hidden_size)

    def state_bytes(self, formats):
        return formats.compute.bytes_of(self.hidden_size, self.kernel - 1)

    def sent_bytes(self, formats):
        return formats.compute.bytes_of(3, self.hidden_size)

    def project(self, formats, tokens):
        return Operator((linear(tokens, self.hidden_size, 3 * self.hidden_size, formats),), 2)

    def attend(self, formats, requests, context):
        return Operator((linear(requests, self.hidden_size, self.kernel, formats),), 1)

    def prefill(self, formats, tokens, prompt_len):
        return self.project(formats, tokens) + self.attend(formats, tokens, prompt_len)

    def finish(self, formats, tokens):
        return Operator((linear(tokens, self.hidden_size, self.hidden_size, formats),), 1)

    def temporary_bytes(self, compute):
        return compute.bytes_of(self.hidden_size)

    def prefix_bytes(self, formats):
        return 0

    def obstacle_to(self, ranks):
        return "a short convolution is not divided"

    def shares(self, ranks, whole):
        return {}


def read_lfm(keys):
    experts = routed_experts(keys, "moe_intermediate_size", "num_experts")
    full, short = grouped_query(keys), ShortConvolution(hidden_size=experts.hidden_size)
    types = keys.words("layer_types", ("conv", "full_attention"))
    return model(keys, [short if kind == "conv" else full for kind in types], experts, dense_layers={0})


LFM = {
    "model_type": "some_lfm",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
}


def test_a_family_and_a_block_from_outside_are_read_planned_and_kept_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILY_READERS, "some_lfm", FamilyReader(read_lfm, "Some LFM"))
    spec = spec_from_hf_config(LFM, "lfm/config.json")
    short, full = 64 + 3 * 64 * 64 + 3 * 64 + 64 * 64, 64 + 2 * 64 * 64 + 2 * 32 * 64
    experts, dense = 64 + 4 * 64 + 4 * 3 * 64 * 32, 64 + 3 * 64 * 96
    assert spec.total_parameters == 3 * short + full + 3 * experts + dense
    predicted = search(Space(spec, SMALL_MACHINE, WORKLOAD)).require()
    assert predicted.tokens_per_s > 0
    assert predicted.memory.fits
    save_policy_file(tmp_path / "policy.json", policy_file_of(predicted, spec, SMALL_MACHINE, WORKLOAD))
    assert load_policy_file(tmp_path / "policy.json").model == spec
