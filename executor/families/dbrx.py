"""DBRX: LayerNorm, one clipped query/key/value projection, all experts of a layer in one tensor."""

from collections.abc import Collection
from typing import Any, final

from executor.checkpoint import WeightSource
from executor.families.base import AbstractFamily, checked_spec, positive, require_silu, rope_theta, token_ids
from executor.model.architecture import Architecture, Norm
from executor.model.layout import DenseWeights, ExpertWeights
from hrm.errors import ModelError
from hrm.model_spec import ModelSpec, spec_from_hf_config

LAYER_NORM_EPS = 1e-5  # torch's default, which the published code relies on


@final
class Dbrx(AbstractFamily):
    """Checkpoints named as transformers names them: `ffn.experts.mlp.w1` over all experts."""

    embedding = "transformer.wte.weight"
    final_norm = "transformer.norm_f.weight"
    lm_head = "lm_head.weight"

    def architecture(self, config: dict[str, Any], where: str) -> Architecture:
        """Read a config; ModelError naming `where` and the key if it asks for what we lack."""
        spec = checked_spec(spec_from_hf_config(config, where), where)
        if spec.query_size != spec.hidden_size:
            raise ModelError(
                f"{where}: n_heads", spec.num_heads, f"must divide d_model {spec.hidden_size}", "check the config.json"
            )
        attention, ffn = config["attn_config"], config["ffn_config"]
        activation = ffn.get("ffn_act_fn") or {"name": "silu"}
        name = activation.get("name", "silu") if isinstance(activation, dict) else activation
        require_silu(name, f"{where}: ffn_config: ffn_act_fn")
        clip = attention.get("clip_qkv")
        if clip is not None:
            clip = positive(attention, f"{where}: attn_config", "clip_qkv", None)
        router_norm = ffn.get("moe_normalize_expert_weights", 1.0)
        if router_norm is not None:
            router_norm = positive(ffn, f"{where}: ffn_config", "moe_normalize_expert_weights", 1.0)
        return Architecture(
            spec=spec,
            norm=Norm.LAYER,
            norm_eps=LAYER_NORM_EPS,
            rope_theta=rope_theta(config, where, default=10_000.0),
            clip_qkv=clip,
            router_norm=router_norm,
            max_position_embeddings=int(positive(config, where, "max_seq_len", 2048)),
            bos_token_id=next(iter(token_ids(config, where, "bos_token_id")), None),
            eos_token_ids=token_ids(config, where, "eos_token_id"),
        )

    def published_architecture(self, spec: ModelSpec) -> Architecture:
        """DBRX's numbers at any dimensions."""
        return Architecture(
            spec=spec,
            norm=Norm.LAYER,
            norm_eps=LAYER_NORM_EPS,
            rope_theta=5e5,
            clip_qkv=8.0,
            router_norm=1.0,
            max_position_embeddings=32_768,
            eos_token_ids=(100_257,),
        )

    def layer_tensors(
        self,
        arch: Architecture,
        layer: int,
        stored: Collection[str] = (),  # noqa: ARG002 - others need it
    ) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a layer."""
        spec = arch.spec
        hidden = spec.hidden_size
        experts = (spec.num_experts * spec.intermediate_size, hidden)
        prefix = f"transformer.blocks.{layer}"
        attention = f"{prefix}.norm_attn_norm"
        return {
            f"{attention}.norm_1.weight": (hidden,),
            f"{attention}.norm_2.weight": (hidden,),
            f"{attention}.attn.Wqkv.weight": (spec.query_size + 2 * spec.kv_size, hidden),
            f"{attention}.attn.out_proj.weight": (hidden, spec.query_size),
            f"{prefix}.ffn.router.layer.weight": (spec.num_experts, hidden),
            f"{prefix}.ffn.experts.mlp.w1": experts,
            f"{prefix}.ffn.experts.mlp.v1": experts,
            f"{prefix}.ffn.experts.mlp.w2": experts,
        }

    def load_dense(
        self,
        source: WeightSource,
        arch: Architecture,  # noqa: ARG002 - others need it
        layer: int,
        out: DenseWeights,
    ) -> None:
        """Fill the dense part of a layer."""
        prefix = f"transformer.blocks.{layer}"
        attention = f"{prefix}.norm_attn_norm"
        source.read_into(f"{attention}.norm_1.weight", out.attention_norm)
        source.read_into(f"{attention}.attn.Wqkv.weight", out.qkv)
        source.read_into(f"{attention}.attn.out_proj.weight", out.output)
        source.read_into(f"{attention}.norm_2.weight", out.ffn_norm)
        source.read_into(f"{prefix}.ffn.router.layer.weight", out.router)

    def load_expert(
        self, source: WeightSource, arch: Architecture, layer: int, expert: int, out: ExpertWeights
    ) -> None:
        """Fill one expert of a layer; w2 is stored transposed."""
        size = arch.spec.intermediate_size
        gate, up = out.w13.split(size)
        prefix = f"transformer.blocks.{layer}.ffn.experts.mlp"
        source.read_into(f"{prefix}.w1", gate, expert * size)
        source.read_into(f"{prefix}.v1", up, expert * size)
        source.read_into(f"{prefix}.w2", out.w2.T, expert * size)
