"""Mixtral: RMS norm, separate query, key and value projections, one tensor per expert matrix."""

from collections.abc import Collection
from typing import Any, final

from executor.checkpoint import WeightSource
from executor.families.base import AbstractFamily, checked_spec, positive, require_silu, rope_theta, token_ids
from executor.model.architecture import Architecture, Norm
from executor.model.layout import DenseWeights, ExpertWeights
from hrm.model_spec import ModelSpec, spec_from_hf_config


@final
class Mixtral(AbstractFamily):
    """Checkpoints named as published: `block_sparse_moe.experts.0.w1.weight`.

    Or as transformers 5 names its own parameters, with all experts of a layer in two tensors:
    `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`.
    """

    embedding = "model.embed_tokens.weight"
    final_norm = "model.norm.weight"
    lm_head = "lm_head.weight"

    def architecture(self, config: dict[str, Any], where: str) -> Architecture:
        """Read a config; ModelError naming `where` and the key if it asks for what we lack."""
        require_silu(config.get("hidden_act", "silu"), f"{where}: hidden_act")
        positions = int(positive(config, where, "max_position_embeddings", 131_072))
        spec = spec_from_hf_config(config, where)
        return Architecture(
            spec=checked_spec(spec, where),
            window=min((layer.window for layer in spec.layers if layer.window), default=None),
            norm=Norm.RMS,
            norm_eps=positive(config, where, "rms_norm_eps", 1e-5),
            rope_theta=rope_theta(config, where, default=1e6),
            router_norm=1.0,
            max_position_embeddings=positions,
            bos_token_id=next(iter(token_ids(config, where, "bos_token_id")), None),
            eos_token_ids=token_ids(config, where, "eos_token_id"),
        )

    def published_architecture(self, spec: ModelSpec) -> Architecture:
        """Mixtral-8x7B's numbers at any dimensions."""
        return Architecture(
            spec=spec,
            norm_eps=1e-5,
            rope_theta=1e6,
            router_norm=1.0,
            max_position_embeddings=32_768,
            bos_token_id=1,
            eos_token_ids=(2,),
        )

    def layer_tensors(self, arch: Architecture, layer: int, stored: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a layer."""
        spec = arch.spec
        hidden, intermediate = spec.hidden_size, spec.intermediate_size
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{attention}.q_proj.weight": (spec.query_size, hidden),
            f"{attention}.k_proj.weight": (spec.kv_size, hidden),
            f"{attention}.v_proj.weight": (spec.kv_size, hidden),
            f"{attention}.o_proj.weight": (hidden, spec.query_size),
            _router(layer, stored): (spec.num_experts, hidden),
        }
        gate_up, down = _fused(layer)
        if gate_up in stored:
            return shapes | {
                gate_up: (spec.num_experts, 2 * intermediate, hidden),
                down: (spec.num_experts, hidden, intermediate),
            }
        for expert in range(spec.num_experts):
            matrices = _expert(layer, expert)
            shapes |= {
                f"{matrices}.w1.weight": (intermediate, hidden),
                f"{matrices}.w2.weight": (hidden, intermediate),
                f"{matrices}.w3.weight": (intermediate, hidden),
            }
        return shapes

    def load_dense(self, source: WeightSource, arch: Architecture, layer: int, out: DenseWeights) -> None:
        """Fill the dense part of a layer."""
        prefix = f"model.layers.{layer}"
        sizes = (arch.spec.query_size, arch.spec.kv_size, arch.spec.kv_size)
        source.read_into(f"{prefix}.input_layernorm.weight", out.attention_norm)
        for name, part in zip("qkv", out.qkv.split(sizes), strict=True):
            source.read_into(f"{prefix}.self_attn.{name}_proj.weight", part)
        source.read_into(f"{prefix}.self_attn.o_proj.weight", out.output)
        source.read_into(f"{prefix}.post_attention_layernorm.weight", out.ffn_norm)
        source.read_into(_router(layer, source.names), out.router)

    def load_expert(
        self, source: WeightSource, arch: Architecture, layer: int, expert: int, out: ExpertWeights
    ) -> None:
        """Fill one expert of a layer."""
        spec = arch.spec
        gate_up, down = _fused(layer)
        if gate_up in source.names:
            source.read_into(gate_up, out.w13, expert * 2 * spec.intermediate_size)
            source.read_into(down, out.w2, expert * spec.hidden_size)
            return
        gate, up = out.w13.split(spec.intermediate_size)
        matrices = _expert(layer, expert)
        source.read_into(f"{matrices}.w1.weight", gate)
        source.read_into(f"{matrices}.w3.weight", up)
        source.read_into(f"{matrices}.w2.weight", out.w2)


def _expert(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}"


def _fused(layer: int) -> tuple[str, str]:
    """All experts of a layer: gate above up matrices, and down matrices."""
    experts = f"model.layers.{layer}.mlp.experts"
    return f"{experts}.gate_up_proj", f"{experts}.down_proj"


def _router(layer: int, stored: Collection[str]) -> str:
    renamed = f"model.layers.{layer}.mlp.gate.weight"
    return renamed if renamed in stored else f"model.layers.{layer}.block_sparse_moe.gate.weight"
