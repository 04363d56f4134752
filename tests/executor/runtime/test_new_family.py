"""The recipe for a family: its names and options, and a row for planning and one for running."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint import Checkpoint
from executor.families import FAMILIES
from executor.families.base import Family, Stored, rope_theta
from executor.model import Architecture
from hrm.model_spec.families import FAMILY_READERS
from tests.executor.runtime.support import GPU, architecture, generate, generator, make_policy, requests
from tests.executor.tiny_models import random_prompts, transformers_greedy

OTHER = Family(
    outside={"embedding": "tokens", "final_norm": "last_norm", "lm_head": "head"},
    layer="blocks.{layer}.",
    names={
        "attention_norm": "norm1",
        "qkv": "attention.in",
        "output": Stored(("attention.out",), transposed=True),
        "ffn_norm": "norm2",
        "router": "router",
        "w13": Stored(("experts.in",), transposed=True),
        "w2": Stored(("experts.out",), flat=True),
    },
    options=lambda keys, spec: Architecture(spec=spec, rope_theta=rope_theta(keys, 1.0), max_position_embeddings=256),
    published={},
)


@pytest.fixture
def renamed(tiny_folders, tmp_path, monkeypatch):
    """A Mixtral whose tensors are called, and stored, as nobody else does; its own rows are added."""
    monkeypatch.setitem(FAMILIES, "other", OTHER)
    monkeypatch.setitem(FAMILY_READERS, "other", FAMILY_READERS["mixtral"])
    folder = tiny_folders["wide heads"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "other"}), encoding="utf-8")
    t = load_file(folder / "model.safetensors")
    ours = {"tokens": t["model.embed_tokens.weight"], "last_norm": t["model.norm.weight"], "head": t["lm_head.weight"]}
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"blocks.{layer}"
        moe = f"{old}.block_sparse_moe"
        experts = [
            [t[f"{moe}.experts.{expert}.{name}.weight"] for name in ("w1", "w2", "w3")]
            for expert in range(config["num_local_experts"])
        ]
        qkv = [t[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv"]
        ours |= {
            f"{new}.norm1": t[f"{old}.input_layernorm.weight"],
            f"{new}.attention.in": torch.cat(qkv),
            f"{new}.attention.out": t[f"{old}.self_attn.o_proj.weight"].T,
            f"{new}.norm2": t[f"{old}.post_attention_layernorm.weight"],
            f"{new}.router": t[f"{moe}.gate.weight"],
            f"{new}.experts.in": torch.stack([torch.cat([w1, w3]).T for w1, _, w3 in experts]),
            f"{new}.experts.out": torch.cat([w2 for _, w2, _ in experts]),
        }
    save_file({name: tensor.contiguous() for name, tensor in ours.items()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("choices", [{}, {"attention": GPU, "resident": 3, "resident_dense": True}])
def test_a_family_of_other_names_gives_the_same_tokens(renamed, tiny_folders, choices):
    prompts = random_prompts(5, seed=1)
    with Checkpoint.open(renamed) as checkpoint:
        checkpoint.check(OTHER.expected_tensors(architecture(renamed), checkpoint.names))
    with generator(renamed, make_policy(3, **choices)) as made:
        done = generate(made, requests(prompts, max_tokens=6))
    for request, prompt in zip(requests(prompts), prompts, strict=True):
        wanted = transformers_greedy(tiny_folders["wide heads"], prompt, 6)
        assert list(done[request.name].tokens) == wanted
