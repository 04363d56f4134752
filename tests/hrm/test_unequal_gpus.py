"""Machines whose GPUs are not all alike, and GPUs that share a link: described, changed and written."""

from dataclasses import replace
from random import Random

import pytest

from hrm.catalog import list_files
from hrm.errors import ProfileError
from hrm.gpus import at_once, fair_shares, smallest_of
from hrm.hardware import HardwareProfile, Host, SharedLink
from hrm.machines import (
    assemble,
    assemble_all,
    compose,
    dump_profile,
    load_gpu,
    load_host,
    load_profile,
    one_part,
    save_profile,
    with_memory,
)
from hrm.profile_diff import figures_of
from hrm.scaling import resource_value, resources, scale
from hrm.units import GB
from tests.hrm.support import rate

PAIR = "1xRTX-4090+1xRTX-3090"
GPUS = list_files().gpus


def host_with(*groups: tuple[int, ...], most: float = 16e9) -> Host:
    shared = tuple(SharedLink(gpus=gpus, bandwidth_bytes_per_s=rate(most)) for gpus in groups)
    return replace(load_host("generic-server"), shared_links=shared)


def h2d(profile: HardwareProfile) -> float:
    return profile.h2d.bandwidth_bytes_per_s.at()


@pytest.mark.parametrize(("several", "alike"), [("1xT4+1xT4", "2xT4"), ("2xA100-80G+A100 80G", "3xA100-80G")])
def test_gpus_of_one_kind_are_one_kind(several, alike):
    assert compose(several) == compose(alike)


def test_what_gpus_of_two_kinds_have_adds_up():
    both, *each = compose(PAIR, "generic-server"), load_gpu("RTX-4090"), load_gpu("RTX-3090")
    assert both.name == f"{PAIR} on generic-server"
    assert (both.num_gpus, list(both.gpus)) == (2, each)
    assert both.top.usable_bytes == sum(card.level.usable_bytes for card in each)
    assert both.top.read_bytes_per_s.at() == sum(card.level.read_bytes_per_s.at() for card in each)
    for tokens in (1, 100, 5000):
        rates = [card.level.processor.flops_per_s("bfloat16", tokens) for card in each]
        assert both.top.processor.flops_per_s("bfloat16", tokens) == pytest.approx(sum(rates))
    assert h2d(both) == sum(card.h2d.bandwidth_bytes_per_s.at() for card in each)
    assert both.host == compose("T4", "generic-server").host


def test_only_dtypes_that_all_gpus_know_are_the_machine_s():
    assert compose("1xL4+1xT4", "generic-server").default_dtype == "float16"
    assert compose("1xL4+1xA10G", "generic-server").default_dtype == "bfloat16"


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_has_of_everything_what_each_has_at_least(seed):
    rng = Random(seed)
    cards = [load_gpu(name) for name in rng.sample(GPUS, 3)]
    least = smallest_of(cards)
    for card in cards:
        assert least.level.usable_bytes <= card.level.usable_bytes
        assert least.level.attention_bytes_per_s <= card.level.attention_bytes_per_s
        assert least.level.processor.launch_latency_s.value >= card.level.processor.launch_latency_s.value
        for dtype in least.level.processor.compute_flops_per_s:
            for tokens in (1, 64, 300, 4096):
                ours, theirs = (one.level.processor.flops_per_s(dtype, tokens) for one in (least, card))
                assert ours <= theirs
        for link in ("h2d", "d2h", "peer"):
            assert getattr(least, link).seconds(1e6) >= getattr(card, link).seconds(1e6)
    assert least.level.usable_bytes in [card.level.usable_bytes for card in cards]


def test_a_rank_of_unequal_gpus_is_one_of_as_many_of_the_smallest():
    both = compose("1xA100-80G+1xA100-40G", "generic-server")
    rank, alike = one_part(both, is_stage=False), one_part(compose("2xA100-40G", "generic-server"), is_stage=False)
    assert rank.host == alike.host
    assert rank.top.usable_bytes == alike.top.usable_bytes
    assert rank.top.read_bytes_per_s.at() == pytest.approx(alike.top.read_bytes_per_s.at())
    assert rank.peer.seconds(1e6) == alike.peer.seconds(1e6)


# ------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("gpus", [PAIR, "2xT4+1xL4+1xA10G"])
def test_such_a_machine_is_read_as_it_was_written(gpus, tmp_path):
    profile = compose(gpus, "generic-server")
    save_profile(tmp_path / "machine.yaml", profile)
    assert load_profile(tmp_path / "machine.yaml") == profile


def test_a_host_with_shared_links_is_read_as_it_was_written(tmp_path):
    host = host_with((0, 1), (2, 3))
    (tmp_path / "host.yaml").write_text(dump_profile(host))
    assert load_host(str(tmp_path / "host.yaml")) == host


def test_a_plus_in_a_name_joins_nothing(tmp_path):
    assert compose("AI-Max+-395") == compose("Strix-Halo")
    path = tmp_path / "my+gpu.yaml"
    path.write_text(dump_profile(load_gpu("T4")))
    assert compose(f"2x{path}") == compose("2xT4")
    assert compose(f"1x{path.rename(tmp_path / 'mine.yaml')}+1xL4").num_gpus == 2


@pytest.mark.parametrize(
    ("gpus", "host", "parts"),
    [
        ("1xT4+", None, ("--gpus is '1xT4+'", "write it like 4xT4, or 2xT4+1xL4")),
        ("1xT4+0xL4", None, ("count of at least 1",)),
        ("1xT4+1xL5", None, ("--gpus is 'L5'",)),
        ("1xT4+1xGB10", None, ("is a whole machine", "name it alone")),
        ("3xRTX-4090+1xT4", None, ("'3xRTX-4090+1xT4'", "takes at most 2 GPUs")),
    ],
)
def test_compose_refuses(gpus, host, parts):
    with pytest.raises(ProfileError) as caught:
        compose(gpus, host)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_gpus_that_contradict_their_machine_are_refused():
    both = compose(PAIR)
    with pytest.raises(ProfileError, match="as many as num_gpus says"):
        replace(both, num_gpus=3)
    with pytest.raises(ProfileError, match=r"capacity_bytes is .* must have the 5\.15396e\+10 bytes of level gpu"):
        replace(both, gpus=(both.gpus[0], load_gpu("T4")))


# ---------------------------------------------------------------------------- what is changed


def test_memory_that_is_given_goes_to_gpus_in_proportion():
    both = with_memory(compose("1xA100-80G+1xA100-40G", "generic-server"), gpu_memory_bytes=60 * GB)
    assert [card.level.capacity_bytes.value for card in both.gpus] == pytest.approx([40 * GB, 20 * GB])
    assert both.top.capacity_bytes.value == 60 * GB


def test_a_changed_resource_changes_on_every_gpu():
    both = compose(PAIR)
    for resource in resources(both):
        twice = scale(both, resource, 2)
        assert resource_value(twice, resource) == pytest.approx(2 * resource_value(both, resource))
        changed = [
            sum(a.value != b.value for a, b in zip(figures_of(x).values(), figures_of(y).values(), strict=True))
            for x, y in zip(both.gpus, twice.gpus, strict=True)
        ]
        assert all(changed) if not resource.value.startswith("cpu") else not any(changed), resource


# -------------------------------------------------------------------------------- shared links


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_fair(seed):
    rng = Random(seed)
    wanted = [rng.choice([1.0, 2.0, rng.uniform(0.1, 5)]) for _ in range(rng.randint(1, 5))]
    whole = rng.uniform(0.1, 1.3) * sum(wanted)
    shares = fair_shares(whole, wanted)
    assert sum(shares) == pytest.approx(min(whole, sum(wanted)))
    for share, want in zip(shares, wanted, strict=True):
        assert share <= want + 1e-12
        if share < want - 1e-12:  # who gets less than it wants gets as much as any other
            assert share == pytest.approx(max(shares))


def test_gpus_behind_one_link_have_their_part_of_it():
    one = load_gpu("RTX-4090")
    alike = assemble(one, 2, host_with((0, 1)))
    assert not alike.gpus
    assert h2d(alike) == pytest.approx(16e9)
    assert h2d(one_part(alike, is_stage=True)) == pytest.approx(8e9)
    assert "its part of the link that 2 GPUs may use, 16.0 GB/s" in alike.h2d.bandwidth_bytes_per_s.planned.note
    assert assemble(one, 4, host_with((0, 1), (2, 3))).gpus == ()
    assert h2d(assemble(one, 1, host_with((0, 1)))) == 16e9


def test_gpus_of_one_kind_of_which_some_share_a_link_are_not_alike():
    three = assemble(load_gpu("RTX-4090"), 3, host_with((0, 2)))
    assert [card.h2d.bandwidth_bytes_per_s.at() for card in three.gpus] == [8e9, 26e9, 8e9]
    assert h2d(three) == pytest.approx(42e9)
    assert h2d(one_part(three, is_stage=False)) == 8e9


def test_root_ports_are_shared_by_unequal_gpus():
    narrow = replace(load_host("generic-server"), root_port_bytes_per_s=rate(30e9))
    both = assemble_all([(1, load_gpu("RTX-4090")), (1, load_gpu("T4"))], narrow)
    slow = load_gpu("T4").h2d.bandwidth_bytes_per_s.at()
    assert [card.h2d.bandwidth_bytes_per_s.at() for card in at_once(both)] == pytest.approx([30e9 - slow, slow])
    assert h2d(both) == 30e9


@pytest.mark.parametrize("groups", [((0,),), ((0, 0),), ((0, 1), (1, 2)), ((-1, 0),)])
def test_shared_links_that_cannot_be_are_refused(groups):
    with pytest.raises(ProfileError, match="shared_links"):
        host_with(*groups)


def test_a_shared_link_of_gpus_that_a_host_never_has_is_refused():
    with pytest.raises(ProfileError, match=r"shared_links.gpus is \[0, 8\]: must be numbers below the 8 GPUs"):
        assemble(load_gpu("T4"), 1, host_with((0, 8)))
