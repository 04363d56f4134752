"""What a quantised KV cache costs the demo model: its perplexity on the demo's prompts, format by format.

The prompts are of text that the model was not trained on. It is computed in float32 by transformers with keys and
values that go through each format; the parity tests say that the executor's are the same.
"""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from executor.demo import MODEL_DIR, PROMPTS
from executor.job.tokenizer import TextTokenizer
from hrm.formats import Formats
from hrm.model_spec import load_model
from tests.executor.kv_reference import quantise_as

FORMATS = ("bfloat16", "fp8", "int8")


def texts() -> list[torch.Tensor]:
    """The demo's prompts in its tokens."""
    tokenizer = TextTokenizer.of_checkpoint(MODEL_DIR)
    assert tokenizer is not None
    with PROMPTS.open(encoding="utf-8") as lines:
        asked = [json.loads(line)["body"]["prompt"] for line in lines]
    return [torch.tensor([tokenizer.encode(text, add_special_tokens=True)]) for text in asked]


@torch.inference_mode()
def nats_of_a_token(model, asked: list[torch.Tensor]) -> float:
    """The mean over all tokens but each text's first."""
    nats = [cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none") for tokens in asked]
    return torch.cat(nats).mean().item()


@pytest.mark.slow
def test_perplexity_of_the_demo_model():
    from transformers import MixtralForCausalLM

    asked, spec = texts(), load_model(str(MODEL_DIR))
    model = MixtralForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    print(f"\nperplexity of {sum(tokens.shape[1] - 1 for tokens in asked)} tokens in {len(asked)} prompts")
    found: dict[str, float] = {}
    for form in FORMATS:
        with pytest.MonkeyPatch.context() as patched:
            quantise_as(form, model, patched)
            found[form] = math.exp(nats_of_a_token(model, asked))
        size = spec.kv_bytes_per_token(Formats.named("bfloat16", kv_cache=form))
        change = found[form] / found["bfloat16"] - 1
        print(f"  {form:9}{size:6} bytes a token{found[form]:10.4f}  {change:+.2%}")
    assert all(abs(value / found["bfloat16"] - 1) < 0.05 for value in found.values())
