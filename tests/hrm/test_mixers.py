"""State-space layers, Kimi delta attention, indexers and experts that compute nothing, against transformers."""

from dataclasses import replace

import pytest
import torch

from hrm.formats import Formats
from hrm.layers import CompressedAttention, Indexer, KimiDelta, LatentAttention, Layer, Mamba, Mamba2, RecurrentMixer
from hrm.model_spec import spec_from_hf_config
from hrm.policy_file import load_policy_file, policy_file_of, save_policy_file
from hrm.search import Space, search
from hrm.workload import Workload
from tests.hrm.small_configs import SMALL_JAMBA, SMALL_KIMI, SMALL_NEMOTRON, SMALL_SPARSE, transformers_config
from tests.hrm.support import machine, tiny_spec

pytestmark = pytest.mark.usefixtures("coarse_searches")

BF16 = Formats.of("bfloat16")
MAMBA = Mamba(hidden_size=64, inner_size=128, state_size=8, step_rank=4)
MAMBA2 = Mamba2(hidden_size=64, num_heads=8, head_dim=16, state_size=8, num_groups=2)
DELTA = KimiDelta(hidden_size=64, num_heads=4, head_dim=16, decay_rank=16, gate_rank=16)
LATENT = LatentAttention(
    hidden_size=64, num_heads=4, kv_rank=24, rope_head_dim=8, nope_head_dim=16, value_head_dim=12, query_rank=20
)
SPARSE = replace(LATENT, indexer=Indexer(num_heads=4, head_dim=8, top_k=16))
SHARED = replace(SPARSE, indexer=Indexer(num_heads=4, head_dim=8, top_k=16, shared=True))

HEAVY = CompressedAttention(
    hidden_size=64,
    num_heads=4,
    head_dim=16,
    query_rank=20,
    output_groups=2,
    output_rank=12,
    rate=128,
    local_window=32,
    streams=4,
)
CHOSEN = replace(HEAVY, rate=4, indexer=Indexer(num_heads=4, head_dim=8, top_k=16))
LOCAL = replace(HEAVY, rate=0, local_window=0, window=32)


def cache_of(given, tokens):
    """What transformers keeps of a sequence of so many tokens."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers_config(given)).eval()
    with torch.inference_mode():
        return model(torch.arange(1, 1 + tokens)[None], use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("model_type", "sizes"), [("nemotron_h", SMALL_NEMOTRON), ("jamba", SMALL_JAMBA), ("kimi_linear", SMALL_KIMI)]
)
def test_a_recurrent_layer_keeps_what_transformers_keeps(model_type, sizes):
    given = {"model_type": model_type, **sizes}
    layers = cache_of(given, 7).layers
    kept = [layer.recurrent_states[0] for layer in layers if getattr(layer, "recurrent_states", None)]
    mixers = [layer.mixer for layer in spec_from_hf_config(given, "x").layers]
    recurrent = [mixer for mixer in mixers if isinstance(mixer, RecurrentMixer)]
    assert recurrent
    assert [state.numel() for state in kept if state is not None] == [mixer.state_elements for mixer in recurrent]
    convolved = [next(iter(layer.conv_states.values())) for layer in layers if getattr(layer, "conv_states", None)]
    for state, mixer in zip((each for each in convolved if each is not None), recurrent, strict=True):
        assert state.numel() % mixer.convolved_elements == 0
        of_convolution = BF16.compute.bytes_of(mixer.convolved_elements, mixer.conv_kernel - 1)
        assert mixer.state_bytes(BF16) == 4 * mixer.state_elements + of_convolution
        assert mixer.cached_elements == 0


def test_an_indexer_keeps_a_key_of_every_token_beside_the_latent_vector():
    given = {"model_type": "deepseek_v32", **SMALL_SPARSE}
    mixer = spec_from_hf_config(given, "x").layers[0].mixer
    kept = cache_of(given, 7).layers[0]
    tensors = (kept.keys, kept.values, kept.indexer_keys)
    assert sum(tensor.numel() for tensor in tensors) == 7 * mixer.cached_elements


def test_attention_reads_what_an_indexer_chooses_and_the_keys_of_all():
    dense, sparse, shared = (mixer.attend(BF16, 1, 1000.0).kernels for mixer in (LATENT, SPARSE, SHARED))
    up, scores, attention = sparse
    assert (up, attention) == (shared[0], shared[1])
    assert len(shared) == len(dense) == 2
    assert attention.num_bytes == 16 * 2 * 32
    assert dense[1].num_bytes == 1000 * 2 * 32
    assert scores.num_bytes == 1000 * 2 * 8
    q_HD, k_TD, w_H = torch.ones(4, 8), torch.ones(1000, 8), torch.ones(4)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _ = w_H[None] @ (q_HD @ k_TD.T)
    assert scores.flops == counter.get_total_flops()
    assert SPARSE.attend(BF16, 1, 10.0).kernels[2] == LATENT.attend(BF16, 1, 10.0).kernels[1]
    assert SPARSE.attended_bytes(BF16, 1, 1000) == attention.num_bytes + scores.num_bytes
    assert SPARSE.reached_bytes(BF16, 1, 1000) == 1000 * 2 * (32 + 8)  # what is chosen is known on the GPU only


@pytest.mark.parametrize("mixer", [MAMBA, MAMBA2, DELTA], ids=lambda mixer: mixer.block)
def test_a_recurrent_step_is_as_long_whatever_the_context_and_prefill_linear_in_the_prompt(mixer):
    step = mixer.attend(BF16, 5, 1000.0)
    assert step == mixer.attend(BF16, 5, 10_000.0)
    assert step.kernels[-1].num_bytes == 5 * 2 * mixer.state_bytes(BF16)
    assert step.flops == 5 * mixer.attend(BF16, 1, 7.0).flops
    long, longer = (mixer.prefill(BF16, 8192, length) for length in (4096, 8192))
    assert long.flops == longer.flops
    assert len(mixer.tensors) == len({tensor.name for tensor in mixer.tensors})
    assert all(len(tensor.parts) == 0 or sum(tensor.parts) == tensor.shape[0] for tensor in mixer.tensors)


def test_the_rule_of_mamba_2_written_out_has_the_flops_of_a_step():
    heads, head_dim, state = MAMBA2.num_heads, MAMBA2.head_dim, MAMBA2.state_size
    decay = heads * head_dim * state
    enter, read = 2 * heads * head_dim * state, 2 * heads * head_dim * state
    convolution = 2 * MAMBA2.conv_kernel * (heads * head_dim + 2 * 2 * state)
    assert MAMBA2.attend(BF16, 3, 50.0).flops == 3 * (decay + enter + read + convolution)


PLANNED = {
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "delta": DELTA,
    "indexer": SPARSE,
    "shared indexer": SHARED,
    "compressed": HEAVY,
    "chosen": CHOSEN,
    "local": LOCAL,
}


@pytest.mark.parametrize("mixer", PLANNED.values(), ids=PLANNED)
def test_new_layers_are_planned_and_kept_in_a_file(tmp_path, mixer):
    plain = tiny_spec(num_layers=4, shared_intermediate_size=24)
    alone = Layer(mixer=mixer, ffn=())  # as where Nemotron-H has two mixers in a row
    layers = [replace(layer, mixer=mixer) if index % 2 else layer for index, layer in enumerate(plain.layers)]
    spec = plain.with_layers([*layers, alone])
    workload = Workload(name="short", prompt_len=60, max_prompt_len=80, gen_len=20, num_requests=200)
    profile = machine(gpu_bytes=1.2e6, cpu_bytes=1e9)
    predicted = search(Space(spec, profile, workload)).require()
    assert predicted.memory.fits
    assert 0 < predicted.tokens_per_s <= predicted.bound_tokens_per_s * (1 + 1e-9)
    save_policy_file(tmp_path / "policy.json", policy_file_of(predicted, spec, profile, workload))
    assert load_policy_file(tmp_path / "policy.json").model == spec


def test_compressed_attention_sees_the_newest_tokens_and_keys_of_all_others():
    assert [LOCAL.seen(n) for n in (10, 1000)] == [10, 32]
    assert HEAVY.seen(1280) == 32 + 10
    assert [CHOSEN.seen(n) for n in (40, 6400)] == [32 + 10, 32 + 16]
    for mixer in (LOCAL, HEAVY, CHOSEN):
        mean = sum(mixer.seen(n + 0.5) for n in range(1000)) / 1000
        assert mixer.mean_seen(1000.0) == pytest.approx(mean, rel=0.01)
    scores, attention = CHOSEN.attend(BF16, 1, 6400.0).kernels[-2:]
    assert attention.num_bytes == (32 + 16) * 16 * 2
    assert scores.num_bytes == 1600 * 8 * 2
    # A token grows the cache by its share of a key, and a sequence has the newest tokens whole.
    assert (LOCAL.cached_elements, HEAVY.cached_elements, CHOSEN.cached_elements) == (16, 1, 6)
    assert HEAVY.state_bytes(BF16) == 2 * (32 * 16 + 2 * 128 * 16)


def test_residual_streams_widen_what_goes_from_layer_to_layer():
    plain = tiny_spec()
    one, four = (
        plain.with_layers(
            Layer(mixer=replace(LOCAL, streams=n), ffn=(replace(plain.experts, streams=n),)) for _ in range(4)
        )
        for n in (1, 4)
    )
    assert (one.residual_size, four.residual_size) == (64, 256)
    weights = (2 + 4) * 4
    assert four.parameters - one.parameters == 4 * 2 * (weights * 4 * 64 + weights + 3)
    extra = four.layers[0].mixer.project(BF16, 7).flops - one.layers[0].mixer.project(BF16, 7).flops
    # into the weights; then the streams into one, into one another, and the output into each
    assert extra == 7 * 2 * (weights * 4 * 64 + 4 * 64 + 4 * 4 * 64 + 4 * 64)


def test_experts_that_return_their_token_are_chosen_and_cost_nothing():
    experts = tiny_spec(num_experts=6, experts_per_token=3).experts
    some = replace(experts, zero_experts=3)
    assert some.tensors[1].shape == (9, 64)
    assert some.expert_parameters == experts.expert_parameters
    assert some.hit(1) == pytest.approx(2)  # of three choices one in three computes nothing
    assert some.run(BF16, 30, 6).flops == pytest.approx(experts.run(BF16, 20, 6).flops)


def test_experts_in_a_smaller_space_are_projected_to_and_from_it():
    experts = replace(tiny_spec().experts, latent_size=16)
    assert experts.expert_parameters == 3 * 16 * experts.intermediate_size
    extra = experts.dense(BF16, 5).flops - tiny_spec().experts.dense(BF16, 5).flops
    assert extra == 2 * 5 * 2 * 64 * 16
    assert experts.dense_parameters - tiny_spec().experts.dense_parameters == 2 * 64 * 16
