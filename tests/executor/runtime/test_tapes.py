"""Tasks that are played from tapes: the same answers and counts as without any."""

import pytest

from executor.batching import Batcher
from executor.handlers import tapes
from executor.native import paths
from executor.native.tape import Tape
from tests.executor.group.threads import with_ranks
from tests.executor.runtime.support import CPU, GPU, architecture, generate, generator, make_policy, requests
from tests.executor.tiny_models import random_prompts

PROMPTS = random_prompts(12, seed=7)
POLICIES = {
    "all on the GPU's level": {"attention": GPU},
    "attention and experts on the CPU": {"attention": CPU, "ffn": CPU, "resident": 1},
    "cache and weights streamed": {"attention": GPU, "resident": 1, "resident_dense": False},
}


@pytest.mark.skipif(not paths(), reason="the native kernels are not built")
@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_answers_are_those_without_tapes(folder, options, monkeypatch):
    """Some requests end before others, so that tapes are of fewer and fewer of them."""
    monkeypatch.setenv("EXECUTOR_NATIVE_UP_TO", "1000")
    policy = make_policy(architecture(folder).spec.num_layers, kv_tokens_per_micro_batch=1024, **options)
    played, play = [], Tape.play

    def counted(tape, numbers):
        played.append(tape)
        return play(tape, numbers)

    monkeypatch.setattr(Tape, "play", counted)
    asked = [
        request
        for n, prompt in enumerate(PROMPTS)
        for request in requests([prompt], max_tokens=12 if n % 3 else 7, ignore_eos=True)
    ]
    with generator(folder, policy) as made:

        def answers():
            (batch,) = Batcher(iter(asked), policy)
            result = made.generate(batch)
            return [completion.tokens for completion in result.completions], result.routed_tokens

        with_tapes = answers()
        assert len(set(map(id, played))) > 4
        monkeypatch.setattr(tapes, "MOST_TAPES", 0)
        count = len(played)
        assert answers() == with_tapes
        assert len(played) == count


@pytest.mark.skipif(not paths(), reason="the native kernels are not built")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_of_each_rank_and_on_either_side_kernels_alone_do_what_is_taped(folder, options, ranks, monkeypatch):
    """Else the task would be done operator by operator in every step, and the other ranks wait for it."""
    monkeypatch.setenv("EXECUTOR_NATIVE_UP_TO", "1000")
    policy = make_policy(architecture(folder).spec.num_layers, kv_tokens_per_micro_batch=1024, **options)
    recorded, record = [], Tape.record

    def counted(work, numbers):
        recorded.append(record(work, numbers))
        return recorded[-1]

    monkeypatch.setattr(Tape, "record", counted)
    with_ranks(folder, policy, ranks, lambda made, _: generate(made, requests(PROMPTS[:4], max_tokens=4)))
    assert len(recorded) > 4 * ranks
    assert None not in recorded
