"""Machines as users name them: own files, hosts alone, unified memory, what can be pinned."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import pytest
import yaml

from hrm.buffers import Purpose
from hrm.catalog import find_file, list_files, profile_folder, spelled
from hrm.errors import ProfileError
from hrm.estimate import estimate
from hrm.formats import FORMATS
from hrm.hardware import HardwareProfile, Source, check_figures
from hrm.machines import compose, load_gpu, load_host, load_profile, one_part, with_memory, without_gpus
from hrm.memory import plan_memory, purposes
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec, load_model
from hrm.policy import Policy, ScheduleName, kv_tokens_for
from hrm.profile_diff import figures_of
from hrm.scaling import Resource, resources, scale
from hrm.search import Space, search, solver_named
from hrm.tasks import Device, Lane
from hrm.units import GB, GIB
from hrm.workload import Workload
from tests.contracts.selection import chosen
from tests.hrm.support import figure, machine, random_dimensions, random_spec, tiny_spec
from tests.hrm.test_search import brute_force, small_machine

pytestmark = pytest.mark.usefixtures("rough_bounds")

FILES = list_files()
UNIFIED = ("GB10", "Strix-Halo", "M4-Max")
SHORT = Workload(name="short", prompt_len=8, max_prompt_len=8, gen_len=4, num_requests=1)


@pytest.fixture
def hrm(hrm, monkeypatch, tmp_path):
    """The command line, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return hrm


def plan_of(hrm, *args: str) -> dict:
    code, out, err = hrm("search", "--model", "mixtral-8x7b", *args, "--requests", "64", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# ------------------------------------------------------------------------- files of one's own


def test_what_hrm_profiles_prints_is_the_file_of_the_catalog(hrm):
    for kind in ("gpus", "hosts", "machines"):
        for name in getattr(FILES, kind):
            code, out, err = hrm("profiles", name)
            assert (code, err) == (0, "")
            file = (profile_folder() / kind / f"{name}.yaml").read_text(encoding="utf-8")
            if name.startswith("paper"):  # written with remarks
                assert yaml.safe_load(out) is not None
            else:
                assert out == file


@pytest.mark.usefixtures("coarse_searches")
def test_a_gpu_and_a_host_written_by_a_shell_plan_as_those_of_the_catalog(hrm, tmp_path):
    line = "hrm profiles T4 > mine.yaml && hrm profiles gcp-n1-highmem-64 > host.yaml"
    command = line.replace("hrm", f"{sys.executable} -m hrm")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    own = plan_of(hrm, "--gpus", "2x./mine.yaml", "--host", "./host.yaml")
    known = plan_of(hrm, "--gpus", "2xT4")
    own["search"].pop("seconds")
    known["search"].pop("seconds")
    assert own == known


@pytest.mark.usefixtures("coarse_searches")
def test_a_changed_gpu_is_what_is_planned_with(hrm, tmp_path):
    mine = yaml.safe_load((profile_folder() / "gpus" / "T4.yaml").read_text(encoding="utf-8"))
    mine["name"] = "T4-with-twice-the-memory"
    mine["level"]["capacity_bytes"] = {"value": 32 * GIB, "source": "assumed"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    one = plan_of(hrm, "--gpus", "./mine.yaml")
    two = plan_of(hrm, "--gpus", "2 x mine.yaml", "--host", "aws-g4dn-12xlarge")
    assert one["machine"] == "1xT4-with-twice-the-memory on gcp-n1-highmem-64"
    assert two["machine"] == "2xT4-with-twice-the-memory on aws-g4dn-12xlarge"
    known = plan_of(hrm, "--gpus", "T4")
    more = 16 * GIB
    for level, gained in (("gpu", more), ("cpu", 0)):
        got = one["memory"][level]["capacity_bytes"] - known["memory"][level]["capacity_bytes"]
        assert got == gained
    assert one["predicted"]["tokens_per_s"] > known["predicted"]["tokens_per_s"]


@pytest.mark.usefixtures("coarse_searches")
def test_what_throughput_costs_in_gpus_is_asked_of_the_gpu_that_was_named(hrm, tmp_path):
    mine = yaml.safe_load((profile_folder() / "gpus" / "T4.yaml").read_text(encoding="utf-8"))
    mine["name"] = "slow"
    mine["h2d"]["bandwidth_bytes_per_s"] = {"achieved": {"value": 1e9, "source": "assumed"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")

    def front(gpus: str) -> list[float]:
        code, out, err = hrm(
            "search", "--model", "mixtral-8x7b", "--gpus", gpus, "--requests", "32", "--pareto", "gpus", "--json"
        )
        assert (code, err.strip()) == (0, "")
        return [row["tokens_per_s"] for row in json.loads(out)["rows"]]

    own, known = front("1x./mine.yaml"), front("1xT4")
    assert len(own) == len(known) == 3
    assert own[0] < 0.9 * known[0]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--gpus", "host.yaml"], ("--gpus is 'host.yaml'", "is a host, which goes with --host")),
        (["--gpus", "T4", "--host", "gpu.yaml"], ("--host is 'gpu.yaml'", "goes with --gpus")),
        (["--gpus", "T4", "--host", "all.yaml"], ("which goes with --profile",)),
        (["--profile", "gpu.yaml"], ("is 'gpu.yaml'", "is a GPU, which goes with --gpus")),
        (["--profile", "host.yaml"], ("is a host, which goes with --host",)),
        (["--gpus", "2xall.yaml"], ("is a whole machine", "leave out the count")),
        (["--gpus", "all.yaml", "--host", "T4"], ("--host is 'T4'", "is a whole machine")),
        (["--gpus", "none.yaml"], ("none.yaml is <No such file",)),
        (["--host", "none.yaml"], ("none.yaml is <No such file",)),
        (["--gpus", "9x./gpu.yaml"], ("takes at most 4 GPUs",)),
        (["--gpus", "attic.yaml"], ("attic.yaml: default_host is 'attic'", "must be one of aws")),
        (["--host", "a,b", "--gpus", "T4"], ("--host is 'a,b'",)),
        (["--gpus", "4090x"], ("--gpus is '4090x'", "did you mean RTX-4090?")),
    ],
)
def test_the_wrong_file_is_told_from_the_right_one(hrm, tmp_path, args, parts):
    for name, file in (("gpu", "gpus/T4"), ("host", "hosts/generic-server"), ("all", "machines/GB10")):
        text = (profile_folder() / f"{file}.yaml").read_text(encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    text = (tmp_path / "gpu.yaml").read_text(encoding="utf-8")
    text = text.replace("default_host: gcp-n1-highmem-64", "default_host: attic")
    (tmp_path / "attic.yaml").write_text(text, encoding="utf-8")
    code, out, err = hrm("search", "--model", "mixtral-8x7b", *args)
    assert (code, out) == (2, "")
    assert all(part in err for part in parts), err
    assert err.count("\n") == 1


def test_a_file_with_a_mistake_is_told_by_the_rules_of_what_it_is(tmp_path):
    text = (profile_folder() / "gpus" / "T4.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("value: 2.72e+11", "value: -1"), encoding="utf-8")
    with pytest.raises(ProfileError, match=r"mine\.yaml: level\.read_bytes_per_s\.achieved is -1"):
        compose(f"2x{path}")
    path.write_text(text.replace("  capacity_bytes", "  capcity_bytes"), encoding="utf-8")
    with pytest.raises(ProfileError, match=r"level\.capcity_bytes .* did you mean capacity_bytes"):
        load_gpu(str(path))


@pytest.mark.usefixtures("coarse_searches")
def test_a_saved_machine_may_be_compared_with_the_catalog(hrm):
    code, out, _ = hrm("profiles", "2xT4")
    assert code == 0
    Path("saved.yaml").write_text(out, encoding="utf-8")
    assert load_profile("saved.yaml") == compose("2xT4")
    code, out, err = hrm(
        "search", "--model", "mixtral-8x7b", "--requests", "64", "--gpus", "saved.yaml,2xT4,GB10", "--json"
    )
    assert (code, err.strip()) == (0, "")
    rates = {row["machine"]: row["tokens_per_s"] for row in json.loads(out)["rows"]}
    assert set(rates) == {"2xT4 on gcp-n1-highmem-64", "GB10 (DGX Spark)"}


# --------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("4090", "RTX-4090"),
        ("rtx4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("RTX 4060 Ti 16GB", "RTX-4060-Ti-16G"),
        ("a100_80GB", "A100-80G"),
        ("A6000", "RTX-A6000"),
        ("Tesla V100 PCIe 16GB", "V100-PCIe-16G"),
        ("RTX PRO 6000", "RTX-PRO-6000"),
        ("RTX PRO 6000 Blackwell", "RTX-PRO-6000"),
        ("H100 SXM", "H100"),
        ("3080 10GB", "RTX-3080"),
        ("dgx spark", "GB10"),
        ("AMD Ryzen AI Max+ 395", "Strix-Halo"),
        ("Apple M4 Max", "M4-Max"),
        ("strixhalo", "Strix-Halo"),
        ("gcp_n1_highmem_64", "gcp-n1-highmem-64"),
        ("a10g", "A10G"),
    ],
)
def test_names_are_known_as_people_write_them(typed, known):
    assert find_file("--gpus", typed).stem == known


@pytest.mark.parametrize(
    ("typed", "guess"),
    [
        ("4060 Ti", "RTX-4060-Ti-16G"),
        ("A100", "A100-40G or A100-80G or A100-PCIe-80G"),
        ("RTX 5070", "RTX-5070-Ti"),
        ("M4", "M4-Max"),
        ("L40X", "L40"),
        ("gcp-n2", "gcp-n1"),
        ("spark", "GB10"),
    ],
)
def test_another_name_leads_to_the_nearest(typed, guess):
    with pytest.raises(ProfileError, match=f"did you mean .*{guess}"):
        find_file("--gpus", typed)


def test_no_two_names_of_the_catalog_are_spelled_alike():
    names = [*FILES.gpus, *FILES.hosts, *FILES.machines]
    assert len({spelled(name) for name in names}) == len(names)


def test_hrm_profiles_finds_gpus_hosts_and_machines_by_name(hrm):
    for name, words in (
        ("RTX4090", "RTX-4090"),
        ("dgx spark", "unified memory of GPU and CPU"),
        ("GCP-N1-highmem-32", "takes up to"),
        ("4 x t4", "4 GPUs as one level"),
        ("4 x t4", "4 x NVIDIA T4"),
        ("wsl-workstation", "can be pinned"),
    ):
        code, out, err = hrm("profiles", name, "--table")
        assert (code, err) == (0, "")
        assert words in out
    code, _, err = hrm("profiles", "RTX4091")
    assert code == 2
    assert "did you mean RTX-4090?" in err


# ------------------------------------------------------------------------------- the catalog


@pytest.mark.usefixtures("coarse_searches")
def test_every_machine_of_the_catalog_plans_a_model_if_it_can_hold_it():
    """The models take turns."""
    machines = [
        *map(compose, FILES.gpus),
        *(without_gpus(load_host(name)) for name in FILES.hosts),
        *map(load_profile, FILES.machines),
    ]
    models = [load_model(name) for name in BUILT_IN_MODELS]
    for index, profile in enumerate(machines):
        spec = models[index % len(models)]
        dtype = profile.default_dtype
        best = search(Space(spec, profile, SHORT, dtype=dtype), runner_ups=0).best
        levels = {level.name: level.usable_bytes for level in (profile.top, profile.host)}
        room, layer = sum(levels.values()), spec.layer_bytes(FORMATS[dtype])
        if best is None:
            assert spec.total_layer_bytes(FORMATS[dtype]) > 0.9 * room or (
                profile.has_accelerator and 2 * layer > 0.9 * profile.top.usable_bytes
            )
        else:
            assert spec.total_layer_bytes(FORMATS[dtype]) <= room
            assert best.tokens_per_s > 0


def test_every_figure_of_the_new_machines_says_where_it_is_from():
    for name in UNIFIED:
        profile = load_profile(name)
        check_figures(name, profile)
        for path, value in figures_of(profile).items():
            if value.source is not Source.DATASHEET:
                assert value.note, (name, path)
            if value.source is Source.MEASURED:
                assert "by others" in value.note


def test_the_readme_counts_the_catalog_right():
    readme = Path(__file__).parents[2] / "README.md"
    unified = [name for name in FILES.machines if load_profile(name).unified_memory]
    told = f"{len(FILES.gpus)} GPUs, {len(FILES.hosts)} hosts and {len(unified)} chips with unified"
    assert told in readme.read_text(encoding="utf-8")


# -------------------------------------------------------------------------- machines of one level


def test_a_host_alone_is_a_machine_on_which_the_cpu_does_everything(hrm):
    host = load_host("gcp-n1-highmem-64")
    plan = plan_of(hrm, "--host", "gcp-n1-highmem-64")
    assert plan["machine"] == host.name
    assert list(plan["memory"]) == ["cpu"]
    assert plan["memory"]["cpu"]["capacity_bytes"] == host.level.usable_bytes
    spec = load_model("mixtral-8x7b")
    read_s = spec.total_layer_bytes(FORMATS["bfloat16"]) / host.level.read_bytes_per_s.at()
    assert plan["predicted"]["decode_s"] >= 127 * read_s
    code, out, _ = hrm("search", "--model", "mixtral-8x7b", "--host", "generic-server")
    assert code == 0
    assert "everything is held and computed on the CPU" in out
    code, _, err = hrm("search", "--model", "mixtral-8x7b", "--gpus", "0xT4")
    assert code == 2
    assert "--host alone is a machine without GPUs" in err


def test_hosts_alone_are_compared(hrm):
    code, out, _ = hrm(
        "search", "--model", "mixtral-8x7b", "--requests", "64", "--host", "gcp-n1-highmem-64,generic-server", "--json"
    )
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["machine"] for row in rows] == ["generic-server", "gcp-n1-highmem-64"]


@pytest.mark.parametrize("seed", range(8))
def test_unified_memory_holds_every_weight_once_and_uses_no_link(seed):
    rng = Random(seed)
    spec = random_spec(rng)
    one = load_profile(rng.choice(UNIFIED))
    workload = replace(SHORT, gen_len=9, num_requests=rng.choice([1, 5, 40]))
    best = search(Space(spec, one, workload)).require()
    plan = best.memory.gpu
    assert plan is best.memory.cpu or plan == best.memory.cpu
    weights = plan.purposes[Purpose.RESIDENT_WEIGHTS] + plan.purposes[Purpose.WEIGHTS]
    assert weights == 2 * spec.parameters
    assert not {"weight_slots", "kv_buffers", "staging"} & set(plan.purposes)
    for phase in (best.prefill, best.decode):
        assert all(phase.lane_s.get(lane, 0.0) == 0 for lane in Lane if lane is not Lane.GPU)
        assert phase.work.host_memory_s == 0


def test_unified_memory_is_as_fast_as_it_is_read():
    spec, profile = load_model("qwen3-30b-a3b"), load_profile("GB10")
    best = search(Space(spec, profile, replace(SHORT, gen_len=65, num_requests=4096))).require()
    steps = 64 * best.num_batches
    read_s = spec.total_layer_bytes(FORMATS["bfloat16"]) / profile.top.read_bytes_per_s.at()
    assert best.decode.seconds >= steps * read_s


def test_plans_on_unified_memory_say_so(hrm):
    code, out, _ = hrm("search", "--model", "qwen3-30b-a3b", "--gpus", "1xGB10")
    assert code == 0
    assert "everything is held once, in unified memory, and computed on the GPU" in out
    assert "CPU" not in out
    assert "\nunified " in out
    code, out, _ = hrm("estimate", "--model", "qwen3-30b-a3b", "--gpus", "GB10", "-u", "8", "-n", "1", "--json")
    assert code == 0
    assert json.loads(out)["memory"].keys() == {"unified"}


def test_unified_memory_has_one_of_each_resource():
    profile = load_profile("GB10")
    assert resources(profile) == (
        Resource.GPU_MEMORY,
        Resource.GPU_BANDWIDTH,
        Resource.GPU_FLOPS,
        Resource.GPU_LAUNCH_LATENCY,
    )
    half = with_memory(profile, gpu_memory_bytes=64 * GB)
    assert half.host.capacity_bytes.value == 64 * GB
    with pytest.raises(ProfileError, match=r"--cpu-memory .* unified memory"):
        with_memory(profile, cpu_memory_bytes=64 * GB)
    with pytest.raises(ProfileError, match=r"cpu-flops is <missing>: .*unified memory"):
        scale(profile, Resource.CPU_FLOPS, 2)


@pytest.mark.parametrize(
    ("machine", "flag", "device", "does"),
    [("GB10", "--ffn", "cpu", "GPU"), ("generic-server", "--attention", "gpu", "CPU")],
)
def test_where_one_processor_does_all_the_other_is_not_asked(hrm, machine, flag, device, does):
    option = "--gpus" if machine == "GB10" else "--host"
    code, out, err = hrm("search", "--model", "mixtral-8x7b", option, machine, flag, device)
    assert (code, out) == (2, "")
    assert f"{flag} is '{device}': " in err
    assert f"its {does} does all" in err


def test_unified_memory_is_one_level():
    with pytest.raises(ProfileError, match=r"unified_memory is True: goes with one level"):
        replace(machine(), unified_memory=True)


# ------------------------------------------------------------------------- what can be pinned


def pinning(profile: HardwareProfile, num_bytes: float | None) -> HardwareProfile:
    """The machine, of whose host's memory only so much can be pinned."""
    pinnable = None if num_bytes is None else figure(num_bytes)
    host = replace(profile.host, pinnable_bytes=pinnable)
    return replace(profile, levels=(profile.top, host))


def pinned_bytes(spec, policy: Policy) -> int:
    """What of the host's memory crosses the link by itself, for one policy, by hand."""
    sizes = purposes(spec, policy)[1]
    names = {"staging", "exchange", "prefill_hidden"}
    names |= set() if policy.staging else {"weights", "kv_cache"}
    names |= {"kv_cache"} if policy.streams_kv else set()
    return sum(size for name, size in sizes.items() if name in names)


@pytest.mark.parametrize("seed", chosen(range(4), at=(0, 3)))
def test_more_that_can_be_pinned_never_gives_less(seed):
    rng = Random(seed)
    spec = random_spec(rng)
    profile = small_machine(rng, spec)
    capacity = figure(2 * spec.total_layer_bytes(FORMATS["bfloat16"]) + 2e6)
    profile = replace(profile, levels=(profile.top, replace(profile.host, capacity_bytes=capacity)))
    workload = replace(SHORT, num_requests=rng.choice([6, 12]))
    everything = profile.host.usable_bytes
    found = []
    for share in (1e-3, 0.1, 0.4, 5.0):
        limited = pinning(profile, share * everything)
        result = search(Space(spec, limited, workload, ffn=Device.GPU))
        found.append(result.greatest_tokens_per_s)
        if result.best is not None:
            policy = result.best.policy
            assert pinned_bytes(spec, policy) <= min(share, 1) * everything
            again = estimate(spec, policy, limited, workload)
            assert again.tokens_per_s == result.best.tokens_per_s
    assert found == sorted(found)
    free = search(Space(spec, pinning(profile, None), workload, ffn=Device.GPU))
    assert found[-1] == pytest.approx(free.greatest_tokens_per_s, rel=1e-9)


@cache
def best_by_brute_force(seed: int) -> tuple[ModelSpec, HardwareProfile, Workload, float]:
    """A small problem and the greatest closed form of any of its integers, staged or not."""
    rng = Random(20 + seed)
    spec = replace(random_dimensions(rng), num_layers=3, num_experts=2, experts_per_token=1).spec
    weights = spec.total_layer_bytes(FORMATS["bfloat16"])
    profile = pinning(small_machine(rng, spec), rng.uniform(0.2, 0.7) * weights)
    workload = replace(SHORT, gen_len=12, num_requests=3)
    space = Space(spec=spec, profile=profile, workload=workload, dtype="bfloat16", schedule=ScheduleName.CGOPIPE)
    best = max(brute_force(replace(space, staging=staging)) for staging in (False, True))
    return spec, profile, workload, best


@pytest.mark.parametrize(("seed", "solver"), chosen(product(range(3), ("exhaustive", "milp")), at=(0, 1, 4)))
def test_what_can_be_pinned_is_searched_as_by_brute_force(seed, solver):
    spec, profile, workload, best = best_by_brute_force(seed)
    assert best > 0
    result = search(Space(spec, profile, workload), solver_named(solver))
    assert result.greatest_tokens_per_s == pytest.approx(best, rel=1e-6)


def test_a_policy_that_pins_too_much_is_told_what_to_do():
    spec = tiny_spec()
    profile = pinning(machine(), 1000)
    policy = Policy(
        batch_size=4,
        micro_batch_size=4,
        resident_experts=(0,) * 4,
        kv_tokens_per_micro_batch=kv_tokens_for(4, 12, 12),
        prefill_chunk_tokens=8,
    )
    plan = plan_memory(spec, policy, profile)
    assert not plan.fits
    assert plan.pinned is not None
    assert plan.pinned.planned_bytes == pinned_bytes(spec, policy)
    with pytest.raises(ValueError, match=r"must fit the 1\.00 kB that it can pin; .*--staging"):
        plan.check_fits()


@pytest.mark.usefixtures("coarse_searches")
def test_a_host_that_pins_a_part_stages_and_says_so(hrm):
    model = ["--model", "qwen3-30b-a3b", "--gpus", "4090", "--requests", "256"]
    code, out, _ = hrm("search", *model, "--host", "wsl-workstation", "--cpu-memory", "100GB")
    assert code == 0
    assert "\npinned " in out
    code, out, _ = hrm("search", *model, "--host", "wsl-workstation", "--json")
    plan = json.loads(out)
    assert plan["policy"]["staging"]
    pinned = plan["memory"]["pinned"]
    assert "weights" not in pinned["planned_bytes"]
    assert pinned["planned_bytes"]["total"] <= pinned["capacity_bytes"]
    code, out, _ = hrm("search", *model, "--json")
    assert not json.loads(out)["policy"]["staging"]


def test_the_part_that_can_be_pinned_follows_the_memory():
    profile = compose("4090", "wsl-workstation")
    whole = profile.host
    assert whole.pinnable_bytes is not None
    share = whole.pinnable_bytes.value / whole.capacity_bytes.value
    for changed in (
        with_memory(profile, cpu_memory_bytes=16 * GB),
        scale(profile, Resource.CPU_MEMORY, 3),
        one_part(compose("2x4090", "wsl-workstation"), is_stage=True),
    ):
        host = changed.host
        assert host.pinnable_bytes is not None
        assert host.pinnable_bytes.value == pytest.approx(share * host.capacity_bytes.value)
    assert replace(whole, pinnable_bytes=None).usable_pinned_bytes == whole.usable_bytes
