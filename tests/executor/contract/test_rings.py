"""How many turns each ring of buffers really has: where tasks put what they move, in a real run."""

import threading

import pytest

from executor.backends import make_backend
from executor.batching import Batcher
from executor.handlers import DecodeHandlers, PrefillHandlers
from hrm.contract.rings import BUFFERS, EXPERT_SLOTS, STAGING_PAGES, WEIGHT_SLOTS
from tests.executor.runtime.support import GPU, architecture, generator, make_policy, requests
from tests.executor.tiny_models import random_prompts

GEN_LEN = 4


@pytest.fixture(scope="module")
def targets(tiny_folders):
    """Addresses that each kind of task moves something to first, in the order in which it ran, by phase."""
    backend, found, now = make_backend("cpu", None), {}, threading.local()
    transfer = backend.transfer

    def recording(lane, copies):
        x = getattr(now, "task", None)  # none while weights are loaded
        if x is not None:
            found.setdefault((x.phase, x.act.name), []).append((x, copies[0][0].data_ptr()))
        return transfer(lane, copies)

    def told(handler):
        def handle(x):
            now.task = x.id
            return handler(x)

        return handle

    num_layers = architecture(tiny_folders["wide heads"]).spec.num_layers
    policy = make_policy(num_layers, attention=GPU, resident=1, resident_dense=False, staging=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "transfer", recording)
        for handlers in (PrefillHandlers, DecodeHandlers):

            def by_act(own, by_act=handlers.by_act):
                return {act: told(handler) for act, handler in by_act(own).items()}

            patch.setattr(handlers, "by_act", by_act)
        wanted = requests(random_prompts(policy.batch_size, seed=3), max_tokens=GEN_LEN, ignore_eos=True)
        with generator(tiny_folders["wide heads"], policy, backend=backend) as made:
            (batch,) = Batcher(iter(wanted), policy)
            made.generate(batch)
        (whole, found) = found, {}
        in_parts = make_policy(num_layers, experts_per_part=1)
        with generator(tiny_folders["wide heads"], in_parts, backend=backend) as made:
            (batch,) = Batcher(iter(wanted), in_parts)
            made.generate(batch)
    parts = {key: moved for key, moved in found.items() if key[1] == "LOAD_PART"}
    return whole | parts


@pytest.mark.parametrize(
    ("phase", "kind", "turns"),
    [
        ("prefill", "LOAD_PAGE", WEIGHT_SLOTS),
        ("decode", "LOAD_PAGE", WEIGHT_SLOTS),
        ("prefill", "LOAD_PART", EXPERT_SLOTS),
        ("decode", "LOAD_PART", EXPERT_SLOTS),
        ("prefill", "STAGE_PAGE", STAGING_PAGES),
        ("decode", "STAGE_PAGE", STAGING_PAGES),
        ("prefill", "LOAD_HIDDEN", BUFFERS),
        ("decode", "LOAD_KV", BUFFERS),
    ],
)
def test_a_ring_has_as_many_turns_as_is_planned(targets, phase, kind, turns):
    moved = targets[phase, kind]
    if kind == "LOAD_PAGE":  # one page of every layer: pages of a layer lie beside one another
        moved = [(x, address) for x, address in moved if x.index == 0]
    addresses = [address for _, address in moved]
    assert len(addresses) > turns
    assert len(set(addresses[:turns])) == turns
    assert addresses[turns:] == addresses[:-turns]
