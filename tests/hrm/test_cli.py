"""The hrm command: what scripts rely on, and one line for every mistake."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hrm.machines import save_profile
from hrm.model_spec import BUILT_IN_MODELS
from hrm.search.result import OPTIMAL_GAP
from tests.hrm.support import machine

pytestmark = pytest.mark.usefixtures("coarse_searches")  # what is found is told, however good it is

COMMANDS = (
    "profile",
    "profiles",
    "models",
    "search",
    "whatif",
    "map",
    "estimate",
    "simulate",
    "plot",
    "paper",
    "validate",
)
T4 = ["--model", "mixtral-8x7b", "--gpus", "1xT4"]
LENGTHS = ["--prompt-len", "64", "--gen-len", "16", "--requests", "64"]
ESTIMATE = ["estimate", *T4, *LENGTHS, "-u", "8", "-n", "4"]


def test_help_lists_every_command(hrm):
    code, out, _ = hrm("--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(hrm, command):
    code, out, _ = hrm(command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: hrm {command}")


PREDICTED = {"tokens_per_s", "prefill_s", "decode_s", "bound_tokens_per_s", "bottleneck"}


def check_plan(plan: dict) -> None:
    assert set(plan) >= {"policy", "predicted", "memory", "turning_points"}
    assert set(plan["predicted"]) >= PREDICTED
    assert set(plan["predicted"]["bottleneck"]) == {"prefill", "decode"}
    assert plan["predicted"]["tokens_per_s"] <= plan["predicted"]["bound_tokens_per_s"]
    for level in ("gpu", "cpu"):
        planned = dict(plan["memory"][level]["planned_bytes"])
        assert planned.pop("total") == sum(planned.values())
        assert sum(planned.values()) <= plan["memory"][level]["capacity_bytes"]
    for point in plan["turning_points"].values():
        assert set(point) >= {"p1", "p2", "balance", "intensity", "verdict"}
    assert set(plan["turning_points"]) == {"attention", "ffn"}


def test_search_prints_one_object_with_the_promised_keys(hrm_json):
    plan = hrm_json("search", *T4, *LENGTHS)
    check_plan(plan)
    assert set(plan["search"]) >= {"solver", "seconds", "evaluations", "outcome", "gap"}
    optimal = plan["search"]["gap"] <= OPTIMAL_GAP
    assert plan["search"]["outcome"] == ("optimal" if optimal else "best_found")
    assert plan["search"]["bound_tokens_per_s"] >= plan["predicted"]["tokens_per_s"]


def test_estimate_prints_one_object_with_the_promised_keys(hrm_json):
    plan = hrm_json(*ESTIMATE, "--resident-experts", "1", "--gpu-memory", "32GB", "--schedule", "fastdecode")
    check_plan(plan)
    assert plan["policy"]["schedule"] == "fastdecode"
    assert plan["policy"]["resident_experts"] == [1] * 32
    assert plan["policy"]["paper_tuple"]["N"] == 32
    assert plan["policy"]["dtype"] == "float16", "a T4 has no bfloat16"


def test_layers_without_experts_are_not_counted_as_keeping_none(hrm):
    """Of its 27 layers the first has no experts; a stage has none such."""
    for gpus, kept in (("1xRTX-3090", r"\d+ or \d+ of 64"), ("2xRTX-3090", "all 64")):
        code, out, _ = hrm(
            "search", "--model", "deepseek-v2-lite", "--gpus", gpus, "--requests", "64", "--parallelism", "pipeline"
        )
        assert code == 0
        said = re.search(r"experts on the \w+; (.*) a layer.* stay", out)
        assert said is not None
        assert re.fullmatch(kept, said[1])
        assert not said[1].startswith("0 or ")
    assert re.search(r"r_c\) = \(.*, 1\.000, \d\.\d+\)", out), "not more than all"


@pytest.mark.parametrize(
    ("args", "on_gpu"), [([], 0), (["--kv-on-gpu"], 4), (["--kv-on-gpu", "0.5"], 2), (["--kv-on-gpu", "--staging"], 4)]
)
def test_kv_on_gpu_takes_a_share_or_means_all(hrm_json, args, on_gpu):
    assert hrm_json(*ESTIMATE, *args)["policy"]["gpu_kv_micro_batches"] == on_gpu


def test_models_shows_parameters_and_kv_bytes(hrm_json):
    model = hrm_json("models", "mixtral-8x7b")
    assert model["parameters"] == 46_702_792_704
    assert model["active_parameters"] == 12_879_925_248
    assert model["kv_bytes_per_token"] == 32 * 2 * 8 * 128 * 2
    assert set(hrm_json("models")) == set(BUILT_IN_MODELS)


def test_a_plan_goes_through_a_file_into_a_simulation(hrm, hrm_json, tmp_path):
    path, trace = tmp_path / "policy.json", tmp_path / "trace.json"
    plan = hrm_json(*ESTIMATE, "--out", path)
    simulated = hrm_json("simulate", "--policy", path, "--steps", "1", "--trace", trace)
    assert plan["policy"]["num_micro_batches"] == 4
    assert simulated["lanes"]["H2D"].split()[:6] == [*(f"W0.{page}" for page in range(4)), "E0.0", "E0.1"]
    assert simulated["makespan_s"] >= max(simulated["busy_s"].values())
    assert json.loads(trace.read_text())["traceEvents"]
    code, out, _ = hrm("simulate", "--policy", path, "--layers", "2", "--schedule", "flexgen-c")
    assert code == 0
    assert "flexgen-c" in out
    assert "H2D │" in out


@pytest.mark.parametrize(
    ("gen_len", "asked", "told"),
    [
        (
            16,
            ["--layers", 33],
            "--layers is 33: must be at most 32, as many as are simulated; give fewer, or leave it out",
        ),
        (16, ["--steps", 16], "--steps is 16: must be at most 15, as many as there are; give fewer"),
        (1, [], "--phase is 'decode': has no step where all requests get their only token of prefill; give --phase"),
    ],
)
def test_more_than_a_plan_has_is_not_drawn_as_all_it_has(refused, hrm, tmp_path, gen_len, asked, told):
    path = tmp_path / "policy.json"
    args = ["--prompt-len", 64, "--gen-len", gen_len, "--requests", 64]
    assert hrm("estimate", *T4, *args, "-u", 8, "-n", 4, "--out", path)[0] == 0
    assert told in refused("simulate", "--policy", path, *asked)


@pytest.mark.parametrize("option", ["--gpus", "--host", "--profile"])
def test_a_machine_without_a_name_does_not_go_unheard(refused, hrm, tmp_path, option):
    """As a variable of the shell's gives it that is not set; the policy's own machine would be taken for it."""
    path = tmp_path / "policy.json"
    assert hrm(*ESTIMATE, "--out", path)[0] == 0
    assert f"{option} is ''" in refused("simulate", "--policy", path, f"{option}=")


@pytest.mark.parametrize(("gen_len", "steps"), [(2, "1 decode step:"), (16, "2 decode steps:")])
def test_two_steps_are_drawn_if_there_are_two(hrm, gen_len, steps):
    code, out, _ = hrm("simulate", *T4, "--prompt-len", 64, "--gen-len", gen_len, "--requests", 64, "--layers", 32)
    assert code == 0
    assert steps in " ".join(out.split())


def test_tables_are_printed_for_people(hrm):
    for args in (["search", *T4, *LENGTHS], ESTIMATE, ["models"], ["profiles"], ["profiles", "4xT4", "--table"]):
        code, out, err = hrm(*args)
        assert (code, err) == (0, "")
        assert len(out.splitlines()) >= 3


SWEEP = ["plot", "sweep", *T4, "--out", "/tmp/unwritten.png"]
MISTAKES = {
    "an unknown model": (["search", "--model", "gpt-9", "--gpus", "T4"], "--model is 'gpt-9'"),
    "an unknown GPU": (["search", "--model", "dbrx", "--gpus", "4xT5"], "--gpus is 'T5'"),
    "a count of none": (["search", "--model", "dbrx", "--gpus", "0xT4"], "--gpus is '0xT4'"),
    "an unknown host": (["search", *T4, "--host", "attic"], "--host is 'attic'"),
    "an unknown workload": (["search", *T4, "--workload", "poems"], "--workload is 'poems'"),
    "no machine": (["search", "--model", "dbrx"], "--gpus or --profile is <missing>: one must name"),
    "two machines": (["search", *T4, "--profile", "x.yaml"], "--gpus is '1xT4': does not go with --profile"),
    "a host beside a profile": (["search", "--model", "dbrx", "--profile", "x.yaml", "--host", "y"], "--host is 'y'"),
    "a size without a unit": (
        ["search", *T4, "--gpu-memory", "16"],
        "--gpu-memory is '16': needs a unit; did you mean 16GB?",
    ),
    "host memory without a unit": (["search", *T4, "--cpu-memory", "64"], "--cpu-memory is '64': needs a unit"),
    "a rate without a unit": (
        ["search", *T4, "--set", "h2d-bandwidth=24"],
        "--set h2d-bandwidth is '24': needs a unit; did you mean 24GB/s?",
    ),
    "a map's range without a unit": (
        ["map", *T4, "--x", "gpu-flops=65:130:3", "--y", "cpu=1:2:2"],
        "--x gpu-flops is '65': needs a unit; did you mean 65TFLOP/s?",
    ),
    "a sweep's range without a unit": (
        [*SWEEP, "--vary", "cpu-memory", "--from", "64", "--to", "128GB"],
        "--from is '64': needs a unit; did you mean 64GB?",
    ),
    "one memory by two options": (
        ["search", *T4, "--gpu-memory", "16GB", "--set", "gpu-memory=24GB"],
        "--set gpu-memory is '24GB': contradicts --gpu-memory=16GB",
    ),
    "one resource set twice": (
        [*ESTIMATE, "--set", "cpu-flops=1TFLOP/s", "--set", "cpu-flops=2TFLOP/s"],
        "--set cpu-flops is '2TFLOP/s': contradicts --set cpu-flops=1TFLOP/s",
    ),
    "one memory by one option twice": (
        ["search", *T4, "--cpu-memory", "64GB", "--cpu-memory", "128GB"],
        "--cpu-memory is <64GB and 128GB>",
    ),
    "a machine named twice for a picture": (
        ["plot", "roofline", *T4, "--gpus", "1xL4", "--out", "/tmp/unwritten.png"],
        "--gpus is <1xT4 and 1xL4>: may be given once only",
    ),
    "a machine named twice": (["whatif", *T4, "--gpus", "1xL4"], "--gpus is <1xT4 and 1xL4>: may be given once only"),
    "no size": (["search", *T4, "--gpu-memory", "big"], "--gpu-memory is 'big'"),
    "half a workload": (
        ["search", *T4, "--prompt-len", "9"],
        "--gen-len is <missing>: must be given with other lengths",
    ),
    "too little memory": (["search", *T4, "--gpu-memory", "300MB"], "no policy fits"),
    "a policy that does not fit": (
        ["estimate", *T4, "-u", "8", "-n", "4", "--resident-experts", "8"],
        "memory at level gpu",
    ),
    "residents of other layers": ([*ESTIMATE, "--resident-experts", "1,2"], "each of the 32"),
    "more residents than experts": ([*ESTIMATE, "--resident-experts", "9"], "at most the 8"),
    "residents that are no numbers": ([*ESTIMATE, "--resident-experts", "x"], "must be integers"),
    "a share above one": ([*ESTIMATE, "--kv-on-gpu", "2"], "--kv-on-gpu is '2'"),
    "no micro-batch": (["estimate", *T4, "-u", "0", "-n", "4"], "--micro-batch-size is '0'"),
    "nothing to simulate": (["simulate"], "--policy or --model is <missing>"),
    "a policy file that is not there": (["simulate", "--policy", "none.json"], "none.json"),
    "a place that cannot be written": ([*ESTIMATE, "--out", "/no/such/p.json"], "must be writable"),
    "a model that is not there": (["models", "nowhere"], "--model is 'nowhere'"),
    "a path of no model": (
        ["models", "no/such/path"],
        "--model is 'no/such/path': must be a config.json or its folder, a GGUF file, or org/name on the Hub; check",
    ),
    "a machine that is not there": (["profiles", "nowhere"], "nowhere"),
    "an unknown command": (["serach"], "COMMAND of hrm is 'serach': must be one of profile, "),
    "an unknown option": (["search", "--modle", "dbrx"], "--modle is <unknown>"),
    "an option without its value": (["search", "--model"], "--model is <incomplete>"),
    "an option left out": (["search", "--gpus", "T4"], "--model is <missing>: must be given"),
    "a length that is no number": ([*ESTIMATE, "--mean-gen-len", "x"], "--mean-gen-len is 'x'"),
    "a file of another kind for trials": (
        ["search", *T4, "--solver", "optuna", "--trials", "1", "--storage", __file__],
        "this one holds something else; give another --storage",
    ),
    "a dtype that the GPU has not": (
        ["search", "--model", "dbrx", "--gpus", "4xT4", "--dtype", "bfloat16"],
        "--dtype is 'bfloat16': must be one that NVIDIA T4 computes in; leave it out, or give --dtype float16",
    ),
    "an unknown schedule": ([*ESTIMATE, "--schedule", "s9"], "--schedule is 's9': must be one of cgopipe, "),
    "a word too many": (["search", *T4, "fast"], "argument is 'fast': must not be there"),
    "steps out of range": (
        ["simulate", "--steps", "0"],
        "--steps is '0': must be a whole number of at least 1 and at most 64",
    ),
    "a folder for a file": (["simulate", "--policy", "/"], "--policy is '/': must be a file, not a folder"),
    "no run given": (["validate"], "RUN is <missing>"),
    "an endless prompt": (["search", *T4, "--prompt-len", "inf", "--gen-len", "1"], "--prompt-len is inf"),
    "no prompt": (
        ["search", *T4, "--prompt-len", "1", "--gen-len", "1", "--max-prompt-len", "0"],
        "--max-prompt-len is 0: must be at least the mean --prompt-len 1; correct it",
    ),
    "a prompt of nothing": (["search", *T4, "--prompt-len", "0", "--gen-len", "1"], "--prompt-len is 0.0: must be at"),
    "a prompt without end": (
        ["search", *T4, "--prompt-len", "1e9", "--gen-len", "1"],
        "--prompt-len is 1000000000.0: must be at most 10,000,000",
    ),
    "no request": (["whatif", *T4, "--requests", "0"], "--requests is 0: must lie between 1 and"),
    "nothing generated": (["search", *T4, "--prompt-len", "9", "--gen-len", "0"], "--gen-len is 0: must be at least 1"),
    "more generated on average than at most": (
        ["search", *T4, "--mean-gen-len", "500"],
        "--mean-gen-len is 500.0: must lie between 1 and --gen-len 128; correct it",
    ),
    "a chunk of no tokens": ([*ESTIMATE, "--prefill-chunk", "0"], "--prefill-chunk is 0: must be at least 1"),
    "parts of more experts than there are": (
        [*ESTIMATE, "--experts-per-part", "9"],
        "--experts-per-part is 9: must be at most the 8 experts of mixtral-8x7b; correct it",
    ),
    "parts of experts that are staged": (
        [*ESTIMATE, "--experts-per-part", "2", "--staging"],
        "--experts-per-part is 2: must be at least 0, and 0 with staging",
    ),
    "experts on the CPU in prefill alone": (
        [*ESTIMATE, "--prefill-ffn", "cpu"],
        "--prefill-ffn is 'cpu': must be gpu where ffn is gpu",
    ),
    "less memory than a page for each GPU": (
        ["search", "--model", "dbrx", "--gpus", "2xT4", "--cpu-memory", "1B"],
        "--cpu-memory is '1B': must lie between 8.19 kB and 1000000 TB; give another",
    ),
    "more memory than any, to ask what more would do": (
        ["whatif", *T4, "--gpu-memory", "1000000TB"],
        "gpu-memory is <times 1.1>: gives the machine a figure that must be positive and at most 1e+18; change it less",
    ),
    "a faster link than any": (
        [*ESTIMATE, "--set", "h2d-bandwidth=1e18B/s"],
        "--set h2d-bandwidth is '1e18B/s': must lie between 1 B/s and 1000 TB/s; give another",
    ),
    "more compute than any": (
        [*ESTIMATE, "--set", "cpu-flops=1e29FLOP/s"],
        "--set cpu-flops is '1e29FLOP/s': must lie between 1 FLOP/s and 100000 TFLOP/s",
    ),
    "a launch of days": ([*ESTIMATE, "--set", "cpu-launch-latency=99h"], "--set cpu-launch-latency is '99h': must lie"),
    "a resource that the machine has not": (
        [*ESTIMATE, "--set", "peer-bandwidth=1GB/s"],
        "--set peer-bandwidth is '1GB/s': 1xT4 on gcp-n1-highmem-64 has no link between GPUs",
    ),
    "a map of a machine that cannot be": (
        ["map", *T4, "--x", "cpu=1:1e30:2", "--y", "gpu=1:2:2"],
        "cpu-memory is <times 1e+30>: gives the machine a figure that must be positive and at most 1e+18; change",
    ),
    "a sweep of prompts that cannot be": (
        [*SWEEP, "--vary", "prompt-len", "--from", "9", "--to", "99999999", "--points", "2"],
        "prompt-len is <99,999,999>: gives a workload of which a length must be at most 10,000,000; sweep less far",
    ),
    "memory of a byte, to be measured": (
        ["profile", "--accelerator", "emulated", "--gpu-memory", "1B", "--out", "/tmp/unwritten.yaml"],
        "--gpu-memory is <1 B>: must be at least 4.10 kB, a page for each GPU; ask for more",
    ),
    "memory of no GPU": (
        ["profile", "--accelerator", "cpu", "--gpu-memory", "1GB", "--out", "/tmp/unwritten.yaml"],
        "--gpu-memory is <1.00 GB>: needs a GPU level",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line_that_names_it(refused, mistake):
    args, message = MISTAKES[mistake]
    assert message in refused(*args)


def write_profile(path: Path, change) -> Path:
    save_profile(path, machine())
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return path


BROKEN_PROFILES = {
    "an unknown field": (lambda p: p["levels"][0].update(capcity=1), "levels[gpu].capcity"),
    "a missing field": (lambda p: p["levels"][1].pop("processor"), "levels[cpu].processor"),
    "a wrong type": (lambda p: p.update(levels=3), "levels"),
    "no bandwidth": (lambda p: p["links"][0]["bandwidth_bytes_per_s"]["achieved"].update(value=0), "must be positive"),
    "another schema": (lambda p: p.update(schema=7), "schema is 7"),
}


@pytest.mark.parametrize("broken", BROKEN_PROFILES)
def test_a_malformed_profile_is_refused_by_file_and_field(refused, tmp_path, broken):
    change, message = BROKEN_PROFILES[broken]
    path = write_profile(tmp_path / "machine.yaml", change)
    said = refused("search", "--model", "mixtral-8x7b", "--profile", path)
    assert "machine.yaml" in said
    assert message in said


def test_a_malformed_policy_file_is_refused_by_file_and_field(refused, hrm, tmp_path):
    path = tmp_path / "policy.json"
    assert hrm(*ESTIMATE, "--out", path)[0] == 0
    path.write_text(path.read_text().replace('"micro_batch_size": 8', '"micro_batch_size": "8"'))
    said = refused("simulate", "--policy", path)
    assert "policy.json" in said
    assert "micro_batch_size" in said


def test_without_an_accelerator_everything_is_held_and_computed_in_one_place(hrm, tmp_path):
    path = tmp_path / "cpu.yaml"
    save_profile(path, replace(machine(), levels=machine().levels[1:], links=(), accelerator="cpu"))
    args = ["--model", "mixtral-8x7b", "--profile", path, "--cpu-memory", "400GB", *LENGTHS]
    code, out, err = hrm("estimate", *args, "-u", "8", "-n", "4")
    assert (code, err) == (0, "")
    assert "(32, 8, 1, 1, 1.000, 1.000)" in out
    assert "limited by the CPU's" in out
    assert "GPU" not in out.replace("A_g", "")


def test_memory_given_beside_a_policy_file_is_planned_with(hrm, refused, tmp_path):
    path = tmp_path / "policy.json"
    assert hrm(*ESTIMATE, "--out", path)[0] == 0
    assert hrm("simulate", "--policy", path, "--gpu-memory", "16GB", "--steps", "1")[0] == 0
    assert "memory at level gpu" in refused("simulate", "--policy", path, "--gpu-memory", "2GB")
    assert "--model is 'dbrx'" in refused("simulate", "--policy", path, "--model", "dbrx")


def test_the_whole_process_ends_with_code_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "hrm", "models", "nowhere"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --model is 'nowhere'")
    assert "Traceback" not in done.stderr


def test_importing_hrm_and_searching_load_no_heavy_library():
    code = (
        "import sys, hrm, hrm.search.exhaustive, hrm.cli.plan; "
        "heavy = {'torch', 'matplotlib', 'optuna', 'pandas', 'scipy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_repeats_what_its_profile_warns_of(hrm, tmp_path):
    path = tmp_path / "machine.yaml"
    for warnings in ({}, {"warnings": "others kept 84% of the hardware threads busy"}):
        save_profile(path, replace(machine(), environment=warnings))
        code, out, _ = hrm("search", "--model", "mixtral-8x7b", "--profile", path, *LENGTHS)
        assert code == 0
        assert ("the profile warns:" in out) == bool(warnings)
        assert all(text in out for text in warnings.values())
