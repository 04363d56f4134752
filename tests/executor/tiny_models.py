"""Random tiny checkpoints, written by transformers, and what transformers makes of them."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from executor.model import Architecture, FeedForward, GroupedQuery, LayerMaths, Norm, NormKind, Rotary, Router
from hrm.layers import GroupedQueryAttention, Layer
from hrm.model_spec import Dimensions

MIXTRALS: Final[dict[str, dict[str, Any]]] = {
    "wide heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    "one kv head, one expert": {"num_key_value_heads": 1, "num_experts_per_tok": 1},
    "all experts": {"num_key_value_heads": 4, "num_experts_per_tok": 8},
    "tied": {"tie_word_embeddings": True, "num_local_experts": 5, "num_experts_per_tok": 3},
}
DBRX = "dbrx"
MODELS: Final = (*MIXTRALS, DBRX)


def save_tiny(name: str, folder: Path, *, seed: int = 0, num_layers: int = 3, **how: Any) -> Path:
    """Write the checkpoint of one of MODELS, float32, into `folder` and return it.

    `how` goes to `save_pretrained`.
    """
    from transformers import DbrxConfig, DbrxForCausalLM, MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    common: dict[str, Any] = {
        "vocab_size": 97,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        "rope_parameters": rope,
    }
    if name == DBRX:
        model = DbrxForCausalLM(
            DbrxConfig(
                d_model=32,
                n_heads=4,
                n_layers=num_layers,
                max_seq_len=256,
                **common,
                attn_config={"clip_qkv": 0.7, "kv_n_heads": 2, "rope_theta": 10_000.0},
                ffn_config={
                    "ffn_hidden_size": 24,
                    "moe_num_experts": 6,
                    "moe_top_k": 3,
                    "moe_normalize_expert_weights": 2.0,
                },
            )
        )
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 256,
        }
        model = MixtralForCausalLM(MixtralConfig(**{**common, **sizes, **MIXTRALS[name]}))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:  # norms other than ones
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **how)
    return folder


def poisoned_copy(folder: Path, copy: Path, token: int, value: float) -> Path:
    """Write a copy of a Mixtral checkpoint, in which a token's embedding is of that value alone."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@cache
def transformers_model(folder: Path) -> Any:
    """The checkpoint as transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def transformers_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) that transformers gives for one prompt."""
    with torch.inference_mode():
        return transformers_model(folder)(torch.tensor([tokens])).logits[0].clone()


def transformers_greedy(folder: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """The greedy continuation that transformers gives for one prompt, with its end of sequence."""
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        out = transformers_model(folder).generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


def random_prompts(count: int, *, longest: int = 40, vocab: int = 97, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths from 1 to `longest`, without end-of-sequence tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in place; None removes a key."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def tiny_arch(
    kind: NormKind = NormKind.RMS,
    *,
    router: Router | None = None,
    clip: float | None = None,
    rope_theta: float = 10_000.0,
    **changes: Any,
) -> Architecture:
    """An architecture of tiny dimensions, changed as asked (fields of it or of `Dimensions`)."""
    norm = Norm(kind=kind)

    def maths(layer: Layer) -> LayerMaths:
        block = layer.mixer
        assert isinstance(block, GroupedQueryAttention)
        rotary = Rotary.plain(block.head_dim, rope_theta)
        return LayerMaths(
            mixer=GroupedQuery(block=block, norm=norm, rotary=rotary, clip=clip),
            ffn=FeedForward(norm=norm, router=router or Router(), experts_per_token=layer.experts[0].experts_per_token),
        )

    sizes: dict[str, Any] = {
        "name": "tiny",
        "family": "mixtral",
        "num_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "experts_per_token": 2,
        "vocab_size": 50,
    }
    of_spec = {key: changes.pop(key) for key in list(changes) if key in sizes}
    return Architecture.of(Dimensions(**{**sizes, **of_spec}).spec, maths, final_norm=norm, **changes)
