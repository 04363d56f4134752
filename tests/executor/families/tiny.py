"""Tiny random models of a family, written by transformers, and what transformers makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
WEIGHTS: Final = "model.safetensors"
VOCAB: Final = 97
FILLER: Final = 3  # behind texts shorter than others; no token of padding, of which transformers warns
SIZES: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,  # more where layers are of several kinds; runtime/test_parity.py has more of one kind
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def causal(model_type: str, **keys: Any) -> Callable[[], Any]:
    """A maker of the model that transformers has for a config with these keys beside SIZES."""

    def make() -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **keys}))

    return make


@dataclass
class Tiny:
    """A saved model and its folder."""

    model: Any
    folder: Path

    @cached_property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @torch.inference_mode()
    def log_probabilities(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """Of each token after each of the texts (T, V), in float32.

        All are computed at once: what follows a text's end changes nothing before it.
        """
        longest = max(map(len, texts))
        rows = torch.tensor([text + [FILLER] * (longest - len(text)) for text in texts])
        logits = self.model(input_ids=rows).logits
        return torch.stack([row[len(text) - 1] for row, text in zip(logits, texts, strict=True)]).log_softmax(-1)

    def greedy(self, prompts: Sequence[list[int]], count: int) -> list[tuple[int, ...]]:
        """The most probable continuations; whole texts are computed anew for each token."""
        texts = list(prompts)
        for _ in range(count):
            chosen = self.log_probabilities(texts).argmax(-1).tolist()
            texts = [[*text, token] for text, token in zip(texts, chosen, strict=True)]
        return [tuple(text[len(prompt) :]) for text, prompt in zip(texts, prompts, strict=True)]


def save(make: Callable[[], Any], folder: Path, stored: Callable[[Tensors], Tensors] | None = None) -> Tiny:
    """Make a model, with norms, biases and corrections away from their defaults, and save it in float32.

    `stored` makes of what transformers saves what was published before.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = make().float().eval()
    corrections = [tensor for name, tensor in model.named_buffers() if "correction" in name]
    scales = [tensor for name, tensor in model.named_buffers() if "layer_scalar" in name]
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.squeeze().ndim == 1:  # norms are around one, and all other vectors around nought
                tensor.uniform_(-0.5, 0.5)
                tensor.add_("norm" in name and name.endswith("weight"))
        for tensor in corrections:
            tensor.uniform_(-0.5, 0.5)
        for tensor in scales:
            tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    if stored is not None:
        save_file(stored(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return Tiny(model, folder)
