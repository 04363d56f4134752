"""Tiny random models of a family, written by transformers, and what transformers makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
WEIGHTS: Final = "model.safetensors"
VOCAB: Final = 97
SIZES: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
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
    def log_probabilities(self, tokens: list[int]) -> torch.Tensor:
        """Of each token (V) after those, in float32."""
        return self.model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)

    def greedy(self, prompt: list[int], count: int) -> tuple[int, ...]:
        """The most probable continuation; the whole text is computed anew for each token."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.log_probabilities(tokens).argmax()))
        return tuple(tokens[len(prompt) :])


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
