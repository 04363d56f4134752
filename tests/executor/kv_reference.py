"""transformers as it would be with a quantised KV cache: keys and values go through its codes, in float32."""

import sys
from typing import Any

import pytest
import torch

GREATEST = {"int8": 127, "fp8": 448, "e5m2": 57344}
FLOATS = {"fp8": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def meant(x: torch.Tensor, form: str) -> torch.Tensor:
    """What is left of numbers whose last axis shares a scale, in float32."""
    greatest = GREATEST[form]
    scale = (x.abs().amax(-1, keepdim=True) / greatest).bfloat16().float()
    codes = torch.where(scale > 0, x / scale, 0.0).clamp(-greatest, greatest)
    return scale * (codes.to(FLOATS[form]).float() if form in FLOATS else codes.round())


def quantise_as(form: str, model: Any, patched: pytest.MonkeyPatch) -> None:
    """Let transformers attend to what a cache of that form would hold."""
    model.set_attn_implementation("eager")
    modelling = sys.modules[type(model).__module__]
    attend = modelling.eager_attention_forward
    latent = hasattr(model.config, "kv_lora_rank")

    def attend_to_codes(module, query, key, value, *others, **options):
        if latent:  # the compressed vector is quantised below; of a key only its rotary end is cached as it is
            rotary = model.config.qk_rope_head_dim
            key = torch.cat([key[..., :-rotary], meant(key[..., -rotary:], form)], dim=-1)
        else:
            key, value = meant(key, form), meant(value, form)
        return attend(module, query, key, value, *others, **options)

    patched.setattr(modelling, "eager_attention_forward", attend_to_codes)
    for name, module in model.named_modules():
        if name.endswith("kv_a_layernorm"):
            whole = module.forward
            patched.setattr(module, "forward", lambda x, whole=whole: meant(whole(x), form))
