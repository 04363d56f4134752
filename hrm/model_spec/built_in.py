"""The models that are known by name: dimensions as in the published config.json of each."""

from dataclasses import replace
from typing import Final

from hrm.model_spec.latent import LatentAttention
from hrm.model_spec.spec import ModelSpec

_FP8: Final = "fp8"
_MXFP4: Final = "mxfp4 experts"

_DEEPSEEK_LATENT: Final = LatentAttention(
    kv_rank=512, rope_head_dim=64, nope_head_dim=128, value_head_dim=128, query_rank=1536
)
_DEEPSEEK_V3: Final = ModelSpec(
    name="deepseek-v3",
    family="deepseek_v3",
    num_layers=61,
    hidden_size=7168,
    intermediate_size=2048,
    num_heads=128,
    num_kv_heads=128,
    head_dim=192,
    num_experts=256,
    experts_per_token=8,
    vocab_size=129280,
    shared_intermediate_size=2048,
    num_dense_layers=3,
    dense_intermediate_size=18432,
    latent_attention=_DEEPSEEK_LATENT,
    other_router_parameters=256,
    published_dtype=_FP8,
)
_GPT_OSS_20B: Final = ModelSpec(
    name="gpt-oss-20b",
    family="gpt_oss",
    num_layers=24,
    hidden_size=2880,
    intermediate_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    num_experts=32,
    experts_per_token=4,
    vocab_size=201088,
    attention_windows=(128, 0) * 12,
    other_layer_parameters=(64 + 2 * 8) * 64 + 2880 + 64,  # projections' biases, sinks
    other_router_parameters=32,
    other_expert_parameters=3 * 2880,
    published_dtype=_MXFP4,
)
_QWEN3_30B: Final = ModelSpec(
    name="qwen3-30b-a3b",
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    intermediate_size=768,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    experts_per_token=8,
    vocab_size=151936,
    other_layer_parameters=2 * 128,  # norms of queries and keys
)
_MIXTRAL_8X7B: Final = ModelSpec(
    name="mixtral-8x7b",
    family="mixtral",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    experts_per_token=2,
    vocab_size=32000,
)

BUILT_IN_MODELS: Final = {
    spec.name: spec
    for spec in (
        _MIXTRAL_8X7B,
        replace(
            _MIXTRAL_8X7B, name="mixtral-8x22b", num_layers=56, hidden_size=6144, intermediate_size=16384, num_heads=48
        ),
        ModelSpec(
            name="dbrx",
            family="dbrx",
            num_layers=40,
            hidden_size=6144,
            intermediate_size=10752,
            num_heads=48,
            num_kv_heads=8,
            head_dim=128,
            num_experts=16,
            experts_per_token=4,
            vocab_size=100352,
        ),
        _QWEN3_30B,
        replace(
            _QWEN3_30B, name="qwen3-235b-a22b", num_layers=94, hidden_size=4096, intermediate_size=1536, num_heads=64
        ),
        ModelSpec(
            name="qwen2-57b-a14b",
            family="qwen2_moe",
            num_layers=28,
            hidden_size=3584,
            intermediate_size=2560,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            num_experts=64,
            experts_per_token=8,
            vocab_size=151936,
            shared_intermediate_size=20480,
            other_layer_parameters=(28 + 2 * 4) * 128,  # biases of queries, keys and values
            other_router_parameters=3584,  # the shared expert's gate
        ),
        ModelSpec(
            name="deepseek-v2-lite",
            family="deepseek_v2",
            num_layers=27,
            hidden_size=2048,
            intermediate_size=1408,
            num_heads=16,
            num_kv_heads=16,
            head_dim=192,
            num_experts=64,
            experts_per_token=6,
            vocab_size=102400,
            shared_intermediate_size=2 * 1408,
            num_dense_layers=1,
            dense_intermediate_size=10944,
            latent_attention=replace(_DEEPSEEK_LATENT, query_rank=0),
        ),
        ModelSpec(
            name="deepseek-v2",
            family="deepseek_v2",
            num_layers=60,
            hidden_size=5120,
            intermediate_size=1536,
            num_heads=128,
            num_kv_heads=128,
            head_dim=192,
            num_experts=160,
            experts_per_token=6,
            vocab_size=102400,
            shared_intermediate_size=2 * 1536,
            num_dense_layers=1,
            dense_intermediate_size=12288,
            latent_attention=_DEEPSEEK_LATENT,
        ),
        _DEEPSEEK_V3,
        replace(
            _DEEPSEEK_V3,
            name="kimi-k2",
            family="kimi_k2",
            num_heads=64,
            num_kv_heads=64,
            num_experts=384,
            vocab_size=163840,
            num_dense_layers=1,
            other_router_parameters=384,
        ),
        _GPT_OSS_20B,
        replace(
            _GPT_OSS_20B,
            name="gpt-oss-120b",
            num_layers=36,
            num_experts=128,
            attention_windows=(128, 0) * 18,
            other_router_parameters=128,
        ),
        ModelSpec(
            name="llama-4-scout",
            family="llama4_text",
            num_layers=48,
            hidden_size=5120,
            intermediate_size=8192,
            num_heads=40,
            num_kv_heads=8,
            head_dim=128,
            num_experts=16,
            experts_per_token=1,
            vocab_size=202048,
            shared_intermediate_size=8192,
            attention_windows=(8192, 8192, 8192, 0) * 12,
        ),
        ModelSpec(
            name="glm-4.5-air",
            family="glm4_moe",
            num_layers=46,
            hidden_size=4096,
            intermediate_size=1408,
            num_heads=96,
            num_kv_heads=8,
            head_dim=128,
            num_experts=128,
            experts_per_token=8,
            vocab_size=151552,
            shared_intermediate_size=1408,
            num_dense_layers=1,
            dense_intermediate_size=10944,
            other_layer_parameters=(96 + 2 * 8) * 128,  # biases of queries, keys and values
            other_router_parameters=128,  # correction of the scores
        ),
        ModelSpec(
            name="phi-3.5-moe",
            family="phimoe",
            num_layers=32,
            hidden_size=4096,
            intermediate_size=6400,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            num_experts=16,
            experts_per_token=2,
            vocab_size=32064,
            other_layer_parameters=(32 + 2 * 8) * 128 + 3 * 4096,  # of projections and both norms
            other_head_parameters=4096 + 32064,  # biases of the final norm and the LM head
        ),
        ModelSpec(
            name="olmoe-1b-7b",
            family="olmoe",
            num_layers=16,
            hidden_size=2048,
            intermediate_size=1024,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            num_experts=64,
            experts_per_token=8,
            vocab_size=50304,
            other_layer_parameters=2 * 16 * 128,  # norms over all queries and all keys
        ),
    )
}
