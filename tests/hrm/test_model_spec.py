"""Models by their dimensions: totals as advertised, and what follows for layers and the cache."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm.errors import ModelError, ProfileError
from hrm.formats import FORMATS, Formats
from hrm.layers import Layer, RoutedExperts
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec
from hrm.model_spec.dimensions import LatentSizes
from hrm.strict import decode_strictly
from tests.hrm.support import TINY, gated_delta, random_varied_spec, tiny_spec

# Billions of parameters: all, as in each model's card, and those of a token with embedding and
# head, which cards of some models leave out.
ADVERTISED = {
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (140.6, 39.2),
    "dbrx": (131.6, 36.5),
    "qwen3-30b-a3b": (30.5, 3.4),
    "qwen3-235b-a22b": (235.1, 22.2),
    "qwen2-57b-a14b": (57.4, 14.2),
    "deepseek-v2-lite": (15.7, 2.7),
    "deepseek-v2": (235.7, 21.4),
    "deepseek-v3": (671.0, 37.6),
    "kimi-k2": (1026.4, 32.9),
    "gpt-oss-20b": (20.9, 4.2),
    "gpt-oss-120b": (116.8, 5.7),
    "llama-4-scout": (107.8, 17.2),
    "glm-4.5-air": (106.9, 13.4),
    "qwen3-next": (79.7, 3.9),
    "qwen3.5-35b-a3b": (34.7, 3.5),
    "glm-4.7-flash": (29.9, 3.9),
    "minimax-m2.5": (228.7, 11.0),
    "gemma-4-26b-a4b": (25.2, 3.8),
    "phi-3.5-moe": (41.9, 6.6),
    "olmoe-1b-7b": (6.9, 1.3),
}
LATENT = LatentSizes(kv_rank=24, rope_head_dim=8, nope_head_dim=16, value_head_dim=12)
EVERYTHING = tiny_spec(
    num_kv_heads=4,
    head_dim=24,
    latent_attention=replace(LATENT, query_rank=20),
    num_layers=4,
    num_dense_layers=1,
    dense_intermediate_size=80,
    shared_intermediate_size=40,
    attention_windows=(0, 16, 16, 0),
    other_layer_parameters=7,
    other_router_parameters=5,
    other_expert_parameters=3,
    other_head_parameters=2,
)


def test_parameters_are_as_advertised():
    assert set(BUILT_IN_MODELS) == set(ADVERTISED)
    found = {
        name: (round(spec.parameters / 1e9, 1), round(spec.active_parameters / 1e9, 1))
        for name, spec in BUILT_IN_MODELS.items()
    }
    assert found == ADVERTISED


def test_parameters_are_those_of_the_tensors():
    spec = tiny_spec(num_layers=3, head_dim=24)
    shapes = 3 * [
        (64, 4 * 24),
        (64, 2 * 24),
        (64, 2 * 24),
        (4 * 24, 64),
        (64, 4),
        (64,),
        (64,),
        *4 * [(64, 96), (96, 64), (64, 96)],
    ] + [(256, 64), (256, 64), (64,)]
    sizes = [rows[0] * (rows[1] if len(rows) > 1 else 1) for rows in shapes]
    assert spec.parameters == sum(sizes)
    assert spec.kv_bytes_per_token(Formats.of("float32")) == 3 * 2 * (2 * 24) * 4
    assert spec.parameters - replace(spec, tied_embeddings=True).parameters == 256 * 64


def test_the_class_default_of_dbrx_shows_in_the_total():
    dbrx = BUILT_IN_MODELS["dbrx"]
    narrow = replace(dbrx.layers[0], ffn=(replace(dbrx.experts, intermediate_size=3584),))
    wrong = dbrx.with_layers([narrow] * dbrx.num_layers)
    assert round(wrong.parameters / 1e9) == 47


VARIED = [
    *BUILT_IN_MODELS.values(),
    EVERYTHING,
    *(replace(random_varied_spec(Random(n)), name=f"random {n}") for n in range(10)),
]


@pytest.mark.parametrize("spec", VARIED, ids=lambda s: s.name)
def test_the_whole_is_the_sum_of_its_layers(spec):
    spec = spec.without_packing
    kinds = spec.layer_kinds()
    assert kinds == Counter(spec.layer_kind(layer) for layer in range(spec.num_layers))
    assert sum(count for kind, count in kinds.items() if kind.has_experts) == spec.num_expert_layers
    in_layers = sum(layer.dense_parameters + layer.num_experts * spec.expert_parameters for layer in spec.layers)
    units = sum(16 * -(-layer.dense_parameters // 8) for layer in spec.layers)  # each begins at 16 bytes
    experts = sum(layer.num_experts * 16 * -(-spec.expert_parameters // 8) for layer in spec.layers)
    assert spec.total_layer_bytes(FORMATS["float16"]) == units + experts
    outside = spec.parameters - in_layers
    assert outside == spec.head_parameters + (not spec.tied_embeddings) * spec.embedding_parameters
    touched = sum(
        layer.dense_parameters + min(layer.num_experts, spec.experts_per_token) * spec.expert_parameters
        for layer in spec.layers
    )
    assert spec.active_parameters == touched + outside
    assert spec.dense_bytes(FORMATS["float32"]) == max(
        16 * -(-layer.dense_parameters // 4) for layer in spec.layers if layer.has_experts
    )


def test_a_layer_counts_each_of_its_tensors_once():
    hidden, heads = 64, 4
    attention = [
        (hidden, 20),
        (20,),
        (20, heads * 24),  # queries: down, norm, up
        (hidden, 24 + 8),
        (24,),
        (24, heads * (16 + 12)),  # cache: down, norm; up
        (heads * 12, hidden),
        (hidden,),
        (7,),
    ]
    dense_ffn = [(hidden,), *3 * [(hidden, 80)]]
    moe = [(hidden,), (hidden, 4), (5,), *3 * [(hidden, 40)]]
    expert = [*3 * [(hidden, 96)], (3,)]

    def count(shapes):
        return sum(torch.Size(shape).numel() for shape in shapes)

    dense, sparse, whole = EVERYTHING.layer_kinds()
    assert list(EVERYTHING.layer_kinds().values()) == [1, 2, 1]
    assert (dense.has_experts, sparse.window, whole.window) == (False, 16, 0)
    assert whole == sparse.without_window
    assert dense.parameters == dense.dense_parameters == count(attention + dense_ffn)
    assert sparse.dense_parameters == count(attention + moe)
    assert sparse.parameters == count(attention + moe + 4 * expert)
    assert EVERYTHING.expert_parameters == count(expert)
    assert EVERYTHING.head_parameters == count([(256, hidden), (hidden,), (2,)])
    mixer: Any = whole.mixer
    assert mixer.projection_parameters == count(attention[:5])
    assert mixer.host_parameters == count(attention[5:6])
    direct = replace(mixer, query_rank=0)
    assert direct.projection_parameters == count([(hidden, heads * 24), *attention[3:5]])


def test_the_cache_of_deepseek_v3_is_as_published():
    spec = BUILT_IN_MODELS["deepseek-v3"]
    assert spec.kv_bytes_per_token(Formats.of("bfloat16")) == 70_272  # arXiv 2505.09343, table 1
    mixer: Any = spec.layers[0].mixer
    assert (mixer.query_size, mixer.returned_elements) == (128 * 192, 128 * 128)


def test_flops_over_a_cached_token_are_those_of_the_two_products():
    context, plain = 10, tiny_spec().attention
    queries, keys = torch.ones(4, 1, 16), torch.ones(4, context, 16)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.bmm(queries, keys.mT), keys)
    assert counter.get_total_flops() == context * plain.flops_per_context_token

    cached, queries = torch.ones(context, 24 + 8), torch.ones(4, 24 + 8)
    with FlopCounterMode(display=False) as counter:
        _ = queries @ cached.T @ cached[:, :24]
    mixer: Any = EVERYTHING.layers[0].mixer
    assert counter.get_total_flops() == context * mixer.flops_per_context_token


def test_a_window_limits_the_context():
    limited, whole = EVERYTHING.layers[1].mixer, EVERYTHING.layers[0].mixer
    assert [limited.reach(context) for context in (0, 15, 17)] == [0, 15, 16]
    assert whole.reach(17) == 17
    assert isinstance(limited.reach(3), int)
    contexts = np.array([0.5, 16.0, 99.0])
    assert np.asarray(limited.reach(contexts)).tolist() == [0.5, 16.0, 16.0]
    assert whole.reach(contexts) is contexts


def test_experts_hit_are_those_of_uniform_routing():
    spec = tiny_spec(num_experts=8, experts_per_token=2)
    assert spec.experts_hit(1) == pytest.approx(2)
    assert spec.experts_hit(2) == pytest.approx(8 * (1 - 0.75**2))
    assert spec.experts_hit(1000) == pytest.approx(8)


def test_how_weights_are_published_makes_no_other_model():
    spec = BUILT_IN_MODELS["gpt-oss-20b"]
    assert spec.published_dtype == "mxfp4 experts"
    assert spec == replace(spec, published_dtype="")
    assert hash(spec) == hash(replace(spec, published_dtype=""))


IMPOSSIBLE = [
    ({"num_layers": 0}, "tiny: num_layers is 0: must be a positive integer, at most 10,000;"),
    ({"num_layers": 10_001}, "num_layers is 10001"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": 10**8 + 1}, "vocab_size is 100000001"),
    ({"vocab_size": 10**8, "hidden_size": 10**8}, r"parameters is \d+: must be at most 1,000,"),
    ({"num_kv_heads": 3}, "num_kv_heads is 3: must divide num_heads 4"),
    ({"experts_per_token": 5}, "experts_per_token is 5: must be at most num_experts 4"),
    ({"matrices_per_expert": 4}, "matrices_per_expert is 4: must be an integer of at least 2, at most 3"),
    ({"shared_intermediate_size": -1}, "shared_intermediate_size is -1: must be an integer of at"),
    ({"num_dense_layers": 5}, "num_dense_layers is 5: must be an integer of at least 0, at most 4"),
    ({"num_dense_layers": 4, "dense_intermediate_size": 8}, "kinds is <none with experts>: must have routed"),
    ({"num_dense_layers": 1}, "tiny: intermediate_size is 0: must be a positive integer"),
    ({"attention_windows": (1, 2)}, r"attention_windows is <2 windows>: must be .* 4 layers"),
    ({"attention_windows": (0, 0, -1, 0)}, r"tiny: window is -1: must be an integer of at least 0"),
    ({"other_layer_parameters": -1}, "tiny: other parameters is -1: must be"),
    ({"expert_frequencies": (0.5, 0.5)}, "frequencies is .*: must be shares between 0 and 1 of the 4 experts"),
    ({"latent_attention": LATENT}, "head_dim is 24: must be head_dim 16"),
    ({"latent_attention": replace(LATENT, kv_rank=0), "head_dim": 24}, "tiny: kv_rank is 0: must be a positive"),
    (
        {"latent_attention": replace(LATENT, query_rank=-1), "head_dim": 24},
        "tiny: query_rank is -1: must be an integer of at least 0",
    ),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_impossible_dimensions_are_refused(changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        tiny_spec(**changes)
    assert "\n" not in str(caught.value)


def test_blocks_that_do_not_go_together_are_refused():
    layer = tiny_spec().layers[0]
    with pytest.raises(ModelError, match=r"hidden_size is \[32, 64\]: must be the same in all blocks"):
        replace(layer, mixer=replace(tiny_spec().attention, hidden_size=32))
    with pytest.raises(ModelError, match=r"tiny: hidden_size is \[32, 64\]: must be the same in all layers"):
        tiny_spec().with_layers([layer, tiny_spec(hidden_size=32).layers[0]])
    with pytest.raises(ModelError, match="num_value_heads is 3: must be a multiple of num_key_heads 2"):
        replace(gated_delta(64), num_value_heads=3)


def test_experts_of_several_classes_are_told_but_not_planned():
    small, large = (
        RoutedExperts(hidden_size=64, num_experts=n, experts_per_token=1, intermediate_size=size)
        for n, size in ((8, 16), (2, 96))
    )
    attention = tiny_spec().attention
    for layers in (
        (Layer(mixer=attention, ffn=(small, large)),),
        (Layer(mixer=attention, ffn=(small,)), Layer(mixer=attention, ffn=(large,))),
    ):
        spec = tiny_spec().with_layers(layers)
        expected = sum(
            sum(torch.Size(tensor.shape).numel() * (n if tensor.unit == "expert" else 1) for tensor in block.tensors)
            for block, n in ((attention, 0), (small, 8), (large, 2), *((attention, 0),) * (len(layers) - 1))
        )
        assert spec.total_parameters == expected
        with pytest.raises(ModelError, match="tiny: kinds is <experts of 2 classes>: must have routed experts of one"):
            _ = spec.num_experts


def test_only_layers_alike_in_attention_have_one():
    mixer: Any = EVERYTHING.layers[0].mixer
    assert mixer.num_heads == 4
    with pytest.raises(AssertionError):
        _ = EVERYTHING.attention
    layer = tiny_spec().layers[0]
    windowed = replace(layer, mixer=replace(tiny_spec().attention, window=8))
    assert tiny_spec().with_layers([layer, windowed]).attention == layer.mixer
    with pytest.raises(AssertionError):
        _ = tiny_spec().with_layers([layer, replace(layer, mixer=gated_delta(64))]).attention


def as_in_a_file(spec):
    return msgspec.json.decode(msgspec.json.encode(spec))


def as_read_from_a_file(plain):
    return decode_strictly(plain, ModelSpec, "policy.json")


OLD_MODEL = {
    "name": "tiny",
    "family": "mixtral",
    "num_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "experts_per_token": 2,
    "vocab_size": 256,
    "tied_embeddings": False,
    "matrices_per_expert": 3,
}


@pytest.mark.parametrize("spec", VARIED, ids=lambda s: s.name)
def test_a_policy_file_keeps_every_layer(spec):
    read = as_read_from_a_file(as_in_a_file(spec))
    assert read == spec
    assert read.published_dtype == spec.published_dtype


def test_measured_routing_is_kept():
    spec = tiny_spec().with_frequencies([0.9, 0.6, 0.4, 0.1])
    assert as_read_from_a_file(as_in_a_file(spec)).experts.frequencies == (0.9, 0.6, 0.4, 0.1)


def test_a_model_of_an_older_policy_file_is_still_read():
    assert as_read_from_a_file(OLD_MODEL) == tiny_spec()
    latent = {"kv_rank": 24, "rope_head_dim": 8, "nope_head_dim": 16, "value_head_dim": 12, "query_rank": 0}
    old = {**OLD_MODEL, "head_dim": 24, "latent_attention": latent, "attention_windows": [0, 16, 16, 0]}
    expected = replace(TINY, head_dim=24, latent_attention=LATENT, attention_windows=(0, 16, 16, 0)).spec
    assert as_read_from_a_file(old) == expected


NEW_MODEL = as_in_a_file(EVERYTHING)


def changed_block(**changes):
    first, *others = NEW_MODEL["kinds"]
    mixer = {**first["mixer"], **changes}
    return {**NEW_MODEL, "kinds": [{**first, "mixer": mixer}, *others]}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({**OLD_MODEL, "latent_attention": {"kv_rank": 1}}, "latent_attention.rope_head_dim is <missing>"),
        ({**OLD_MODEL, "latent_attention": 3}, "latent_attention"),
        ({**OLD_MODEL, "attention_windows": [0, 1, "2", 3]}, "attention_windows"),
        ({**OLD_MODEL, "num_dense_layers": 5}, "num_dense_layers is 5: must be an integer of at least 0, at most 4"),
        ({**NEW_MODEL, "order": [0, 1, 2, 3]}, r"order is .*: must name each of 3 different kinds, in order from 0 on"),
        ({**NEW_MODEL, "order": [1, 0, 2, 2]}, r"order is .*: must name each of 3 different kinds, in order from 0 on"),
        ({**NEW_MODEL, "vocab_size": 0}, "vocab_size is 0"),
        (changed_block(kv_rank=0), r"kinds\[0\].mixer.kv_rank is 0: must be a positive"),
        (changed_block(block="conv"), r"kinds\[0\].mixer.block is 'conv': must be one of .*grouped_query_att"),
        (changed_block(block=None), r"kinds\[0\].mixer.block is None: must be one of .*grouped_query_attention"),
        ({**NEW_MODEL, "kinds": [{"mixer": 3, "ffn": []}]}, r"kinds\[0\].mixer is 3: must be a mapping"),
    ],
)
def test_a_broken_model_in_a_policy_file_is_refused_by_field(plain, message):
    with pytest.raises(ProfileError, match=f"^policy.json: {message}"):
        as_read_from_a_file(plain)


def test_a_model_is_the_same_key_in_a_process_that_hashes_names_otherwise():
    """Its hash, and tables by its layers, were once those of the process that it came from."""
    spec = BUILT_IN_MODELS["gpt-oss-20b"]
    assert spec.layer_kinds(), "worked out before it is sent"
    assert hash(spec) == hash(replace(spec))
    code = (
        "import pickle, sys; from hrm.model_spec import BUILT_IN_MODELS as models\n"
        "sent, own = pickle.loads(sys.stdin.buffer.read()), models['gpt-oss-20b']\n"
        "assert {sent: 1}[own] == 1 and all(kind in own.layer_kinds() for kind in sent.kinds)"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code], input=pickle.dumps(spec), env=environment, check=True)
