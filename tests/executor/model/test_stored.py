"""Stored forms of published checkpoints: what is read acts as transformers' own parameters do."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GptOssConfig, Qwen3NextConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet, Qwen3NextSparseMoeBlock

from executor.checkpoint import Checkpoint
from executor.families.base import Family
from executor.families.mixtral import MIXTRAL
from executor.families.stored import Stored, StoredRows, grouped, in_order, interleaved
from executor.model import Architecture
from executor.model.layout import views
from hrm.layers import DenseFfn, GatedDeltaNet, GroupedQueryAttention, Layer, RoutedExperts, Unit
from hrm.model_spec import ModelSpec
from tests.executor.reference import dequantised
from tests.executor.tiny_models import tiny_arch

M = TypeVar("M", bound=nn.Module)
D, INNER, E, H, G, HEAD = 16, 6, 4, 4, 2, 6
ATTENTION = GroupedQueryAttention(hidden_size=D, num_heads=H, num_kv_heads=G, head_dim=HEAD)
EXPERTS = RoutedExperts(hidden_size=D, num_experts=E, experts_per_token=2, intermediate_size=INNER)
DELTA = GatedDeltaNet(hidden_size=D, num_key_heads=2, num_value_heads=4, key_head_dim=3, value_head_dim=5)


def spec_of(*layers: Layer) -> ModelSpec:
    return tiny_arch(hidden_size=D).spec.with_layers(layers)


def family_of(names, **others) -> Family:
    return replace(MIXTRAL, names={**MIXTRAL.names, **names}, otherwise=(), **others)


def randomised(module: M) -> M:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def stored_in(folder, tensors) -> Checkpoint:
    """A checkpoint with those tensors of layer 0."""
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}), encoding="utf-8")
    tensors = {f"model.layers.0.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def read(family, source, spec, unit, expert=None, layer=0) -> dict[str, torch.Tensor]:
    """The tensors of a unit that the source has, as they are loaded."""
    of_layer = spec.layers[layer]
    tensors = tuple(t for t in of_layer.tensors if t.unit is unit)
    kept = tuple(t for t in tensors if _has(family, source, spec, t, layer, expert))
    flat = torch.full((sum(tensor.parameters for tensor in kept),), torch.nan)
    family.load(source, spec, kept, flat, layer, expert)
    assert not flat.isnan().any()
    return {name: dequantised(view) for name, view in views(kept, flat).items()}


def _has(family, source, spec, tensor, layer, expert) -> bool:
    (joined,) = family.joined((tensor,), spec, source.names, layer, expert)
    return joined.pieces[0].name in source.names


def test_interleaved_transposed_experts_with_biases(tmp_path):
    theirs = randomised(GptOssExperts(GptOssConfig(hidden_size=D, intermediate_size=INNER, num_local_experts=E)))
    experts = replace(EXPERTS, expert_vectors=(("w13_bias", 2 * INNER), ("w2_bias", D)))
    spec = spec_of(Layer(mixer=ATTENTION, ffn=(experts,)))
    family = family_of(
        {
            "w13": Stored(("mlp.experts.gate_up_proj",), transposed=True, rows=interleaved),
            "w2": Stored(("mlp.experts.down_proj",), transposed=True),
            "w13_bias": Stored(("mlp.experts.gate_up_proj_bias",), rows=interleaved),
            "w2_bias": "mlp.experts.down_proj_bias",
        }
    )
    x_TD = torch.randn(5, D)
    with stored_in(tmp_path, {f"mlp.experts.{name}": value for name, value in theirs.named_parameters()}) as source:
        for index in range(E):
            ours = read(family, source, spec, Unit.EXPERT, index)
            gate, up = (x_TD @ ours["w13"].T + ours["w13_bias"]).chunk(2, dim=-1)
            glu = gate.clamp(max=theirs.limit)
            inner = (up.clamp(-theirs.limit, theirs.limit) + 1) * glu * (glu * theirs.alpha).sigmoid()
            to_one = torch.full((5, 1), index)
            torch.testing.assert_close(inner @ ours["w2"].T + ours["w2_bias"], theirs(x_TD, to_one, torch.ones(5, 1)))


def _all_in_order(block, _) -> StoredRows:
    """Queries, keys, values, gate, decay and step of GatedDeltaNet, where transformers has them by key head."""
    shared = block.num_value_heads // block.num_key_heads
    values = shared * block.value_head_dim
    qkvz = grouped(block.num_key_heads, block.key_head_dim, block.key_head_dim, values, values)
    step, decay = grouped(block.num_key_heads, shared, shared).chunk(2)
    return StoredRows.of(qkvz, torch.cat([decay, step]))


DELTA_NAMES = {
    "projections": Stored(("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"), rows=_all_in_order),
    "convolution": "linear_attn.conv1d.weight",
    "decay": "linear_attn.A_log",
    "step_bias": "linear_attn.dt_bias",
    "output_norm": "linear_attn.norm.weight",
    "output": "linear_attn.out_proj.weight",
}


def test_projections_by_key_head_and_a_convolution(tmp_path):
    config = Qwen3NextConfig(
        hidden_size=D,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        num_hidden_layers=4,
    )
    theirs = randomised(Qwen3NextGatedDeltaNet(config, 0))
    family = family_of({}, kinds={GatedDeltaNet: DELTA_NAMES})
    spec = spec_of(Layer(mixer=DELTA, ffn=(EXPERTS,)))
    x_1TD = torch.randn(1, 5, D)
    with stored_in(tmp_path, {f"linear_attn.{name}": value for name, value in theirs.named_parameters()}) as source:
        ours = read(family, source, spec, Unit.MIXER)
    q, k, v, z, b, a = theirs.fix_query_key_value_ordering(theirs.in_proj_qkvz(x_1TD), theirs.in_proj_ba(x_1TD))
    wanted = torch.cat([part.flatten(2) for part in (q, k, v, z, a, b)], dim=-1)
    torch.testing.assert_close(x_1TD @ ours["projections"].T, wanted)
    assert torch.equal(ours["convolution"], theirs.conv1d.weight[:, 0])
    assert torch.equal(ours["output"], theirs.out_proj.weight)


def _gated(block, _) -> StoredRows:
    kv = in_order(block.kv_size)
    return StoredRows.of(grouped(block.num_heads, block.head_dim, block.head_dim), kv, kv)


def test_queries_with_a_gate_beside_each_head(tmp_path):
    names = ("q_proj", "k_proj", "v_proj")
    stored = dict(zip(names, (torch.randn(2 * H * HEAD, D), *torch.randn(2, G * HEAD, D)), strict=True))
    family = family_of({"qkv": Stored(tuple(f"self_attn.{name}.weight" for name in names), rows=_gated)})
    spec = spec_of(Layer(mixer=replace(ATTENTION, output_gate=True), ffn=(EXPERTS,)))
    x_TD = torch.randn(5, D)
    with stored_in(tmp_path, {f"self_attn.{name}.weight": tensor for name, tensor in stored.items()}) as source:
        qkv = read(family, source, spec, Unit.MIXER)["qkv"]
    queries, gate = torch.chunk((x_TD @ stored["q_proj"].T).view(5, -1, 2 * HEAD), 2, dim=-1)  # as transformers
    wanted = [queries.flatten(1), gate.flatten(1), x_TD @ stored["k_proj"].T, x_TD @ stored["v_proj"].T]
    torch.testing.assert_close(x_TD @ qkv.T, torch.cat(wanted, dim=1))


def _values_are_keys(block, _) -> StoredRows:
    keys = torch.arange(block.query_size, block.query_size + block.kv_size)
    return StoredRows((block.query_size, block.kv_size, 0), torch.cat([in_order(block.query_size), keys, keys]))


def test_keys_that_are_values_too_are_stored_once(tmp_path):
    q, k = torch.randn(H * HEAD, D), torch.randn(G * HEAD, D)
    names = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    family = family_of({"qkv": Stored(names, rows=_values_are_keys)})
    spec = spec_of(Layer(mixer=ATTENTION, ffn=(EXPERTS,)))
    with stored_in(tmp_path, {names[0]: q, names[1]: k}) as source:
        assert torch.equal(read(family, source, spec, Unit.MIXER)["qkv"], torch.cat([q, k, k]))
    expected = family.expected_tensors(Architecture(spec=spec, layers=()))
    assert {name: f"model.layers.0.{name}" in expected for name in names} == dict(zip(names, [1, 1, 0], strict=True))


def test_biases_are_joined_as_their_matrix_is(tmp_path):
    biases = [torch.randn(H * HEAD), torch.randn(G * HEAD), torch.randn(G * HEAD)]
    names = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
    family = family_of({"qkv_bias": names})
    spec = spec_of(Layer(mixer=ATTENTION.with_vectors(qkv_bias=(H + 2 * G) * HEAD), ffn=(EXPERTS,)))
    with stored_in(tmp_path, dict(zip(names, biases, strict=True))) as source:
        assert torch.equal(read(family, source, spec, Unit.MIXER)["qkv_bias"], torch.cat(biases))


def test_layers_of_several_kinds_are_expected_by_their_own_names():
    """A delta rule, attention, a dense FFN, one beside experts: as many parameters as the spec counts."""
    dense = {"ffn_norm": "pre_mlp_norm.weight", "dense_w13": ("mlp.gate_proj.weight", "mlp.up_proj.weight")}
    family = family_of({}, kinds={GatedDeltaNet: DELTA_NAMES, DenseFfn: {**dense, "dense_w2": "mlp.down_proj.weight"}})
    ffn = DenseFfn(hidden_size=D, intermediate_size=10)
    spec = spec_of(
        Layer(mixer=DELTA, ffn=(ffn,)), Layer(mixer=ATTENTION, ffn=(EXPERTS,)), Layer(mixer=DELTA, ffn=(ffn, EXPERTS))
    )
    expected = family.expected_tensors(Architecture(spec=spec, layers=()))
    assert sum(torch.Size(each.shape).numel() for each in expected.values()) == spec.parameters
    assert expected["model.layers.0.linear_attn.out_proj.weight"].shape == (D, 4 * 5)
    assert expected["model.layers.1.self_attn.o_proj.weight"].shape == (D, H * HEAD)
    assert "model.layers.0.post_attention_layernorm.weight" not in expected
    assert {"pre_mlp_norm.weight", "post_attention_layernorm.weight"} == {
        name.removeprefix("model.layers.2.") for name in expected if name.startswith("model.layers.2.p")
    }


def test_shared_experts_gate_is_a_matrix_of_one_row(tmp_path):
    config = Qwen3NextConfig(
        hidden_size=D, num_experts=E, moe_intermediate_size=INNER, shared_expert_intermediate_size=8
    )
    theirs = randomised(Qwen3NextSparseMoeBlock(config))
    experts = replace(EXPERTS, shared_intermediate_size=8).with_vectors(shared_gate=D)
    shared = "mlp.shared_expert"
    family = family_of(
        {
            "router": "mlp.gate.weight",
            "shared_gate": "mlp.shared_expert_gate.weight",
            "shared_w13": (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"),
            "shared_w2": f"{shared}.down_proj.weight",
        }
    )
    x_TD = torch.randn(3, D)
    with stored_in(tmp_path, {f"mlp.{name}": value for name, value in theirs.named_parameters()}) as source:
        ours = SimpleNamespace(**read(family, source, spec_of(Layer(mixer=ATTENTION, ffn=(experts,))), Unit.FFN))
    gate, up = (x_TD @ ours.shared_w13.T).chunk(2, dim=-1)
    torch.testing.assert_close((nn.functional.silu(gate) * up) @ ours.shared_w2.T, theirs.shared_expert(x_TD))
    torch.testing.assert_close(x_TD @ ours.shared_gate, theirs.shared_expert_gate(x_TD)[:, 0])


def test_several_alternatives_of_names(tmp_path):
    """Of three tools' names, those count that are there."""
    spec = spec_of(Layer(mixer=ATTENTION, ffn=(EXPERTS,)))
    family = replace(MIXTRAL, otherwise=({"router": "a.weight"}, {"router": "b.weight"}))
    for name in ("a.weight", "b.weight", MIXTRAL.names["router"]):
        router = torch.randn(E, D)
        with stored_in(tmp_path, {name: router}) as source:
            assert torch.equal(read(family, source, spec, Unit.FFN)["router"], router)


def test_corrections_keep_what_tells_experts_apart_in_few_digits(tmp_path):
    """As published: float32, large and nearly alike."""
    stored = 14 + 0.1 * torch.randn(E)
    family = family_of({"score_correction": "correction"})
    spec = spec_of(Layer(mixer=ATTENTION, ffn=(EXPERTS.with_vectors(score_correction=E),)))
    tensors = tuple(t for t in spec.layers[0].tensors if t.name == "score_correction")
    ours = {dtype: torch.empty(E, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    with stored_in(tmp_path, {"correction": stored}) as source:
        for flat in ours.values():
            family.load(source, spec, tensors, flat)
    assert torch.equal(ours[torch.float32], stored)
    apart = ours[torch.bfloat16].float() - (stored - stored.mean())
    assert apart.abs().max() < 1e-3 < (stored.bfloat16().float() - stored).abs().max()
