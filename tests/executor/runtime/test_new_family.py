"""The recipe for a family: its names and options, and a row for planning and one for running."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.backends import make_backend
from executor.checkpoint import Checkpoint
from executor.families import FAMILIES
from executor.families.base import Family
from executor.families.mixtral import MIXTRAL
from executor.families.stored import Stored
from executor.generate import Generator, Planned, Prepared
from executor.model import Architecture
from executor.random_weights import RandomWeights
from executor.weight_pages import StoredWeights
from hrm.cli import main as run_hrm
from hrm.contract.families import EXECUTED_FAMILIES
from hrm.layers import DenseFfn
from hrm.memory import plan_memory
from hrm.model_spec.families import FAMILY_READERS
from hrm.policy import ScheduleName
from tests.executor import reference
from tests.executor.runtime.support import CPU, GPU, architecture, generate, generator, machine, make_policy, requests
from tests.executor.tiny_models import random_prompts, tiny_arch, transformers_greedy

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
    options=MIXTRAL.options,
    published={},
)

MIXED = replace(
    MIXTRAL, names={**MIXTRAL.names, "dense_w13": ("mlp.gate.weight", "mlp.up.weight"), "dense_w2": "mlp.down.weight"}
)


@pytest.fixture
def renamed(tiny_folders, tmp_path, monkeypatch):
    """A Mixtral whose tensors are called, and stored, as nobody else does; its own rows are added."""
    monkeypatch.setitem(FAMILIES, "other", OTHER)
    monkeypatch.setitem(FAMILY_READERS, "other", FAMILY_READERS["mixtral"])
    EXECUTED_FAMILIES.append("other")
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
    yield tmp_path
    EXECUTED_FAMILIES.remove("other")


def test_the_planner_says_that_it_is_run(renamed, capsys):
    run_hrm(["models", str(renamed)])
    assert "with executor run" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"resident": (0, 3, 0, 4), "staging": True},
        {"attention": GPU, "ffn": CPU, "resident_dense": True, "resident": (0, 2, 0, 8)},
        {"attention": GPU, "gpu_kv_micro_batches": 2, "resident_dense": True, "resident": (0, 8, 0, 8)},
    ],
)
@pytest.mark.parametrize("schedule", [ScheduleName.CGOPIPE, ScheduleName.FLEXGEN])
def test_layers_of_two_kinds_give_the_tokens_of_the_reference(choices, schedule):
    """One FFN where others have experts, in the first layer and in the middle."""
    arch = tiny_arch(num_layers=4, hidden_size=32, num_experts=8, vocab_size=97, max_position_embeddings=256)
    ffn = DenseFfn(hidden_size=32, intermediate_size=56)
    layers = [replace(layer, ffn=(ffn,)) if index in {0, 2} else layer for index, layer in enumerate(arch.spec.layers)]
    (maths,) = set(arch.layers)
    arch = Architecture.of(
        arch.spec.with_layers(layers), lambda _: maths, max_position_embeddings=256, eos_token_ids=(2,)
    )
    policy = make_policy(4, schedule=schedule, **{k: v for k, v in choices.items() if k != "resident"})
    policy = replace(policy, resident_experts=choices.get("resident", (0,) * 4))
    plan = Planned(policy, plan_memory(arch.spec, policy, machine()))
    prompts = random_prompts(7, seed=2)
    backend = make_backend("cpu", None)
    with Generator(Prepared(backend, plan), arch, StoredWeights(RandomWeights(3), MIXED)) as made:
        done = generate(made, requests(prompts, max_tokens=5))
    model = reference.load(MIXED, RandomWeights(3), arch)
    for request, prompt in zip(requests(prompts), prompts, strict=True):
        assert list(done[request.name].tokens) == reference.greedy(model, prompt, 5)
