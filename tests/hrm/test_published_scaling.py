"""Two and four GPUs: published ratios, machines put together, batches and predicted ratios."""

from dataclasses import replace

import pytest

from hrm.hardware import Source
from hrm.machines import compose, load_gpu, load_profile
from hrm.published.compare import closed_form
from hrm.published.data import SEVERAL_GPUS
from hrm.published.scaling import NUM_GPUS, PAIRS, batch_limit, machine_of, published_steps_s

S1 = load_profile("paper-s1")


@pytest.mark.parametrize(("pair", "least", "most"), [(PAIRS[0], 2.77, 3.38), (PAIRS[1], 2.1, 2.8)])
def test_headline_of_two_to_four_gpus(pair, least, most):
    two, four = ([run.tokens_per_s for run in SEVERAL_GPUS if run.setup == s] for s in pair)
    ratios = [more / fewer for fewer, more in zip(two, four, strict=True)]
    assert min(ratios) == pytest.approx(least, abs=0.01)
    assert max(ratios) == pytest.approx(most, abs=0.01)


@pytest.mark.parametrize("setup", NUM_GPUS)
def test_machines_with_several_gpus_are_put_together_from_parts(setup):
    machine, catalog = machine_of(setup), compose(f"{NUM_GPUS[setup]}xT4")
    assert machine.num_gpus == catalog.num_gpus
    assert machine.top.usable_bytes == catalog.top.usable_bytes
    assert machine.peer == catalog.peer
    count, one = NUM_GPUS[setup], S1
    assert machine.top.processor.flops_per_s("float16", 16) == pytest.approx(
        count * one.top.processor.flops_per_s("float16", 16)
    )
    assert machine.h2d.bandwidth_bytes_per_s.at() == pytest.approx(
        count * one.h2d.bandwidth_bytes_per_s.at()
    )
    shared = machine_of(setup, shared_links=True)
    assert 2 * shared.h2d.bandwidth_bytes_per_s.at() == machine.h2d.bandwidth_bytes_per_s.at()
    attention = machine.host.processor.attention_bytes_per_s
    assert attention is not None
    assert attention.planned.source is Source.DERIVED
    assert attention.at() == pytest.approx(one.host.attention_bytes_per_s * 32 / 24)
    assert load_gpu("T4").level != one.top, "the paper's T4 runs the paper's kernels"


def test_the_batch_of_two_gpus_follows_from_gpu_memory_and_of_four_from_host_memory():
    for run in SEVERAL_GPUS:
        limit = batch_limit(run)
        if run.setup == "S6":
            assert (limit.batch_size, limit.level) == (run.batch_size, "GPU memory")
        elif run.setup == "S7":
            assert limit.level == "host memory"
            assert limit.batch_size == pytest.approx(run.batch_size, rel=0.08)
        else:
            assert limit.batch_size == pytest.approx(run.batch_size, rel=0.19)


def test_two_gpus_hold_more_once_prompts_are_not_padded():
    run = next(run for run in SEVERAL_GPUS if run.setup == "S6")
    unpadded = replace(run, workload=replace(run.workload, prompt_len=77))
    assert batch_limit(unpadded).batch_size > 3 * batch_limit(run).batch_size


def ratios(pair, *, shared_links):
    two, four = ([run for run in SEVERAL_GPUS if run.setup == setup] for setup in pair)
    machines = {setup: machine_of(setup, shared_links=shared_links) for setup in pair}
    return [
        closed_form(more, machines[more.setup]).tokens_per_s
        / closed_form(fewer, machines[fewer.setup]).tokens_per_s
        for fewer, more in zip(two, four, strict=True)
    ]


def test_more_than_linear_scaling_of_the_larger_mixtral_is_predicted_but_less_of_it():
    """A guard on what is reached: ×2.1 to 2.4 predicted, ×2.77 to 3.38 published."""
    found = ratios(PAIRS[0], shared_links=False)
    assert min(found) > 2.05
    assert max(found) < 2.45
    shared = ratios(PAIRS[0], shared_links=True)
    assert min(shared) > 2.77
    assert max(shared) < 3.7


def test_scaling_of_dbrx_is_predicted_a_little_less_than_linear():
    """Both are limited by the GPUs, so twice the cards are not quite twice as fast."""
    for shared_links in (False, True):
        found = ratios(PAIRS[1], shared_links=shared_links)
        assert min(found) > 1.8
        assert max(found) < 2


def test_published_steps_are_told_only_for_one_batch():
    s6, s7 = ([run for run in SEVERAL_GPUS if run.setup == setup] for setup in ("S6", "S7"))
    assert published_steps_s(s7) == []
    first, second, _ = published_steps_s(s6)
    assert first == pytest.approx((2199.18 - 1498.06) / 32, rel=1e-3)
    assert second == pytest.approx((4161.38 - 2199.18) / 64, rel=1e-3)
