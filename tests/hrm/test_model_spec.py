"""Models by their dimensions: totals as advertised, and what follows for layers and the cache."""

from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm.errors import ModelError, ProfileError
from hrm.formats import FORMATS
from hrm.model_spec import BUILT_IN_MODELS, LatentAttention, LayerKind, ModelSpec
from hrm.strict import decode_strictly
from tests.hrm.support import tiny_spec

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
    "phi-3.5-moe": (41.9, 6.6),
    "olmoe-1b-7b": (6.9, 1.3),
}
LATENT = LatentAttention(kv_rank=24, rope_head_dim=8, nope_head_dim=16, value_head_dim=12)
EVERYTHING = replace(
    tiny_spec(),
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
    assert spec.kv_bytes_per_token(FORMATS["float32"]) == 3 * 2 * (2 * 24) * 4
    assert spec.parameters - replace(spec, tied_embeddings=True).parameters == 256 * 64


def test_the_class_default_of_dbrx_shows_in_the_total():
    wrong = replace(BUILT_IN_MODELS["dbrx"], intermediate_size=3584)
    assert round(wrong.parameters / 1e9) == 47


@pytest.mark.parametrize("spec", [*BUILT_IN_MODELS.values(), EVERYTHING], ids=lambda s: s.name)
def test_the_whole_is_the_sum_of_its_layers(spec):
    kinds = spec.layer_kinds()
    assert kinds == Counter(spec.layer_kind(layer) for layer in range(spec.num_layers))
    assert sum(count for kind, count in kinds.items() if kind.has_experts) == spec.num_expert_layers
    in_layers = sum(count * spec.layer_bytes_of(kind, FORMATS["float16"]) for kind, count in kinds.items())
    assert spec.total_layer_bytes(FORMATS["float16"]) == in_layers
    outside = spec.parameters - in_layers // 2
    assert outside == spec.head_parameters + (not spec.tied_embeddings) * spec.embedding_parameters
    touched = sum(
        count
        * (
            spec.dense_parameters_of(kind)
            + min(spec.num_experts_of(kind), spec.experts_per_token) * spec.expert_parameters
        )
        for kind, count in kinds.items()
    )
    assert spec.active_parameters == touched + outside
    assert spec.layer_bytes(FORMATS["float16"]) == spec.layer_bytes_of(LayerKind(), FORMATS["float16"])
    assert spec.dense_parameters == spec.dense_parameters_of(LayerKind())


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
        (hidden,),
        (7,),
    ]
    dense_ffn = 3 * [(hidden, 80)]
    moe = [(hidden, 4), (5,), *3 * [(hidden, 40)]]
    expert = [*3 * [(hidden, 96)], (3,)]

    def count(shapes):
        return sum(torch.Size(shape).numel() for shape in shapes)

    dense, sparse = LayerKind(has_experts=False), LayerKind(window=16)
    assert EVERYTHING.layer_kinds() == {dense: 1, sparse: 2, LayerKind(): 1}
    assert EVERYTHING.dense_parameters_of(dense) == count(attention + dense_ffn)
    assert EVERYTHING.dense_parameters_of(sparse) == count(attention + moe)
    assert EVERYTHING.expert_parameters == count(expert)
    assert EVERYTHING.layer_bytes_of(dense, FORMATS["float32"]) == 4 * count(attention + dense_ffn)
    assert EVERYTHING.layer_bytes(FORMATS["float32"]) == 4 * count(attention + moe + 4 * expert)
    assert EVERYTHING.head_parameters == count([(256, hidden), (hidden,), (2,)])
    parts = EVERYTHING.qkv_parameters, EVERYTHING.latent_up_parameters, EVERYTHING.output_parameters
    assert parts == (count(attention[:5]), count(attention[5:6]), count(attention[6:7]))
    direct = replace(EVERYTHING, latent_attention=LATENT)
    assert direct.qkv_parameters == count([(hidden, heads * 24), *attention[3:5]])


def test_the_cache_of_deepseek_v3_is_as_published():
    spec = BUILT_IN_MODELS["deepseek-v3"]
    assert spec.kv_bytes_per_token(FORMATS["bfloat16"]) == 70_272  # arXiv 2505.09343, table 1
    assert (spec.query_size, spec.attention_output_size) == (128 * 192, 128 * 128)


def test_only_what_latent_attention_caches_has_a_size():
    with pytest.raises(AssertionError, match="caches no keys"):
        _ = EVERYTHING.kv_size


def test_flops_over_a_cached_token_are_those_of_the_two_products():
    context, plain = 10, tiny_spec()
    queries, keys = torch.ones(4, 1, 16), torch.ones(4, context, 16)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.bmm(queries, keys.mT), keys)
    assert counter.get_total_flops() == context * plain.attention_flops_per_context_token

    cached, queries = torch.ones(context, 24 + 8), torch.ones(4, 24 + 8)
    with FlopCounterMode(display=False) as counter:
        _ = queries @ cached.T @ cached[:, :24]
    assert counter.get_total_flops() == context * EVERYTHING.attention_flops_per_context_token


def test_a_window_limits_the_context():
    limited, whole = LayerKind(window=16), LayerKind()
    assert [EVERYTHING.context_in(limited, context) for context in (0, 15, 17)] == [0, 15, 16]
    assert EVERYTHING.context_in(whole, 17) == 17
    assert isinstance(EVERYTHING.context_in(limited, 3), int)
    contexts = np.array([0.5, 16.0, 99.0])
    assert EVERYTHING.context_in(limited, contexts).tolist() == [0.5, 16.0, 16.0]
    assert EVERYTHING.context_in(whole, contexts) is contexts


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
    ({"shared_intermediate_size": -1}, "shared_intermediate_size is -1: must be an integer of at"),
    ({"num_dense_layers": 4, "dense_intermediate_size": 8}, "num_dense_layers is 4: must be below"),
    ({"num_dense_layers": 1}, "dense_intermediate_size is 0: must be positive where there are"),
    ({"attention_windows": (1, 2)}, r"attention_windows is <tuple of 2>: must be .* 4 layers"),
    ({"attention_windows": [0, 0, 0, 0]}, "attention_windows is <list of 4>: must be a tuple"),
    ({"attention_windows": (0, 0, -1, 0)}, r"attention_windows\[2\] is -1"),
    ({"latent_attention": LATENT}, "head_dim is 16: must be nope_head_dim .*, 24"),
    ({"latent_attention": LATENT, "head_dim": 24}, "num_kv_heads is 2: must be num_heads 4"),
    ({"latent_attention": replace(LATENT, kv_rank=0)}, "latent_attention.kv_rank is 0: must be a positive"),
    (
        {"latent_attention": replace(LATENT, query_rank=-1)},
        "latent_attention.query_rank is -1: must be an integer of at least 0",
    ),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_impossible_dimensions_are_refused(changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        tiny_spec(**changes)
    assert "\n" not in str(caught.value)


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


def as_read_from_a_policy_file(plain):
    return decode_strictly(plain, ModelSpec, "policy.json")


@pytest.mark.parametrize("spec", [*BUILT_IN_MODELS.values(), EVERYTHING], ids=lambda s: s.name)
def test_a_policy_file_keeps_every_dimension(spec):
    read = as_read_from_a_policy_file(msgspec.json.decode(msgspec.json.encode(spec)))
    assert read == spec
    assert read.published_dtype == spec.published_dtype


def test_a_model_of_an_older_policy_file_is_still_read():
    assert as_read_from_a_policy_file(OLD_MODEL) == tiny_spec()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_attention": {"kv_rank": 1}}, "latent_attention.rope_head_dim is <missing>"),
        ({"latent_attention": 3}, "latent_attention"),
        ({"attention_windows": [0, 1, "2", 3]}, "attention_windows"),
        ({"num_dense_layers": 5}, "num_dense_layers is 5: must be below num_layers 4"),
    ],
)
def test_a_broken_model_in_a_policy_file_is_refused_by_field(changes, message):
    with pytest.raises(ProfileError, match=f"^policy.json: {message}"):
        as_read_from_a_policy_file({**OLD_MODEL, **changes})
