"""Prompts longer than a chunk: the same tokens in any parts, within the memory that was planned."""

import pytest

from executor.batching import Batcher, chunks, pack
from executor.checks import check_request
from executor.errors import JobError
from executor.model import FeedForward, kernels
from hrm.memory import purposes
from tests.executor.runtime.support import (
    CPU,
    GPU,
    architecture,
    emulated,
    generate,
    generator,
    machine,
    make_policy,
    requests,
)
from tests.executor.tiny_models import random_prompts, transformers_greedy

LENGTHS = (40, 39, 26, 14, 13, 12, 3, 1)
TOKENS = [token for prompt in random_prompts(16) for token in prompt]
PROMPTS = [TOKENS[7 * index :][:length] for index, length in enumerate(LENGTHS)]
PLACES = {
    "host": {"attention": CPU, "prefix_buffer_tokens": 40},
    "streamed": {"attention": GPU, "resident_dense": False},
    "gpu": {"gpu_kv_micro_batches": 4},
    "mixed": {"attention": CPU, "gpu_kv_micro_batches": 2, "prefix_buffer_tokens": 40, "ffn": CPU},
}
# Parts of one token; 39 = 3·13 and 26 = 2·13 end with a chunk; 1, 2 and 4 parts; whole.
CHUNKS = (1, 13, 20, 39, 40)


@pytest.fixture
def arch(folder):
    return architecture(folder)


def policy_of(arch, place, chunk):
    return make_policy(
        arch.spec.num_layers,
        batch_size=8,
        micro_batch_size=2,
        kv_tokens_per_micro_batch=96,
        prefill_chunk_tokens=chunk,
        resident=1,
        **PLACES[place],
    )


def tokens_of(made, **params):
    return {name: done.tokens for name, done in generate(made, requests(PROMPTS, **params)).items()}


@pytest.mark.parametrize("place", PLACES)
def test_any_parts_give_the_tokens_of_transformers(folder, arch, place):
    expected = {
        f"request-{index}": tuple(transformers_greedy(folder, prompt, 6)) for index, prompt in enumerate(PROMPTS)
    }
    for chunk in CHUNKS:
        with generator(folder, policy_of(arch, place, chunk)) as made:
            assert tokens_of(made, max_tokens=6) == expected, chunk


@pytest.mark.parametrize("place", PLACES)
def test_memory_stays_within_the_plan_and_no_prefix_crosses_the_link(folder, arch, place):
    policy = policy_of(arch, place, 13)
    (batch,) = Batcher(iter(requests(PROMPTS, max_tokens=2)), policy)
    backend = emulated(machine(bandwidth=5e8))
    with generator(folder, policy, backend=backend) as made:
        result = made.generate(batch)
        peak = made.peak_bytes
    for level, planned in zip(("gpu", "cpu"), purposes(arch.spec, policy), strict=True):
        for purpose, used in peak[level].items():
            assert used <= planned[purpose], (level, purpose)
    assert result.num_chunks == len(chunks(batch, 13)) > 10
    assert "LOAD_KV" not in result.prefill.by_kind
    hidden = sum(LENGTHS) * arch.spec.hidden_size * 4
    assert result.prefill.by_kind["EMBED"].num_bytes == hidden


def test_parts_read_what_earlier_ones_wrote_and_not_more(folder, arch, monkeypatch):
    """What a buffer holds of earlier prompts is overwritten or not looked at."""
    policy = policy_of(arch, "host", 13)
    with generator(folder, policy) as made:
        clean = tokens_of(made, max_tokens=3)
        made.memory.prefill.prefix.fill_(255)  # NaN in any format
        assert tokens_of(made, max_tokens=3) == clean
    seen = []
    attend = kernels.prefill_attention

    def record(arch, qkv, lengths, kept, *rest):
        seen.append([(n, None if c is None else len(c)) for n, c in zip(lengths, kept, strict=True)])
        attend(arch, qkv, lengths, kept, *rest)

    monkeypatch.setattr(kernels, "prefill_attention", record)
    with generator(folder, policy) as made:
        tokens_of(made, max_tokens=1)
    per_layer = seen[: len(seen) // arch.spec.num_layers]
    assert per_layer == [
        [(13, 13)],
        [(13, 26)],
        [(13, 39)],
        [(1, 40), (12, 12)],
        [(13, 25)],
        [(13, 38)],
        [(1, 39), (12, 12)],
        [(13, 25)],
        [(1, 26), (12, 12)],
        [(2, 14), (3, 3), (1, 1)],
        [(13, 13)],
        [(12, 12)],
    ]


def test_the_last_layer_goes_on_with_the_ends_of_prompts(folder, arch, monkeypatch):
    """After attention; with all tokens if many are ends. Results are other tests'."""
    seen = []
    after = FeedForward.before_experts

    def record(self, hidden, *rest):
        seen.append(len(hidden))
        return after(self, hidden, *rest)

    monkeypatch.setattr(FeedForward, "before_experts", record)
    with generator(folder, policy_of(arch, "host", 13)) as made:
        tokens_of(made, max_tokens=1)
    # Of the chunks above, in order; in six none ends, and the tenth has three ends of six tokens.
    whole = [13, 13, 13, 13, 13, 13, 13, 13, 13, 6, 13, 12]
    assert seen == whole * (arch.spec.num_layers - 1) + [1, 1, 1, 6, 1, 1]
    seen.clear()
    with generator(folder, make_policy(arch.spec.num_layers, prefill_chunk_tokens=96)) as made:
        (batch,) = Batcher(iter(requests([[5], [6], [7, 8]], max_tokens=1)), made.policy)
        made.generate(batch)
    assert seen == [4] * arch.spec.num_layers


def test_a_prompt_that_fits_no_buffer_or_cache_is_refused(arch):
    def refused(place, length, **changes):
        policy = make_policy(
            arch.spec.num_layers,
            **{"prefill_chunk_tokens": 8, "kv_tokens_per_micro_batch": 96, **PLACES[place], **changes},
        )
        (request,) = requests([[3] * length], max_tokens=4)
        with pytest.raises(JobError) as error:
            check_request(request, arch, policy)
        (longest,) = requests([[3] * (length - 1)], max_tokens=4)
        check_request(longest, arch, policy)
        assert not pack([longest], policy)[1]
        return str(error.value)

    assert "must have at most the 40 tokens that the policy prefills" in refused("host", 41)
    assert "must have at most the 8 tokens" in refused("host", 9, prefix_buffer_tokens=0)
    for place in ("streamed", "gpu"):
        assert "micro-batch cache of 96 tokens" in refused(place, 93)
    positions = arch.max_position_embeddings
    text = refused("gpu", positions - 3, kv_tokens_per_micro_batch=16 * positions)
    assert f"the model's {positions} positions" in text
