"""Checkpoints as they are published, quantised, give the tokens of transformers with the weights that they mean.

A tiny model is packed matrix by matrix, and transformers is given what the packers say that is read back.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint import Checkpoint
from executor.families import family_for
from hrm.policy import ScheduleName
from tests.executor.families.latent import SIZES as LATENT_SIZES
from tests.executor.families.tiny import WEIGHTS, Tensors, Tiny, causal, save
from tests.executor.formats.published import PUBLISHED, Parts, mxfp4_stack
from tests.executor.runtime.support import CPU, GPU, architecture, generate, generator, make_policy, requests
from tests.executor.tiny_models import random_prompts

MAX_TOKENS, NUM_PROMPTS = 4, 6
METHODS: Final = ("int4 with zeros", "gptq in order", "awq", "nvfp4", "int8")  # one of each kind of parts
WIDE: Final[dict[str, Any]] = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
QWEN: Final = causal(
    "qwen3_moe", **WIDE, norm_topk_prob=True, num_experts=4, num_experts_per_tok=2, intermediate_size=32, head_dim=16
)
DEEPSEEK: Final = causal(
    "deepseek_v3",
    **{**LATENT_SIZES, **WIDE, "q_lora_rank": 32, "qk_nope_head_dim": 8, "n_group": 2, "intermediate_size": 48},
)
GPT_OSS: Final = causal(
    "gpt_oss",
    **{**WIDE, "intermediate_size": 32},
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"],
)
POLICIES: Final[dict[str, dict[str, Any]]] = {
    "experts streamed": {"attention": CPU, "resident": 1},
    "experts on the cpu": {"attention": CPU, "ffn": CPU, "schedule": ScheduleName.FLEXGEN},
    "all streamed": {"attention": GPU, "schedule": ScheduleName.DEEPSPEED, "resident_dense": False},
    "all resident": {"attention": GPU, "resident": 4},
}


def matrices(names: Tensors) -> Iterator[str]:
    """The modules that tools quantise: linear layers that are no routers."""
    for name, tensor in names.items():
        if name.startswith("model.layers.") and name.endswith("_proj.weight") and tensor.ndim == 2:
            yield name.removesuffix(".weight")
        if name.endswith("kv_a_proj_with_mqa.weight"):
            yield name.removesuffix(".weight")


def experts(names: Tensors) -> Iterator[str]:
    """The tensors of gpt-oss that have all experts of a layer."""
    return (name for name in names if name.endswith(("experts.gate_up_proj", "experts.down_proj")))


@dataclass(frozen=True)
class Case:
    """A model, its matrices that are packed, and how."""

    make: Callable[[], Any]
    modules: Callable[[Tensors], Iterator[str]]
    pack: Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
    config: Any


CASES: Final = {
    "gpt-oss in mxfp4": Case(
        GPT_OSS, experts, mxfp4_stack, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    ),
    "deepseek in fp8": Case(DEEPSEEK, matrices, PUBLISHED["fp8 in blocks"].pack, PUBLISHED["fp8 in blocks"].config),
    **{f"qwen in {name}": Case(QWEN, matrices, PUBLISHED[name].pack, PUBLISHED[name].config) for name in METHODS},
}


def packed(case: Case, folder: Path) -> Tiny:
    """The checkpoint in `folder`, and the model of what it means."""
    tiny = save(case.make, folder)
    stored, meant = load_file(folder / WEIGHTS), {}
    for module in [*case.modules(stored)]:
        name = module if module in stored else f"{module}.weight"
        parts, meant[name] = case.pack(stored.pop(name))
        stored.update({module + end: part.contiguous() for end, part in parts.items()})
    plain = folder / "plain"
    tiny.model.save_pretrained(plain)
    save_file({**load_file(plain / WEIGHTS), **meant}, plain / WEIGHTS, metadata={"format": "pt"})
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": case.config}))
    return Tiny(type(tiny.model).from_pretrained(plain).float().eval(), folder)


@pytest.fixture(scope="module", params=CASES)
def tiny(request: Any, tmp_path_factory: Any) -> Tiny:
    return packed(CASES[request.param], tmp_path_factory.mktemp("quantised") / "model")


def greedy_tokens(tiny: Tiny, prompts: Any, **choices: Any) -> Any:
    layers = architecture(tiny.folder).spec.layers
    most = choices.pop("resident", 0)
    resident = tuple(min(most, layer.num_experts) for layer in layers)
    policy = make_policy(len(layers), batch_size=NUM_PROMPTS, resident_experts=resident, **choices)
    with generator(tiny.folder, policy) as made:
        done = generate(made, requests(prompts, max_tokens=MAX_TOKENS, ignore_eos=True))
    return [done[f"request-{i}"].tokens for i in range(NUM_PROMPTS)]


def test_tokens_are_those_of_the_weights_that_are_meant(tiny: Tiny) -> None:
    with Checkpoint.open(tiny.folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
    assert all("w13" in dict(layer.packed) for layer in arch.spec.layers if layer.num_experts)
    prompts = random_prompts(NUM_PROMPTS, vocab=tiny.vocab_size)
    expected = tiny.greedy(prompts, MAX_TOKENS)
    for name, choices in POLICIES.items():
        assert greedy_tokens(tiny, prompts, **dict(choices)) == expected, name
