"""What runs before the clock starts: kernels at the sizes of the run, and nothing that the run could tell."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from executor import native
from executor.batching import Request, chunks
from executor.families import family_for
from executor.handlers import DecodeHandlers, PrefillHandlers
from executor.sampling import SamplingParams
from executor.warm_up import first_layers, small_batch
from hrm.buffers import Purpose
from hrm.model_spec import load_model
from hrm.policy import ScheduleName
from tests.executor.runtime.support import architecture, generate, generator, make_policy, requests
from tests.executor.runtime.test_parity import MAX_TOKENS, POLICIES, PROMPTS, expected, policy_of
from tests.executor.tiny_models import MODELS

PLACES = [
    "both on the cpu",
    "kv split, gpu",
    "uneven, gpu",
    "prefill's experts on the cpu, ragged, staged",
    "split prompts, kv split",
    "one at a time",
    "one micro-batch, gpu",
    "small cache",
]
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear")


@pytest.mark.parametrize(
    ("model", "name"), [(MODELS[index % len(MODELS)], name) for index, name in enumerate((*PLACES, *PLACES[:4]))]
)
def test_tokens_after_it_are_those_of_transformers(tiny_folders, model, name):
    folder = tiny_folders[model]
    with generator(folder, policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name])) as made:
        made.warm_up()
        peaks, load_s = made.peak_bytes, made.load_s
        assert sum(purposes.get(Purpose.KV_CACHE, 0) for purposes in peaks.values()) == 0, "no request's"
        made.warm_up()
        assert made.load_s == load_s, "once"
        done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()} == expected(folder)


def test_a_full_batch_meets_no_product_of_a_new_size(folder, monkeypatch):
    """All requests alike and a whole chunk, so that sizes are the policy's own."""
    arch = architecture(folder)
    policy = make_policy(
        arch.spec.num_layers, gpu_kv_micro_batches=1, kv_tokens_per_micro_batch=128, prefill_chunk_tokens=8 * 25
    )
    shapes = set[tuple[str, tuple[torch.Size, ...]]]()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in PRODUCTS:
                shapes.add((func._schema.name, tuple(x.shape for x in args if isinstance(x, torch.Tensor))))
            return func(*args, **(kwargs or {}))

    def watched(cls, name):
        handler = getattr(cls, name)

        def handle(*args):
            with Products():
                return handler(*args)

        monkeypatch.setattr(cls, name, handle)

    watched(PrefillHandlers, "sample")
    for name in ("pre_attention", "sample"):
        watched(DecodeHandlers, name)
    wanted = [
        Request(str(i), (i,) * 25, SamplingParams(max_tokens=5, temperature=i % 2, ignore_eos=True)) for i in range(16)
    ]
    with native.using(None), generator(folder, policy) as made:
        made.warm_up()
        warm = set(shapes)
        generate(made, wanted)
    assert warm
    assert shapes == warm


@pytest.mark.parametrize("name", POLICIES)
def test_it_fits_where_the_policy_does(folder, name):
    arch, policy = architecture(folder), policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name])
    few, of_few = first_layers(arch, policy)
    batch, small = small_batch(few, of_few)
    assert small.resident_experts == policy.resident_experts[: few.spec.num_layers]
    assert batch.num_requests <= policy.batch_size
    assert len(batch.micro_batches) <= policy.num_micro_batches
    assert all(one.kv_tokens <= policy.kv_tokens_per_micro_batch for one in batch.micro_batches)
    run = batch.policy(small)
    assert run.num_micro_batches == len(batch.micro_batches)
    on_gpu = {run.kv_on_gpu(j) for j in range(run.num_micro_batches)}
    assert on_gpu == {policy.kv_on_gpu(j) for j in range(policy.num_micro_batches)}
    assert max(len(request.prompt) for request in batch.requests) <= policy.prefill_chunk_tokens


@pytest.mark.parametrize(
    ("resident", "layers"), [((0,) * 32, 2), ((8,) * 5 + (3,) * 27, 7), ((3, 2) * 16, 2), ((0,) * 31 + (1,), 32)]
)
def test_layers_of_every_kind_are_among_the_first(resident, layers):
    """A layer all of whose experts are resident computes otherwise than one with some, and that than one with none."""
    spec = load_model("mixtral-8x7b")
    arch = family_for({"model_type": spec.family}, "test").published_architecture(spec)
    few, policy = first_layers(arch, make_policy(32, resident_experts=resident))
    assert few.spec.layers == spec.layers[:layers]
    assert len(few.layers) == len(policy.resident_experts) == layers


def test_a_chunk_of_it_is_full():
    spec = load_model("mixtral-8x7b")
    arch = family_for({"model_type": spec.family}, "test").published_architecture(spec)
    policy = make_policy(32, micro_batch_size=32, batch_size=320, kv_tokens_per_micro_batch=32 * 112)
    batch, _ = small_batch(arch, replace(policy, prefill_chunk_tokens=1000))
    assert [len(chunk.parts) for chunk in chunks(batch, 1000)] == [32]
    assert chunks(batch, 1000)[0].num_tokens == 32 * 31, "as many tokens as go into it in whole"
