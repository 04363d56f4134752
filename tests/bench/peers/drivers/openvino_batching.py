"""OpenVINO GenAI: its continuous batching, on a model that optimum-intel exports once."""
# pyright: reportMissingImports=false

import shutil
from pathlib import Path
from typing import Any

from tests.bench.peers.drivers.turn import Engine, Job, Tokens, take_turn

KV_CACHE_GIB = 2


class OpenVino(Engine):
    """`ContinuousBatchingPipeline` in bfloat16."""

    packages = ("openvino-genai", "openvino", "optimum-intel")

    def __init__(self, job: Job) -> None:
        import openvino_genai as genai

        exported = Path(job.kept) / "exported"
        if not exported.is_dir():
            _export(job.checkpoint, exported)
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 4096
        scheduler.max_num_seqs = job.most_requests
        scheduler.cache_size = KV_CACHE_GIB
        options = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
        self._pipeline: Any = genai.ContinuousBatchingPipeline(str(exported), scheduler, "CPU", options)

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """All prompts in one call."""
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        asked = genai.GenerationConfig()
        asked.max_new_tokens = asked.min_new_tokens = new_tokens
        asked.ignore_eos, asked.do_sample = True, False
        ids = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return [list(answer.m_generation_ids[0]) for answer in self._pipeline.generate(ids, [asked] * len(ids))]


def _export(checkpoint: str, exported: Path) -> None:
    """Model and tokenizer in OpenVINO's form, whole or not at all."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    partial = exported.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, load_in_8bit=False, compile=False)
    model.save_pretrained(partial)
    # The pipeline wants a tokenizer, and is given ids: any will do.
    bytes_alone = Tokenizer(BPE({letter: token for token, letter in enumerate(ByteLevel.alphabet())}, merges=[]))
    bytes_alone.pre_tokenizer, bytes_alone.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>")
    for graph, name in zip(
        convert_tokenizer(tokenizer, with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True
    ):
        ov.save_model(graph, partial / f"openvino_{name}.xml")
    partial.rename(exported)


if __name__ == "__main__":
    take_turn(OpenVino)
