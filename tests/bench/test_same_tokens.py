"""How many greedy answers change with the policy, and with the batch size of transformers.

In float32 none may; in bfloat16 sums that are added up in another order round otherwise, and where
two tokens are nearly as probable the other one is taken. Real prompts on the demo model.
"""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

import pytest
import torch

from executor.batching import Request
from executor.demo import MODEL_DIR, PROMPTS
from executor.job.tokenizer import TextTokenizer
from executor.sampling import SamplingParams
from hrm.policy import Policy
from hrm.tasks import Device
from tests.bench.machine import circumstances
from tests.executor.runtime.support import architecture, generate, generator

COUNT, NEW_TOKENS = 128, 32
Answers = Mapping[str, tuple[int, ...]]
POLICIES: dict[str, dict[str, Any]] = {
    "micro-batches of 4, attention and experts on the CPU": {
        "micro_batch_size": 4,
        "attention": Device.CPU,
        "ffn": Device.CPU,
    },
    "micro-batches of 32, attention on the CPU, experts on the GPU": {"micro_batch_size": 32, "attention": Device.CPU},
    "micro-batches of 128, all on the GPU": {"micro_batch_size": 128, "attention": Device.GPU},
}
BATCH_SIZES = (1, 32, 128)


def prompts() -> dict[str, tuple[int, ...]]:
    """Token ids of the demo's prompts by their names."""
    tokenizer = TextTokenizer.of_checkpoint(MODEL_DIR)
    assert tokenizer is not None
    with PROMPTS.open(encoding="utf-8") as lines:
        read = [json.loads(line) for line in islice(lines, COUNT)]
    return {line["custom_id"]: tokenizer.encode(line["body"]["prompt"], add_special_tokens=True) for line in read}


def ours(asked: Answers, dtype: str, choices: dict[str, Any]) -> Answers:
    """Greedy answers under a policy on the emulated GPU's CPU."""
    spec = architecture(MODEL_DIR).spec
    longest = max(map(len, asked.values()))
    policy = Policy(
        batch_size=COUNT,
        resident_experts=(1,) * spec.num_layers,
        dtype=dtype,
        kv_tokens_per_micro_batch=choices["micro_batch_size"] * (-(-longest // 16) * 16 + 48),
        prefill_chunk_tokens=256,
        **choices,
    )
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    wanted = [Request(name, prompt, params) for name, prompt in asked.items()]
    with generator(MODEL_DIR, policy) as made:
        return {name: done.tokens for name, done in generate(made, wanted).items()}


def theirs(asked: Answers, dtype: str, batch_size: int) -> Answers:
    """Greedy answers of transformers, prompts padded on the left."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=getattr(torch, dtype)).eval()
    end = model.generation_config.eos_token_id
    done: dict[str, tuple[int, ...]] = {}
    names = list(asked)
    for first in range(0, len(names), batch_size):
        some = names[first : first + batch_size]
        longest = max(len(asked[name]) for name in some)
        rows = [[0] * (longest - len(asked[name])) + list(asked[name]) for name in some]
        mask = [[0] * (longest - len(asked[n])) + [1] * len(asked[n]) for n in some]
        with torch.inference_mode():
            out = model.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        for name, row in zip(some, out[:, longest:].tolist(), strict=True):
            done[name] = tuple(row[: row.index(end) + 1] if end in row else row)
    return done


def differing(answers: Answers, reference: Answers) -> int:
    """How many requests have another answer."""
    return sum(answers[name] != tokens for name, tokens in reference.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_tokens(dtype: str) -> None:
    asked = prompts()
    print(f"\n{dtype}: {COUNT} prompts, {NEW_TOKENS} tokens each, greedy\n  {circumstances()}")
    reference = theirs(asked, dtype, 1)
    print("  answers unlike those of transformers one by one")
    for batch_size in BATCH_SIZES[1:]:
        count = differing(theirs(asked, dtype, batch_size), reference)
        print(f"  {count:>5}  transformers in batches of {batch_size}")
    under = {name: ours(asked, dtype, choices) for name, choices in POLICIES.items()}
    for name, answers in under.items():
        print(f"  {differing(answers, reference):>5}  ours, {name}")
    first, *others = under.values()
    spread = max(differing(answers, first) for answers in others)
    print(f"  at most {spread} answers differ between the first of our policies and another")
    if dtype == "float32":
        assert all(differing(answers, reference) == 0 for answers in under.values())
