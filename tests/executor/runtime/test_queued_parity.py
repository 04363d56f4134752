"""Tokens through streams, marks and the GPU's kernels, and where the host waits for them."""

import threading
from dataclasses import replace
from itertools import pairwise, product
from random import Random

import pytest
import torch

from executor.handlers import DecodeHandlers
from executor.handlers.decode import joined
from executor.model.gpu import FLASH_DTYPES
from hrm.policy import ScheduleName
from tests.contracts.selection import chosen
from tests.executor.runtime.device_tensor import waits
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import generate, generator, requests
from tests.executor.runtime.test_parity import POLICIES, PROMPTS, expected, policy_of
from tests.executor.tiny_models import DBRX, poisoned_copy

SOME = (
    "all streamed, both on the gpu",
    "ffn on the cpu, dense streams",
    "both on the cpu",
    "prefill's experts on the cpu, ragged, staged",
    "split prompts, prefill's experts on the cpu",
    "some experts stay, ragged",
    "kv split, cpu",
    "kv split, gpu",
    "kv on the gpu",
    "staged, gpu, uneven",
    "uneven, gpu",
    "small cache",
    "split prompts, gpu",
    "split prompts, kv split",
    "experts in parts, ragged, dense streams",
)
FEW_TOKENS = 3
FEW_PROMPTS = PROMPTS[:12]  # three micro-batches: buffers that take turns are used again
# Where the host may wait for the device: loading, what is needed to go on, and a table made once.
ALLOWED = {
    ("executor.safetensors_file", "read_into"),
    ("executor.families.stored", "read"),
    ("executor.weight_pages", "load"),
    ("executor.sampling", "choose"),
    ("executor.sampling", "_most_probable"),
    ("executor.sampling", "_sample"),
    ("executor.handlers.state", "routed"),
    ("executor.model.rotary", "on_device"),
}
WITHOUT_GROUPED_GEMM = {("executor.model.gpu", "run_experts")}


@pytest.fixture
def device():
    waits.clear()
    made = FakeDevice(late_s=1e-3)
    yield made
    made.close()


@pytest.fixture
def flash_takes_float32(monkeypatch):
    """So that its tokens can be compared with those of transformers."""
    monkeypatch.setattr("executor.model.gpu.FLASH_DTYPES", (*FLASH_DTYPES, torch.float32))


def late_tokens(folder, policy, device, kernels, **params):
    with generator(folder, policy, backend=LateBackend(device, kernels_named(kernels))) as made:
        done = generate(made, requests(FEW_PROMPTS, **params))
    return {name: completion.tokens for name, completion in done.items()}


def first_tokens(folder):
    of_few = list(expected(folder).items())[: len(FEW_PROMPTS)]
    return {name: tokens[:FEW_TOKENS] for name, tokens in of_few}


def places_of_waits():
    return {(wait.module, wait.function) for wait in waits}


# Each of both kinds of kernels meets every place of attention, caches and experts, whole and split prompts; those that
# both meet have caches on the GPU that differ in what their kernels are told.
BOTH = ("kv on the gpu", "split prompts, gpu", "split prompts, kv split", "uneven, gpu")
MET = [
    (name, kernels)
    for index, name in enumerate(SOME)
    for turn, kernels in enumerate(("plain", "fast"))
    if name in BOTH or index % 2 == turn
]


@pytest.mark.usefixtures("flash_takes_float32")
@pytest.mark.parametrize(("name", "kernels"), MET)
def test_greedy_tokens(tiny_folders, device, name, kernels):
    """Of the model with the fewest experts, each of which is many operators of the device's."""
    folder = tiny_folders["tied"]
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name])
    got = late_tokens(folder, policy, device, kernels, max_tokens=FEW_TOKENS)
    assert got == first_tokens(folder)
    assert places_of_waits() <= ALLOWED | WITHOUT_GROUPED_GEMM


@pytest.mark.usefixtures("flash_takes_float32")
@pytest.mark.parametrize("kernels", ["plain", "fast"])
@pytest.mark.parametrize("name", ["kv on the gpu", "split prompts, gpu", "both on the cpu"])
def test_request_without_finite_logits_costs_no_other_and_no_wait(folder, tmp_path, device, name, kernels):
    wanted = dict(list(first_tokens(folder).items())[:6])
    used = {token for tokens in (*PROMPTS[:6], *wanted.values()) for token in tokens}
    token = min(set(range(3, 97)) - used)
    poisoned = poisoned_copy(folder, tmp_path / "poisoned", token, torch.nan)
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name])
    (bad,) = requests([[5, token, 7, 8, 9]], max_tokens=FEW_TOKENS)
    good = requests(PROMPTS[:6], max_tokens=FEW_TOKENS)
    backend = LateBackend(device, kernels_named(kernels))
    with generator(poisoned, policy, backend=backend) as made:
        done = generate(made, [*good[:3], replace(bad, name="bad"), *good[3:]])
    assert done.pop("bad").error is not None
    assert {name: completion.tokens for name, completion in done.items()} == wanted
    assert places_of_waits() <= ALLOWED | WITHOUT_GROUPED_GEMM


OTHER_SCHEDULES = [s for s in ScheduleName if s is not ScheduleName.CGOPIPE]


@pytest.mark.parametrize(
    ("name", "schedule"), chosen(product(["both on the cpu", "staged, gpu, uneven"], OTHER_SCHEDULES), at=(0, 2, 5, 7))
)
def test_other_schedules(folder, device, name, schedule):
    policy = policy_of(folder, schedule, POLICIES[name])
    got = late_tokens(folder, policy, device, "plain", max_tokens=FEW_TOKENS)
    assert got == first_tokens(folder)


@pytest.mark.parametrize("model", ["all experts", DBRX])
def test_other_models(tiny_folders, device, model):
    folder = tiny_folders[model]
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["kv split, gpu"])
    got = late_tokens(folder, policy, device, "plain", max_tokens=FEW_TOKENS)
    assert got == first_tokens(folder)
    assert places_of_waits() <= ALLOWED | WITHOUT_GROUPED_GEMM


def test_sampled_tokens(folder, device):
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["kv split, gpu"])
    params = {"max_tokens": FEW_TOKENS, "temperature": 1, "top_p": 0.9}
    with generator(folder, policy) as made:
        done = generate(made, requests(FEW_PROMPTS, **params))
    wanted = {name: completion.tokens for name, completion in done.items()}
    assert late_tokens(folder, policy, device, "plain", **params) == wanted
    assert places_of_waits() <= ALLOWED | WITHOUT_GROUPED_GEMM


def test_routed_tokens_are_counted_on_the_device(folder, device):
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["kv split, gpu"])
    wanted = requests(FEW_PROMPTS, max_tokens=4, ignore_eos=True)

    def routed(**options):
        from executor.batching import Batcher

        with generator(folder, policy, **options) as made:
            (batch,) = Batcher(iter(wanted), policy)
            return made.generate(batch).routed_tokens

    assert routed(backend=LateBackend(device, kernels_named("plain"))) == routed()


@pytest.mark.parametrize("name", ["kv on the gpu", "split prompts, gpu"])
def test_with_grouped_gemms_only_choosing_tokens_waits(folder, device, name):
    """They take bfloat16 alone, in which single tokens may differ; that they are right is shown in
    test_gpu."""
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name])
    low = replace(policy, dtype="bfloat16", weight_format="", kv_format="")
    ours = late_tokens(folder, low, device, "fast", max_tokens=1)
    assert places_of_waits() <= ALLOWED
    with generator(folder, low) as made:
        theirs = generate(made, requests(FEW_PROMPTS, max_tokens=1))
    assert sum(ours[name] == theirs[name].tokens for name in ours) >= len(FEW_PROMPTS) - 2


def test_caches_that_lie_closely_come_in_one_copy(folder, device, monkeypatch):
    """Those of a tiny model's micro-batch all do."""
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["all streamed, both on the gpu"])
    backend, counts, lane = LateBackend(device, kernels_named("plain")), [], threading.local()
    load, transfer = DecodeHandlers.load_kv, backend.transfer

    def loading(*given):
        lane.loads = True
        return load(*given)

    def counted(of, copies):
        if getattr(lane, "loads", False):
            counts.append(len(copies))
            lane.loads = False
        return transfer(of, copies)

    monkeypatch.setattr(DecodeHandlers, "load_kv", loading)
    monkeypatch.setattr(backend, "transfer", counted)
    with generator(folder, policy, backend=backend) as made:
        done = generate(made, requests(FEW_PROMPTS, max_tokens=FEW_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()} == first_tokens(folder)
    assert set(counts) == {1}


@pytest.mark.parametrize("smallest_gap", [1, 3, 10])
def test_joined_spans_have_all_rows_and_no_long_gap(smallest_gap):
    rng = Random(smallest_gap)
    for _ in range(100):
        ends = sorted(rng.sample(range(200), 2 * rng.randint(1, 10)))
        spans = list(zip(ends[::2], ends[1::2], strict=True))
        rng.shuffle(spans)
        found = joined(spans, smallest_gap)
        rows = {row for start, end in spans for row in range(start, end)}
        moved = [row for start, end in found for row in range(start, end)]
        assert rows <= set(moved)
        assert len(moved) == len(set(moved))
        assert all(after - before >= smallest_gap for (_, before), (after, _) in pairwise(found))
        gaps = sorted(set(moved) - rows)
        assert all(len(run) < smallest_gap for run in runs(gaps))


def runs(rows):
    """Of sorted rows those that follow one another."""
    found = []
    for row in rows:
        if found and row == found[-1][-1] + 1:
            found[-1].append(row)
        else:
            found.append([row])
    return found
