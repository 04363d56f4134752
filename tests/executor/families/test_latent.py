"""Forms in which published models of latent attention come, and what of their configs is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint import Checkpoint
from executor.checks import check_request
from executor.errors import JobError
from executor.families import family_for
from hrm.errors import ModelError
from tests.executor.families.latent import LATENT
from tests.executor.families.tiny import save
from tests.executor.runtime.support import CPU, GPU, architecture, generate, generator, make_policy, requests
from tests.executor.tiny_models import edit_json, random_prompts

PROMPTS = random_prompts(3)
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    return save(LATENT["kimi_k2"], tmp_path_factory.mktemp("latent") / "kimi")


@pytest.fixture(scope="module")
def expected(kimi):
    return {f"request-{i}": tokens for i, tokens in enumerate(kimi.greedy(PROMPTS, 3))}


def tokens_of(folder):
    arch = architecture(folder)
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
    policy = make_policy(arch.spec.num_layers)
    with generator(folder, policy) as made:
        done = generate(made, requests(PROMPTS, max_tokens=3, ignore_eos=True))
    return {name: completion.tokens for name, completion in done.items()}


def test_all_experts_of_a_layer_in_two_tensors(kimi, expected, tmp_path):
    """As transformers 5 has them in memory; by default it saves each on its own."""
    kimi.model.save_pretrained(tmp_path, save_original_format=False)
    edit_json(tmp_path / "config.json", model_type="kimi_k2")
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    assert tokens_of(tmp_path) == expected


def test_the_text_part_of_a_multimodal_model(kimi, expected, tmp_path):
    """As Kimi-K2.5 has it; the ids that end a text are those of generation_config.json."""
    folder = tmp_path / "kimi_k25"
    shutil.copytree(kimi.folder, folder)
    weights = {f"language_model.{name}": part for name, part in load_file(folder / "model.safetensors").items()}
    weights |= {
        name: torch.zeros(3, 3) for name in ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.bias")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "kimi_k25", "text_config": text, "eos_token_id": 5, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(outer))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert architecture(folder).eos_token_ids == (7, 8)
    assert tokens_of(folder) == expected


def test_layers_that_predict_further_ahead_are_not_needed(kimi, expected, tmp_path):
    folder = tmp_path / "ahead"
    shutil.copytree(kimi.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.3.{name}.weight": torch.zeros(2, 2) for name in ("eh_proj", "self_attn.o_proj")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert tokens_of(folder) == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_group": 3}, "n_group is 3: must divide the 16 experts"),
        ({"n_group": 16, "topk_group": 8}, "n_group is 16: must divide the 16 experts into groups of 2 or more"),
        ({"n_group": 4, "topk_group": 5}, "topk_group is 5: must be at most the 4 groups"),
        ({"num_experts_per_tok": 5, "n_group": 4, "topk_group": 1}, "topk_group is 1: .* leave 5 experts"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax': must be sigmoid"),
        ({"qk_rope_head_dim": 7}, "must leave an even number of each head's 7 elements"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob is True: must be false"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method is 'noaux_tc': must be greedy"),
    ],
)
def test_configs_that_ask_for_what_we_lack(changes, named):
    config = {**CONFIG, **changes}
    with pytest.raises(ModelError, match=named):
        family_for(config, "config.json").architecture(config, "config.json")


@pytest.mark.parametrize("place", [{"attention": GPU}, {"attention": CPU}, {"gpu_kv_micro_batches": 4}])
def test_prompts_that_are_split_need_the_prefix_buffer_wherever_the_cache_is(kimi, place):
    """Since the cache has no keys and values."""
    arch = architecture(kimi.folder)
    policy = make_policy(arch.spec.num_layers, prefill_chunk_tokens=8, prefix_buffer_tokens=20, **place)
    (longest, longer) = requests([[3] * 20, [3] * 21], max_tokens=2)
    check_request(longest, arch, policy)
    with pytest.raises(JobError, match="must have at most the 20 tokens that the policy prefills"):
        check_request(longer, arch, policy)
