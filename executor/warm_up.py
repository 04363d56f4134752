"""What is run before the clock starts: as little as meets every kernel at the sizes that a policy gives it.

Libraries load a kernel, choose among several or make memory of their own when they are first asked for a size.
Of a run that would be its first steps, during which a GPU may even stand still.
"""

from dataclasses import replace
from random import Random
from typing import Final

from executor.batching import Batch, MicroBatch, Request
from executor.model import Architecture
from executor.sampling import SamplingParams
from hrm.contract.rows import KV_BLOCK_TOKENS
from hrm.policy import Policy

NEW_TOKENS: Final = 2  # one by prefill and one by decode


def first_layers(arch: Architecture, policy: Policy) -> tuple[Architecture, Policy]:
    """The model's first layers up to one of every kind, and one more: the last computes less of a chunk.

    Kinds differ by what they compute and by whether none, some or all of a layer's experts are resident.
    """
    kinds: dict[object, int] = {}
    for i, (layer, resident) in enumerate(zip(arch.spec.layers, policy.resident_experts, strict=True)):
        kinds.setdefault((layer, resident > 0, resident == layer.num_experts), i)
    count = min(max(kinds.values()) + 2, arch.spec.num_layers)
    return arch.first_layers(count), replace(policy, resident_experts=policy.resident_experts[:count])


def small_batch(arch: Architecture, policy: Policy) -> tuple[Batch, Policy]:
    """A full micro-batch with its cache at each level that the policy has them at, with a chunk of prompts in all.

    With it the policy that has as many caches on the GPU. Half of the requests are sampled, so that there is sorting.
    """
    on_gpu = policy.gpu_kv_micro_batches
    at_both = 0 < on_gpu < policy.num_micro_batches
    num_micro_batches = 1 + at_both
    blocks = policy.kv_tokens_per_micro_batch // KV_BLOCK_TOKENS
    size = min(policy.micro_batch_size, policy.batch_size // num_micro_batches, blocks)
    of_each = min(blocks // size * KV_BLOCK_TOKENS, arch.max_position_embeddings) - NEW_TOKENS
    length = max(1, min(of_each, policy.prefill_chunk_tokens // (num_micro_batches * size)))
    rng, micro_batches = Random(0), [MicroBatch([]) for _ in range(num_micro_batches)]
    for micro_batch in micro_batches:
        for number in range(size):
            prompt = tuple(rng.choices(range(arch.spec.vocab_size), k=length))
            params = SamplingParams(max_tokens=NEW_TOKENS, temperature=number % 2, top_p=0.9, ignore_eos=True)
            micro_batch.add(Request("warm-up", prompt, params))
    return Batch(tuple(micro_batches)), replace(policy, gpu_kv_micro_batches=min(on_gpu, 1))
