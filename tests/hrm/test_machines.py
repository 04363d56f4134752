"""Profile files: read, composed, changed and written, and what is said about bad ones."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.catalog import list_files, profile_folder
from hrm.costs import Costs
from hrm.errors import ProfileError
from hrm.formats import Formats
from hrm.hardware import Figure, GpuCard, HardwareProfile, Host, Link, MemoryLevel, Processor, Rate, Source
from hrm.machines import (
    compose,
    dump_profile,
    load_gpu,
    load_host,
    load_profile,
    of_parts,
    one_part,
    save_profile,
    stage_part,
    with_memory,
    without_gpus,
)
from hrm.model_spec import BUILT_IN_MODELS
from hrm.units import GB, GIB
from tests.hrm.profiling.fakes import figures_of

FILES = list_files()

# -------------------------------------------------------------------------------- strategies

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)
names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
positive = st.floats(min_value=1e-12, max_value=1e18, allow_subnormal=False)


@st.composite
def figures(draw, value=positive):
    sizes = sorted(draw(st.sets(st.floats(min_value=1, max_value=1e12), max_size=14)))
    p20, p80 = draw(st.none() | positive), draw(st.none() | positive)
    if p20 is not None and p80 is not None:
        p20, p80 = sorted((p20, p80))
    return Figure(
        value=draw(value),
        source=draw(st.sampled_from(Source)),
        note=draw(texts),
        curve=tuple((size, draw(positive)) for size in sizes),
        samples=draw(st.integers(0, 1000)),
        p20=p20,
        p80=p80,
    )


rates = st.builds(Rate, ceiling=figures(), achieved=st.none() | figures())
processors = st.builds(
    Processor,
    name=texts,
    cores=st.integers(0, 256),
    compute_flops_per_s=st.dictionaries(names, rates, max_size=2),
    attention_bytes_per_s=st.none() | rates,
    launch_latency_s=figures(),
)
capacities = figures(st.floats(min_value=GIB, max_value=1e15))
reserves = figures(st.floats(min_value=0, max_value=GIB / 2))


def levels(name):
    return st.builds(
        MemoryLevel,
        name=st.just(name),
        capacity_bytes=capacities,
        reserve_bytes=reserves,
        pinnable_bytes=st.none() | capacities,
        read_bytes_per_s=rates,
        copy_bytes_per_s=st.none() | rates,
        processor=processors,
    )


def links(source, target, kind="pinned"):
    return st.builds(
        Link,
        source=st.just(source),
        target=st.just(target),
        kind=st.just(kind),
        latency_s=figures(),
        bandwidth_bytes_per_s=rates,
    )


profiles = st.builds(
    HardwareProfile,
    name=texts,
    accelerator=st.sampled_from(["cuda", "emulated", "catalog"]),
    num_gpus=st.integers(1, 8),
    levels=st.tuples(levels("gpu"), levels("cpu")),
    links=st.tuples(links("cpu", "gpu"), links("gpu", "cpu"), links("gpu", "gpu", "peer")),
    environment=st.dictionaries(texts, texts, max_size=3),
)

# ------------------------------------------------------------------------------ round trips


@settings(max_examples=30)
@given(profile=profiles)
def test_saved_profile_loads_to_an_equal_one(tmp_path_factory, profile):
    path = tmp_path_factory.mktemp("round-trip") / "machine.yaml"
    save_profile(path, profile)
    assert load_profile(path) == profile
    assert [file.name for file in path.parent.iterdir()] == ["machine.yaml"]


def test_a_file_of_before_loads_without_what_no_plan_asks_for(tmp_path):
    path, profile = tmp_path / "before.yaml", compose("T4")
    save_profile(path, profile)
    kept = "{value: 0.5, source: measured}"
    path.write_text(f"{path.read_text()}contention:\n- {{work: staging, beside: [h2d], kept: {kept}}}\n")
    assert load_profile(path) == profile


@pytest.mark.parametrize("text", ["no", "1e5", "a: b", "- x", '"', "\\", "ü €\n\t", "~", " x ", ""])
def test_awkward_texts_survive(tmp_path, text):
    profile = replace(compose("T4"), environment={text: text * 3})
    save_profile(tmp_path / "x.yaml", profile)
    assert load_profile(tmp_path / "x.yaml") == profile


def test_saving_is_all_or_nothing(tmp_path):
    with pytest.raises(ProfileError, match=r"must be writable"):
        save_profile(tmp_path / "missing" / "x.yaml", compose("T4"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ProfileError, match=r"folder\.yaml"):
        save_profile(tmp_path / "folder.yaml", compose("T4"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.yaml"]


# ----------------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("name", FILES.gpus)
def test_every_gpu_composes_with_its_host(name):
    profile = compose(name)
    assert profile.num_gpus == 1
    assert profile.top.usable_bytes > 0.8 * profile.top.capacity_bytes.value
    assert profile.top.processor.flops_per_s("bfloat16", 64) > 1e12
    assert profile.h2d.seconds(GB) < 0.2


@pytest.mark.parametrize("name", FILES.hosts)
def test_every_host_is_slower_than_its_data_sheet(name):
    host = load_host(name)
    rate = host.level.read_bytes_per_s
    assert rate.datasheet is not None
    assert rate.planned.value < rate.datasheet.value
    assert host.staging.kind == "staging"


def test_shipped_files_are_written_as_hrm_writes_them():
    for kind, load in (("gpus", load_gpu), ("hosts", load_host)):
        for path in (profile_folder() / kind).iterdir():
            assert path.read_text(encoding="utf-8") == dump_profile(load(path.stem)), path


def test_no_figure_that_was_not_measured_claims_so():
    for name in FILES.gpus:
        text = (profile_folder() / "gpus" / f"{name}.yaml").read_text(encoding="utf-8")
        measured = [line for line in text.splitlines() if "source: measured, note:" in line]
        assert all("by others" in line or "visible" in line for line in measured)


def test_the_t4_has_what_was_fitted_by_others():
    card = load_gpu("T4")
    ceiling = card.h2d.bandwidth_bytes_per_s.ceiling
    assert ceiling is not None
    assert ceiling.value == pytest.approx(12.89 * GIB, rel=1e-4)
    assert card.level.processor.flops_per_s("float16", 64) == 4.3e12
    assert card.level.processor.flops_per_s("bfloat16", 4096) == 21.2e12


@pytest.mark.parametrize("name", ["a100-80", "A100-80GB", "a100_80g", "A100-80G"])
def test_gpu_names_are_forgiving(name):
    assert load_gpu(name).name == "A100-80G"


# --------------------------------------------------------------------------------- compose


def test_compose_adds_up():
    one, four = compose("T4"), compose("4xT4")
    assert one == compose("1xT4", "gcp-n1-highmem-64")
    assert four.name == "4xT4 on gcp-n1-highmem-64"
    assert (one.accelerator, four.num_gpus) == ("catalog", 4)
    assert four.top.usable_bytes == 4 * one.top.usable_bytes
    for figure in (
        lambda p: p.top.read_bytes_per_s.at(),
        lambda p: p.top.processor.flops_per_s("float16", 300),
        lambda p: p.h2d.bandwidth_bytes_per_s.at(),
        lambda p: p.d2h.bandwidth_bytes_per_s.at(),
    ):
        assert figure(four) == pytest.approx(4 * figure(one))
    assert four.host == one.host
    assert four.h2d.latency_s == one.h2d.latency_s
    assert four.top.processor.launch_latency_s == one.top.processor.launch_latency_s


def test_hosts_that_nobody_measured_are_planned_with_the_executors_own_kernels(tmp_path):
    """Of a layer's experts on the host one kernel is launched, and not some for each, as a measured profile says."""
    file = tmp_path / "mine.yaml"
    save_profile(file, load_host("generic-workstation"))
    spec, formats = BUILT_IN_MODELS["qwen3-30b-a3b"], Formats.of("bfloat16")
    machines = [compose("1xRTX-4090", host=host) for host in ("generic-workstation", str(file))]
    for profile in (*machines, without_gpus(load_host("generic-workstation"))):
        processor = profile.host.processor
        costs = Costs(spec, profile, formats)
        idle = replace(processor, launch_latency_s=replace(processor.launch_latency_s, value=0.0))
        free = replace(profile, levels=(*profile.levels[:-1], replace(profile.host, processor=idle)))
        of_launches_s = costs.cpu_experts(1, 128) - replace(costs, profile=free).cpu_experts(1, 128)
        assert of_launches_s == pytest.approx(processor.launch_latency_s.value, rel=1e-6)
    gpu = machines[0].top.processor
    assert not gpu.fuses_operators  # torch computes there


def test_links_together_are_no_faster_than_host_memory():
    profile = compose("8xH100")
    achieved = profile.h2d.bandwidth_bytes_per_s.achieved
    assert achieved is not None
    assert achieved.value == profile.host.read_bytes_per_s.at()
    assert achieved.source is Source.DERIVED
    assert "limited by the host's memory" in achieved.note


def test_links_together_are_no_faster_than_the_root_ports():
    host = load_host("aws-p4d-24xlarge")
    profile = compose("8xA100-40G", host.name)
    assert 8 * compose("A100-40G").h2d.bandwidth_bytes_per_s.at() > 1.5 * host_ports(host)
    assert profile.h2d.bandwidth_bytes_per_s.at() == host_ports(host)
    assert "root ports" in profile.h2d.bandwidth_bytes_per_s.planned.note


def host_ports(host):
    return host.root_port_bytes_per_s.at()


def test_a_part_of_a_machine_is_one_gpu_and_a_share_of_the_host():
    one, four = compose("T4"), compose("4xT4")
    part = one_part(four, is_stage=True)
    assert (part.num_gpus, len(part.links)) == (1, 3)
    for of_card in (part.top.processor, stage_part(four, 2, 0.25).top.processor):
        assert (of_card.name, of_card.cores) == (one.top.processor.name, one.top.processor.cores)
    assert part.top.usable_bytes == one.top.usable_bytes
    assert part.h2d.bandwidth_bytes_per_s.at(1e6) == pytest.approx(one.h2d.bandwidth_bytes_per_s.at(1e6))
    for share in (
        lambda p: p.host.usable_bytes,
        lambda p: p.host.read_bytes_per_s.at(),
        lambda p: p.host.attention_bytes_per_s,
        lambda p: p.host.processor.flops_per_s("float16"),
        lambda p: p.link("cpu", "cpu", "staging").bandwidth_bytes_per_s.at(),
    ):
        assert 4 * share(part) == pytest.approx(share(four), rel=1e-6)
    rank = one_part(four, is_stage=False)
    assert rank.peer == four.peer, "ranks go on summing up with one another"
    assert (rank.num_stages, part.num_stages) == (1, 4)
    assert part.top.processor.launch_latency_s.value == one.top.processor.launch_latency_s.value


def test_a_machine_made_of_parts_has_those_parts():
    four = compose("4xT4")
    part = one_part(four, is_stage=False)
    without_peer = replace(part, links=tuple(link for link in part.links if link.kind != "peer"))
    again = of_parts(without_peer, 4, four.peer)
    assert again.num_gpus == 4
    in_order = replace(four, links=(*(link for link in four.links if link.kind != "peer"), four.peer))
    ours, theirs = (figures_of(profile) for profile in (again, in_order))
    assert ours.keys() == theirs.keys()
    for name, figure in ours.items():
        assert figure.value == pytest.approx(theirs[name].value), name
        assert figure.curve == tuple(pytest.approx(point) for point in theirs[name].curve), name


@pytest.mark.parametrize(
    ("gpus", "host", "parts"),
    [
        ("4xT5", None, ("--gpus is 'T5'", "must be one of A10G", "hrm profiles")),
        ("A100", None, ("--gpus is 'A100'", "did you mean A100-40G or A100-80G")),
        ("h1000", None, ("did you mean H100?",)),
        ("0xT4", None, ("--gpus is '0xT4'", "count of at least 1", "4xT4")),
        ("", None, ("--gpus is ''",)),
        ("16xT4", None, ("'16xT4'", "gcp-n1-highmem-64 takes at most 4 GPUs", "--host")),
        ("T4", "gcp-n1", ("--host is 'gcp-n1'", "did you mean gcp-n1-highmem-32")),
    ],
)
def test_compose_refuses(gpus, host, parts):
    with pytest.raises(ProfileError) as caught:
        compose(gpus, host)
    assert all(part in str(caught.value) for part in parts), caught.value


# ------------------------------------------------------------------------------- overrides


def test_memory_given_by_the_user():
    profile = with_memory(compose("T4"), gpu_memory_bytes=4 * GB, cpu_memory_bytes=500 * GB)
    assert profile.top.capacity_bytes.value == 4 * GB
    assert profile.top.capacity_bytes.source is Source.GIVEN
    assert profile.top.capacity_bytes.note == "given on the command line"
    assert profile.top.reserve_bytes.value == 0.05 * 4 * GB
    assert profile.host.capacity_bytes.value == 500 * GB
    assert profile.host.reserve_bytes == compose("T4").host.reserve_bytes
    assert with_memory(profile) == profile


def test_memory_that_cannot_be():
    profile = compose("T4")
    with pytest.raises(ProfileError, match=r"--gpu-memory is 0: must be a positive size"):
        with_memory(profile, gpu_memory_bytes=0)
    alone = replace(profile, accelerator="cpu", levels=(profile.host,), links=())
    with pytest.raises(ProfileError, match=r"--gpu-memory is 5: .* has no GPU level"):
        with_memory(alone, gpu_memory_bytes=5)
    assert with_memory(alone, cpu_memory_bytes=GB).top.capacity_bytes.value == GB


# ------------------------------------------------------------------------------- bad files


def saved(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = dump_profile(compose("T4"))
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        (
            "  capacity_bytes:",
            "  capcity_bytes:",
            ("levels[gpu].capcity_bytes is <a mapping>", "is no field of MemoryLevel", "did you mean capacity_bytes?"),
        ),
        (
            "datasheet: {value: 3.2e+11",
            "datasheet: {valu: 3.2e+11",
            ("levels[gpu].read_bytes_per_s.datasheet.valu is 320000000000.0", "mean value?"),
        ),
        (
            "- name: gpu\n",
            "- cost: 3\n  name: gpu\n",
            ("levels[gpu].cost is 3", "is no field of MemoryLevel", "remove or correct it"),
        ),
        (
            "value: 2.72e+11",
            "value: 0",
            ("levels[gpu].read_bytes_per_s.achieved is 0", "must be positive and at most 1e+18"),
        ),
        (
            "value: 2.72e+11",
            "value: -1.0",
            ("levels[gpu].read_bytes_per_s.achieved is -1.0", "must be positive and at most 1e+18"),
        ),
        (
            "value: 2.72e+11",
            "value: 3.6e11",
            ("levels[gpu].read_bytes_per_s.achieved is 360000000000.0", "is above the data sheet", "measure again"),
        ),
        (
            "achieved: {value: 2.72e+11",
            "ceiling: {value: 3.6e+11",
            ("levels[gpu].read_bytes_per_s.ceiling is 360000000000.0", "is above the data sheet"),
        ),
        (
            "value: 2.72e+11",
            "p20: 2.8e+11, p80: 2.7e+11, value: 2.72e+11",
            ("levels[gpu].read_bytes_per_s.achieved.p20 is 280000000000.0", "must not be above p80, 2.7e+11"),
        ),
        (
            "datasheet: {value: 3.2e+11, source: datasheet}",
            "datasheet: {value: fast, source: datasheet}",
            ("levels[gpu].read_bytes_per_s.datasheet.value is 'fast'", "must be a number"),
        ),
        (
            "datasheet: {value: 3.2e+11, source: datasheet}",
            "datasheet: {value: 1, source: x}",
            ("datasheet.source is 'x'", "must be one of datasheet, measured"),
        ),
        (
            "datasheet: {value: 3.2e+11, source: datasheet}",
            "datasheet: {value: 1, source: x}",
            ("levels[gpu].read_bytes_per_s.datasheet.source is 'x'",),
        ),
        ("accelerator: catalog", "accelerator: tpu", ("accelerator is 'tpu'",)),
        ("schema: 1", "schema: 9", ("bad.yaml: schema is 9", "reads schema 1")),
        ("value: 1.7179869184e+10", "value: 9", ("levels[gpu].reserve_bytes", "must leave")),
        ("source: cpu\n  target: gpu", "source: cpu\n  target: tpu", ("no pinned link",)),
        ("- [64.0, 4.3e+12]", "- [9999.0, 4.3e+12]", ("float16.achieved.curve", "ascend")),
        ("name: 1xT4 on gcp-n1-highmem-64\n", "", ("name is <missing>", "must be given")),
        ("levels:\n", "levels: 3\nlinkss:\n", ("linkss", "did you mean links?")),
        ("schema: 1", "schema: [1", ("must be a file of valid YAML", "line")),
        ("schema: 1", "schema: !!python/object:os.system 1", ("must be a file of valid YAML",)),
    ],
)
def test_bad_profile_names_file_field_value_rule_and_remedy(tmp_path, old, new, parts):
    path = saved(tmp_path, (old, new))
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_numbers_may_be_written_as_people_do(tmp_path):
    path = saved(tmp_path, ("datasheet: {value: 3.2e+11", "datasheet: {value: 320e9"))
    assert load_profile(path) == compose("T4")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("<no mapping>", "must be a mapping with schema, name")),
        (b"- 1\n", ("<no mapping>",)),
        (b"\xff\xfe\x00", ("must be a file of valid YAML",)),
        (b"name: x\nlevels: [1]\naccelerator: cpu\n", ("levels[0] is 1", "must be a mapping")),
        (b"name: x\nlevels: []\naccelerator: cpu\n", ("levels is []", "one or more")),
        (b"1: x\n", ("bad.yaml: 1 is 'x'", "is no field of HardwareProfile")),
    ],
)
def test_file_that_is_no_profile(tmp_path, content, parts):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_missing_profile(tmp_path):
    with pytest.raises(ProfileError, match=r"no\.yaml is <No such file or directory>"):
        load_profile(tmp_path / "no.yaml")
    with pytest.raises(ProfileError, match=r"--profile is 'nowhere': must be one of"):
        load_profile("nowhere")


def test_cards_and_hosts_can_be_saved(tmp_path):
    for kind, load in ((GpuCard, load_gpu), (Host, load_host)):
        item = load("T4" if kind is GpuCard else "generic-server")
        save_profile(tmp_path / "x.yaml", item)
        assert (tmp_path / "x.yaml").read_text(encoding="utf-8") == dump_profile(item)
