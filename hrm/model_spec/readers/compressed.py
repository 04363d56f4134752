"""DeepSeek-V4: compressed attention, and several residual streams."""

from dataclasses import replace
from typing import Final

from hrm.layers import CompressedAttention, Indexer, Layer
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import first_dense_experts, num_layers, of_layers
from hrm.model_spec.spec import ModelSpec

_WINDOW, _SPARSE, _HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_BY_RATIO: Final = {0: _WINDOW, 4: _SPARSE, 128: _HEAVY}


def read_deepseek_v4(keys: Keys) -> ModelSpec:
    """DeepSeek-V4, whose first layers choose experts by a table of tokens."""
    count, streams = num_layers(keys), keys.integer("hc_mult", default=4)
    experts = replace(first_dense_experts(keys, corrected=False), streams=streams)
    scored = experts.with_vectors(score_correction=experts.num_experts)
    by_table = experts.with_vectors(token_experts=keys.integer("vocab_size") * experts.experts_per_token)
    kinds = keys.words("mlp_layer_types", ("hash_moe", "moe"))[:count]
    hashed = range(keys.integer("num_hash_layers", default=3, at_least=0))
    if kinds:
        hashed = {layer for layer, kind in enumerate(kinds) if kind == "hash_moe"}
    mixers = {kind: _attention(keys, kind, streams) for kind in _BY_RATIO.values()}
    layers = [
        Layer(mixer=mixers[kind], ffn=(by_table if layer in hashed else scored,))
        for layer, kind in enumerate(_kinds(keys))
    ]
    # The streams become one before the head, by a projection of all.
    joined = (("streams", streams * (streams * experts.hidden_size + 1) + 1),)
    return of_layers(keys, layers, head_vectors=joined if streams > 1 else ())


def _kinds(keys: Keys) -> tuple[str, ...]:
    """What each layer's attention is; layers that predict further tokens may follow in the list."""
    count = num_layers(keys)
    kinds, ratios = keys.words("layer_types", tuple(_BY_RATIO.values())), keys.integers("compress_ratios")
    if ratios and set(ratios) - set(_BY_RATIO):
        raise keys.refusal("compress_ratios", f"must be of {', '.join(map(str, _BY_RATIO))}")
    kinds = kinds or tuple(_BY_RATIO[ratio] for ratio in ratios)
    if kinds and len(kinds) < count:
        raise keys.refusal("layer_types" if keys.get("layer_types") else "compress_ratios", f"must have {count} layers")
    interleaved = tuple(_SPARSE if layer > 1 and layer % 2 else _HEAVY for layer in range(count))
    return kinds[:count] or interleaved


def _attention(keys: Keys, kind: str, streams: int) -> CompressedAttention:
    window = keys.integer("sliding_window", default=128)
    indexer = Indexer(
        num_heads=keys.integer("index_n_heads", default=64),
        head_dim=keys.integer("index_head_dim", default=128),
        top_k=keys.integer("index_topk", default=512),
    )
    rate = {_WINDOW: 0, _SPARSE: 4, _HEAVY: 128}[kind]
    if keys.get("compress_rates") is not None and rate:
        rate = keys.section("compress_rates").integer(kind, default=rate)
    return CompressedAttention(
        hidden_size=keys.integer("hidden_size"),
        num_heads=keys.integer("num_attention_heads"),
        head_dim=keys.integer("head_dim"),
        query_rank=keys.integer("q_lora_rank"),
        output_groups=keys.integer("o_groups"),
        output_rank=keys.integer("o_lora_rank"),
        window=0 if rate else window,
        rate=rate,
        local_window=window if rate else 0,
        indexer=indexer if kind == _SPARSE else None,
        streams=streams,
    )
