"""The readers of the executor: requests, outputs, tokenizers, templates and checkpoints."""

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pytest
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import quantize
from pyarrow import parquet
from safetensors.torch import save

from executor.batching import Completion, Request
from executor.checkpoint import Checkpoint
from executor.errors import JobError
from executor.families import family_for
from executor.guard import told_as
from executor.job.chat import TEMPLATE_FOLDER, ChatTemplate
from executor.job.identity import JOB_JSON, Identity
from executor.job.input_file import check_input
from executor.job.outputs import RunDirectory, rejected_line, text_of
from executor.job.requests import LineReader, Rejected
from executor.job.room import AnswerRoom
from executor.job.sampling_defaults import SamplingDefaults
from executor.model import crossings
from tests.executor.formats.published import PUBLISHED
from tests.fuzz.mutations import as_json, as_lines
from tests.fuzz.targets import Target, written
from tests.fuzz.targets_hrm import check_message, gguf_of, use_quantisation

TEMPLATE: Final = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% set ns = namespace(x='a') %}{% for i in range(3) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    "{% macro f(x) %}{{ x + 'b' * 3 }}{% endmacro %}{{ f(ns.x) | upper | replace('A', 'c') }}"
    "{% if not messages %}{{ raise_exception('no message') }}{% endif %}"
    "{{ messages | tojson }}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES: Final = [{"role": "user", "content": "Who's <b>é?"}, {"role": "assistant", "content": ""}]
PARTS: Final = [{"role": "user", "content": [{"type": "text", "text": "Who?"}, "and why"], "reasoning": "so"}]
ROOM: Final = AnswerRoom(share_tokens=64, gen_len=8, most_tokens=64)
CONFIG: Final = {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}

ADDED: Final = {"add_bos_token": True, "legacy": False, "added_tokens_decoder": {"9": {"content": "<x>"}}}


# -- tokenizers and templates -----------------------------------------------------------------


def some_tokenizers() -> list[Any]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "h": 3, "i": 4, "hi": 5, "user": 6, " ": 7, "▁": 8}
    made = [
        Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        Tokenizer(models.BPE(words, [("h", "i")], unk_token="<unk>")),
        Tokenizer(models.Unigram([(word, -float(i)) for word, i in words.items()], 0)),
        Tokenizer(models.WordPiece(words, unk_token="<unk>")),
    ]
    made[0].pre_tokenizer = pre_tokenizers.Whitespace()
    made[1].pre_tokenizer = pre_tokenizers.ByteLevel()
    made[1].decoder = decoders.ByteLevel()
    made[2].pre_tokenizer = pre_tokenizers.Metaspace()
    made[2].normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    made[3].post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    for tokenizer in made:
        tokenizer.add_special_tokens(["<s>", "</s>"])
    made[0].enable_truncation(4)
    made[0].enable_padding()
    return [json.loads(tokenizer.to_str()) for tokenizer in made]


def a_line(prompt: Any, **body: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}


def a_conversation(**body: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 4, **body}
    return {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": body}


def read_all(folder: Path, path: Path) -> Iterator[Request | Rejected]:
    """What a job makes of a file of requests, with the tokenizer and template of the folder."""
    check_input(path)
    reader = LineReader(folder, ROOM, 0, tell=lambda _: None)
    tokenizer = reader.tokenizer
    for item in reader.read(path):
        if isinstance(item, Rejected):
            check_message(JobError("line", "<rejected>", item.message, ""))
            json.dumps(rejected_line(item))
        elif tokenizer is not None and all(0 <= token < 2**31 for token in item.prompt):
            # A job refuses other ids before, and tells a failure as that of the one request.
            with told_as(JobError, "text", "must be one", ""):
                tokenizer.has_stopped(item.prompt[:-1], item.prompt[-1:], item.params.stop)
                text_of(Completion(item, item.prompt, "stop"), tokenizer, frozenset({2}))
        yield item


def use_tokenizer(content: bytes, folder: Path) -> None:
    copy_checkpoint(folder)
    written(folder, "tokenizer.json", content)
    lines = [a_line(text, stop=["hi"]) for text in ("", "hi user", "é\n" * 50, " " * 1000)]
    list(read_all(folder, written(folder, "prompts.jsonl", as_lines(lines))))


def a_sentencepiece() -> bytes:
    """A model of SentencePiece, byte by byte: some pieces of each kind, and what is done with spaces."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("h", 1), ("i", 1), ("hi", 1), ("▁", 1), ("<0x0A>", 6), ("[u]", 4)]
    written_pieces = [
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -float(index)) + bytes([3 << 3, kind]))
        for index, (text, kind) in enumerate(pieces)
    ]
    trainer = bytes([3 << 3, 2]) + b"\x98\x02\x01"  # BPE, bytes for what is unknown
    return b"".join([*written_pieces, field(2, trainer), field(3, bytes([3 << 3, 1, 4 << 3, 0]))])


def use_sentencepiece(content: bytes, folder: Path) -> None:
    copy_checkpoint(folder)
    written(folder, "tokenizer.model", content)
    lines = [a_line(text, stop=["hi"]) for text in ("", "hi [u]user", "é\n" * 50, " " * 1000)]
    list(read_all(folder, written(folder, "prompts.jsonl", as_lines(lines))))


def use_added_tokens(content: bytes, folder: Path) -> None:
    written(folder, "tokenizer_config.json", content)
    use_sentencepiece(a_sentencepiece(), folder)


def use_template(content: bytes, folder: Path) -> None:
    written(folder, "chat_template.jinja", content)
    _render(folder)


def use_named_template(content: bytes, folder: Path) -> None:
    written(folder, f"{TEMPLATE_FOLDER}/default.jinja", content)
    _render(folder)


def use_special_tokens(content: bytes, folder: Path) -> None:
    written(folder, "tokenizer_config.json", as_json(CONFIG))
    written(folder, "special_tokens_map.json", content)
    _render(folder)


def use_tokenizer_config(content: bytes, folder: Path) -> None:
    written(folder, "tokenizer_config.json", content)
    _render(folder)


def _render(folder: Path) -> None:
    template = ChatTemplate.of_checkpoint(folder)
    if template is not None:
        with suppress(JobError):
            template.render([])
        template.render(MESSAGES)
        template.render(PARTS, {"documents": [{"title": "a"}], "x": 1})


# -- requests and outputs ---------------------------------------------------------------------


def some_requests() -> list[Any]:
    return [
        [a_line("hi user"), a_conversation(), a_line([3, 4, 5], stop_token_ids=[2])],
        [
            a_line("hi", top_p=0.9, temperature=0.7, seed=3, stop=["a", "b"], ignore_eos=True),
            a_conversation(max_completion_tokens=8, stop="x", n=1, stream=False, logprobs=None),
        ],
    ]


def use_requests(content: bytes, folder: Path) -> None:
    copy_checkpoint(folder)
    written(folder, "tokenizer.json", as_json(some_tokenizers()[2]))
    written(folder, "tokenizer_config.json", as_json(CONFIG))
    list(read_all(folder, written(folder, "prompts.jsonl", content)))


def some_rows() -> list[bytes]:
    """Requests in parquet: columns of a body, and bodies."""
    bodies = [{"prompt": "hi user", "max_tokens": 4}, {"prompt": None, "max_tokens": 2}]
    tables = (
        {"custom_id": ["a", "b"], "messages": [MESSAGES, MESSAGES[:1]], "max_tokens": [4, None]},
        {"custom_id": ["a", "b"], "body": bodies},
        {"custom_id": ["a", "b"], "body": [json.dumps(body) for body in bodies]},
    )
    made: list[bytes] = []
    for columns in tables:
        file = BytesIO()
        parquet.write_table(pa.table(columns), file)
        made.append(file.getvalue())
    return made


def some_outputs() -> list[Any]:
    done = {
        "id": "batch_req_a",
        "custom_id": "a",
        "error": None,
        "response": {"status_code": 200, "request_id": "req_a", "body": {"choices": []}},
    }
    return [[done, {**done, "custom_id": "b"}, rejected_line(Rejected("c", "is none"))]]


def use_resume(content: bytes, folder: Path) -> None:
    path = written(folder, "run/outputs.jsonl", content)
    with RunDirectory(path.parent, resume=True) as directory:
        assert all(isinstance(name, str) for name in directory.answered)
        directory.begin()
        directory.append(rejected_line(Rejected("d", "is none")))
        directory.sync()
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["custom_id"] for line in lines] == [*directory.answered, "d"]
    assert lines[-1].endswith(b"\n")


def use_job(content: bytes, folder: Path) -> None:
    begun = Identity.read(written(folder, JOB_JSON, content))
    assert begun is not None
    replace(begun, seed=begun.seed).check(begun, folder)
    assert Identity.read(written(folder, JOB_JSON, begun.json())) == begun


def some_job() -> Any:
    return json.loads(Identity(weights="ab", config="cd", text="ef", dtype="bf16", seed=3, computed=True).json())


# -- checkpoints ------------------------------------------------------------------------------

MIXTRAL: Final = {
    "model_type": "mixtral",
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "vocab_size": 9,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
DBRX: Final = {
    "model_type": "dbrx",
    "d_model": 8,
    "n_heads": 2,
    "n_layers": 1,
    "max_seq_len": 64,
    "vocab_size": 9,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attn_config": {"clip_qkv": 0.7, "kv_n_heads": 1, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 4, "moe_num_experts": 2, "moe_top_k": 1, "moe_normalize_expert_weights": 1.0},
}
SHARD: Final = "model-00001-of-00001.safetensors"


# Of one layer with two experts, by llama.cpp's names: type and sizes.
GGUF_TENSORS: Final = {
    "token_embd.weight": (Type.F32, 8, 32),
    "output_norm.weight": (Type.F32, 32),
    "output.weight": (Type.F16, 8, 32),
    "blk.0.attn_norm.weight": (Type.F32, 32),
    "blk.0.ffn_norm.weight": (Type.F32, 32),
    "blk.0.attn_q.weight": (Type.Q8_0, 64, 32),
    "blk.0.attn_k.weight": (Type.Q5_0, 32, 32),
    "blk.0.attn_v.weight": (Type.F32, 32, 32),
    "blk.0.attn_output.weight": (Type.F32, 32, 64),
    "blk.0.attn_q_norm.weight": (Type.F32, 32),
    "blk.0.attn_k_norm.weight": (Type.F32, 32),
    "blk.0.ffn_gate_inp.weight": (Type.F32, 2, 32),
    "blk.0.ffn_gate_exps.weight": (Type.Q4_0, 2, 32, 32),
    "blk.0.ffn_up_exps.weight": (Type.Q4_0, 2, 32, 32),
    "blk.0.ffn_down_exps.weight": (Type.Q4_0, 2, 32, 32),
}
INT4: Final = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 4}
QUANTISED: Final = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"all": {"targets": ["re:.*experts.*"], "weights": INT4}},
}


@cache
def a_checkpoint(*, quantised: bool = False) -> Path:
    """A tiny Mixtral in one file with an index, whose experts are packed if it is quantised."""
    folder = Path(mkdtemp(prefix="hrm-fuzz-checkpoint-"))
    family = family_for(MIXTRAL, "x")
    expected = family.expected_tensors(family.architecture(MIXTRAL, "x"))
    tensors = {name: torch.zeros(each.shape) for name, each in expected.items()}
    for name in [name for name in tensors if quantised and "experts" in name]:
        rows, width = tensors.pop(name).shape
        tensors[f"{name}_packed"] = torch.zeros(rows, 1, dtype=torch.int32)
        tensors[f"{name}_scale"] = torch.zeros(rows, width // 4)
    (folder / SHARD).write_bytes(save(tensors))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, SHARD)}
    (folder / "model.safetensors.index.json").write_bytes(as_json(index))
    config = {**MIXTRAL, "quantization_config": QUANTISED} if quantised else MIXTRAL
    (folder / "config.json").write_bytes(as_json(config))
    (folder / "generation_config.json").write_bytes(as_json({"eos_token_id": [2, 3]}))
    return folder


def copy_checkpoint(folder: Path, *, quantised: bool = False) -> None:
    """Put the tiny checkpoint into the folder."""
    shutil.copytree(a_checkpoint(quantised=quantised), folder, dirs_exist_ok=True)


def opened(folder: Path) -> None:
    """Open a checkpoint as a job does, and read all of it."""
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        expected = family.expected_tensors(arch, checkpoint.names)
        checkpoint.check(expected)
        for name, (shape, _) in expected.items():
            checkpoint.read_into(name, torch.empty(shape))


def use_index(content: bytes, folder: Path) -> None:
    copy_checkpoint(folder)
    written(folder, "model.safetensors.index.json", content)
    opened(folder)


def use_model_config(content: bytes, folder: Path) -> None:
    copy_checkpoint(folder)
    written(folder, "config.json", content)
    opened(folder)


def use_generation_config(content: bytes, folder: Path) -> None:
    copy_checkpoint(folder)
    written(folder, "generation_config.json", content)
    opened(folder)
    str(SamplingDefaults.of("model", folder).left_out_notice)


@cache
def a_header(*, quantised: bool = False) -> Any:
    content = (a_checkpoint(quantised=quantised) / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def as_safetensors(header: Any, *, quantised: bool = False) -> bytes:
    """A file with that header and a few zeros for data."""
    text = as_json(header)
    ends = [x["data_offsets"][1] for x in a_header(quantised=quantised).values() if "data_offsets" in x]
    return struct.pack("<Q", len(text)) + text + bytes(max(ends))


def use_safetensors(content: bytes, folder: Path) -> None:
    copy_checkpoint(folder)
    written(folder, SHARD, content)
    opened(folder)


@cache
def a_gguf_of_weights() -> bytes:
    """A file of a whole tiny model, with tensors that are packed, plain and read as numbers."""

    def add_tensors(writer: GGUFWriter) -> None:
        for name, (kind, *shape) in GGUF_TENSORS.items():
            numbers = np.zeros(shape, dtype=np.float32)
            blocks = numbers if kind is Type.F32 else quantize(numbers, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)

    return gguf_of(32, add_tensors)


def use_gguf_of_weights(content: bytes, folder: Path) -> None:
    opened(written(folder, "model.gguf", content))


def as_quantised(header: Any) -> bytes:
    """The same of the quantised checkpoint."""
    return as_safetensors(header, quantised=True)


def use_quantised(content: bytes, folder: Path) -> None:
    copy_checkpoint(folder, quantised=True)
    written(folder, SHARD, content)
    opened(folder)


def use_crossings(content: bytes, folder: Path) -> None:
    """Up to which sizes native kernels are faster, as the cache folder of a user keeps it: read, or measured again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        path = written(folder, "moe-hrm/native.json", content)
        with crossings._opened() as file:
            known = crossings._read(file)
            crossings._write(file, known)
        assert all(type(size) is int for sizes in known.values() for size in sizes.values())
        assert json.loads(path.read_bytes()) == known


EXECUTOR_TARGETS: Final = (
    Target(name="requests", bases=some_requests, use=use_requests, dump=as_lines, share=2),
    Target(name="parquet", bases=some_rows, use=use_requests, has_values=False),
    Target(name="resume", bases=some_outputs, use=use_resume, dump=as_lines),
    Target(name="tokenizer", bases=some_tokenizers, use=use_tokenizer),
    Target(name="sentencepiece", bases=lambda: [a_sentencepiece()], use=use_sentencepiece, has_values=False, share=0.5),
    Target(name="added-tokens", bases=lambda: [{**CONFIG, **ADDED}], use=use_added_tokens, share=0.5),
    Target(name="tokenizer-config", bases=lambda: [CONFIG], use=use_tokenizer_config),
    Target(name="template", bases=lambda: [TEMPLATE.encode()], use=use_template, has_values=False, share=2),
    Target(
        name="named-template", bases=lambda: [TEMPLATE.encode()], use=use_named_template, has_values=False, share=0.5
    ),
    Target(name="special-tokens", bases=lambda: [CONFIG], use=use_special_tokens, share=0.5),
    Target(name="job", bases=lambda: [some_job()], use=use_job, share=0.5),
    Target(name="quantisation", bases=lambda: [how.config for how in PUBLISHED.values()], use=use_quantisation),
    Target(
        name="index",
        bases=lambda: [json.loads((a_checkpoint() / "model.safetensors.index.json").read_bytes())],
        use=use_index,
    ),
    Target(name="model-config", bases=lambda: [MIXTRAL, DBRX], use=use_model_config),
    Target(
        name="generation-config",
        bases=lambda: [{"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.7, "top_k": 20, "do_sample": True}],
        use=use_generation_config,
        share=0.5,
    ),
    Target(name="safetensors", bases=lambda: [a_header()], use=use_safetensors, dump=as_safetensors),
    Target(name="gguf-weights", bases=lambda: [a_gguf_of_weights()], use=use_gguf_of_weights, has_values=False),
    Target(name="crossings", bases=lambda: [{"a CPU": {"linear": 64}}], use=use_crossings, share=0.5),
    Target(name="quantised", bases=lambda: [a_header(quantised=True)], use=use_quantised, dump=as_quantised),
)
