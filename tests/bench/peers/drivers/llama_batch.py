"""llama.cpp: all requests of a row as sequences of one context, in bfloat16 out of a GGUF written once."""
# pyright: reportMissingImports=false

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.peers.drivers.turn import Engine, Job, Tokens, take_turn

BATCH_TOKENS = 2048  # handed over at once
MICRO_BATCH_TOKENS = 1024  # computed at once
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
EXPERT_NAMES = {
    "ffn_gate_exps": ("block_sparse_moe.experts.{}.w1", "mlp.experts.{}.gate_proj"),
    "ffn_up_exps": ("block_sparse_moe.experts.{}.w3", "mlp.experts.{}.up_proj"),
    "ffn_down_exps": ("block_sparse_moe.experts.{}.w2", "mlp.experts.{}.down_proj"),
}


class LlamaCpp(Engine):
    """Driven by its batches, as the Python wrapper takes one request at a time."""

    packages = ("llama-cpp-python",)

    def __init__(self, job: Job) -> None:
        import llama_cpp

        file = Path(job.kept) / "model.gguf"
        if not file.is_file():
            partial = file.with_suffix(".partial")
            write_gguf(Path(job.checkpoint), partial)
            partial.rename(file)
        llama_cpp.llama_backend_init()
        self._api: Any = llama_cpp
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = job.most_requests * job.longest
        options.n_batch, options.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
        options.n_seq_max = job.most_requests
        options.kv_unified = False
        options.n_threads = options.n_threads_batch = len(job.cpus)
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._model or not self._context:
            raise SystemExit("llama.cpp does not load the model")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """Whole prompts in batches of so many tokens, then a token of every request a step."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        length = len(prompts[0])
        answers: Tokens = [[] for _ in prompts]
        at_once = max(1, BATCH_TOKENS // length)
        for first in range(0, len(prompts), at_once):
            some = range(first, min(first + at_once, len(prompts)))
            entries = [(prompts[index][at], at, index) for index in some for at in range(length)]
            for index, token in self._decode(entries, length):
                answers[index].append(token)
        for step in range(new_tokens - 1):
            entries = [(answer[-1], length + step, index) for index, answer in enumerate(answers)]
            for index, token in self._decode(entries, length + step + 1):
                answers[index].append(token)
        return answers

    def _decode(self, entries: list[tuple[int, int, int]], length: int) -> list[tuple[int, int]]:
        """The next token of every request whose last position, the one before `length`, is in the batch."""
        import numpy as np

        api = self._api
        batch = api.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for row, (token, position, request) in enumerate(entries):
                batch.token[row], batch.pos[row] = token, position
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, request
                batch.logits[row] = position == length - 1
            if api.llama_decode(self._context, batch):
                raise SystemExit("llama_decode failed")
            asked = [(row, request) for row, (_, position, request) in enumerate(entries) if position == length - 1]
            return [
                (
                    request,
                    int(
                        np.ctypeslib.as_array(
                            api.llama_get_logits_ith(self._context, row), (self._vocab_size,)
                        ).argmax()
                    ),
                )
                for row, request in asked
            ]
        finally:
            api.llama_batch_free(batch)


def write_gguf(checkpoint: Path, file: Path) -> None:
    """The checkpoint as a GGUF of bfloat16 matrices and float32 norms and routers."""
    from gguf import GGUFWriter

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    arch = ARCHITECTURES[config["model_type"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, arch)
    expert_size = config.get("moe_intermediate_size", config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(expert_size)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in _tensors(checkpoint, config, arch):
        _add(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, tensor: Any) -> None:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType

    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, tensor.float().numpy())
    else:
        raw = tensor.contiguous().view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)


def _tensors(checkpoint: Path, config: dict[str, Any], arch: str) -> Iterator[tuple[str, Any]]:
    """GGUF names and tensors; those of all experts of a layer are stacked."""
    import torch
    from safetensors.torch import load_file

    stored = {
        name: tensor for file in sorted(checkpoint.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    for name, to in OUTER_NAMES.items():
        yield f"{to}.weight", stored[f"{name}.weight"]
    experts = config.get("num_local_experts") or config["num_experts"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, to in LAYER_NAMES.items():
            tensor = stored.get(f"{prefix}{name}.weight")
            if tensor is None:
                continue
            if arch == "llama" and to in {"attn_q", "attn_k"}:
                tensor = _rotated_in_pairs(tensor, config["head_dim"])
            yield f"blk.{layer}.{to}.weight", tensor
        for to, patterns in EXPERT_NAMES.items():
            pattern = next(pattern for pattern in patterns if f"{prefix}{pattern.format(0)}.weight" in stored)
            matrices = [stored[f"{prefix}{pattern.format(expert)}.weight"] for expert in range(experts)]
            yield f"blk.{layer}.{to}.weight", torch.stack(matrices)


def _rotated_in_pairs(tensor: Any, head_dim: int) -> Any:
    """Rows in the order in which this architecture rotates: neighbours, where ours are half a head apart."""
    return tensor.view(-1, 2, head_dim // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


if __name__ == "__main__":
    take_turn(LlamaCpp)
