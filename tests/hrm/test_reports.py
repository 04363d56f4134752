"""What reports tell: what was given, what it is worth, and what a request waits for."""

import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import yaml

from executor.quantise.publications import publication_of
from hrm.causes import Cause
from hrm.cli.texts import run_text
from hrm.costs import Costs
from hrm.errors import ModelError
from hrm.estimate import estimate
from hrm.formats import packed_format
from hrm.hardware import Figure, HardwareProfile, Rate, Source
from hrm.latency import LatencyLimits
from hrm.machines import compose, dump_profile, load_gpu, save_profile
from hrm.model_spec import BUILT_IN_MODELS, packed_as
from hrm.phases import prefill_work, simulate_work
from hrm.policy import Parallelism, Policy, kv_tokens_for
from hrm.ranges import throughput_range
from hrm.search import Outcome, Space, search
from hrm.search.choose import TIE
from hrm.strict import decode_strictly
from hrm.tasks import Device
from hrm.units import GB, parse_bytes
from hrm.workload import WORKLOADS
from tests.contracts.selection import chosen
from tests.hrm.published_configs import PUBLISHED
from tests.hrm.small_configs import SMALL_JAMBA
from tests.hrm.support import machine, tiny_spec

pytestmark = pytest.mark.usefixtures("rough_bounds", "searches_kept")

T4 = ["--model", "mixtral-8x7b", "--gpus", "1xT4"]
LENGTHS = ["--prompt-len", "64", "--gen-len", "16", "--requests", "64"]
ESTIMATE = ["estimate", *T4, *LENGTHS, "-u", "8", "-n", "4"]
GIVEN = ["--set", "h2d-bandwidth=24GB/s", "--cpu-memory", "400GB", "--set", "gpu-flops=30TFLOP/s"]


def test_what_is_given_of_the_machine_is_told_in_header_json_and_file(hrm, hrm_json, tmp_path):
    path = tmp_path / "policy.json"
    code, out, _ = hrm(*ESTIMATE, *GIVEN, "--out", path)
    assert code == 0
    assert "gpu-flops 30.0 TFLOP/s, cpu-memory 400 GB, h2d-bandwidth 24.0 GB/s" in out
    assert hrm_json(*ESTIMATE, *GIVEN)["machine_given"] == pytest.approx(
        {"gpu_flops_per_s": 30e12, "cpu_memory_bytes": 400e9, "h2d_bandwidth_bytes_per_s": 24e9}
    )
    assert "cpu-memory 400 GB" in hrm("simulate", "--policy", path, "--steps", "1")[1]
    profile = json.loads(path.read_text())["profile"]
    (link,) = (x for x in profile["links"] if x["source"] == "cpu" and x["target"] == "gpu")
    given = link["bandwidth_bytes_per_s"]["achieved"]
    assert (given["value"], given["source"]) == (24e9, "given")
    assert given["note"] == "given on the command line: --set h2d-bandwidth=24GB/s"
    assert link["bandwidth_bytes_per_s"]["datasheet"] is None, "it is no data sheet's any more"
    other = next(x for x in profile["links"] if x["source"] == "gpu")
    assert other["bandwidth_bytes_per_s"]["achieved"]["source"] == "assumed"


@pytest.mark.usefixtures("coarse_searches")
def test_what_is_given_is_told_of_several_machines_and_of_none_if_nothing_is(hrm, hrm_json):
    args = ["--model", "mixtral-8x7b", *LENGTHS, "--gpus", "1xT4,1xL4"]
    assert "given on the command line: h2d-bandwidth 24.0 GB/s" in hrm("search", *args, *GIVEN[:2])[1]
    assert "given" not in hrm(*ESTIMATE)[1].replace("workload given", "")
    assert hrm_json(*ESTIMATE)["machine_given"] == {}


def options_of(remedy: str) -> list[str]:
    """The options that each remedy of a message consists of."""
    return remedy.removeprefix("try ").removeprefix("allow ").split(", or ")


def with_options(args: dict[str, str], remedy: str) -> list[str]:
    """A command line with the remedy's options in place of what they change."""
    words = re.sub(r" (?:with|and) (?=--)", " ", remedy).split()
    changed = {**args, **dict(zip(words[::2], words[1::2], strict=True))}
    return [word for pair in changed.items() for word in pair]


def infeasible(rng: Random) -> dict[str, str]:
    """A search on a machine that is probably too small."""
    gpus = rng.choice(["1xT4", "2xT4", "1xL4", "1xRTX-3090", "1xA100-80G", "1xV100-16G"])
    args = {
        "--model": rng.choice(["mixtral-8x7b", "dbrx", "deepseek-v2-lite", "qwen3-30b-a3b"]),
        "--gpus": gpus,
        "--requests": str(rng.randint(1, 3)),
        "--gen-len": str(rng.choice([1, 16, 200])),
        "--prompt-len": str(rng.choice([20, 3000, 1_000_000])),
    }
    if rng.random() < 0.7:
        args["--cpu-memory"] = f"{rng.uniform(10, 90):.1f}GB"
    elif gpus[0] == "1":
        args["--gpu-memory"] = f"{rng.uniform(0.2, 4):.2f}GB"
    if rng.random() < 0.7:
        args["--dtype"] = "float32"
    return args


def flat(args: dict[str, str]) -> list[str]:
    return [word for pair in args.items() for word in pair]


# Of machines that are too small some, to which every sort of remedy is told.
TOO_SMALL = [15, 16, 20, 30, 38]


@pytest.mark.usefixtures("coarse_searches")
@pytest.mark.parametrize("seeds", chosen([TOO_SMALL, [*range(60)]], at=(0,)), ids=["some", "many"])
def test_every_remedy_of_an_infeasible_search_makes_it_feasible(hrm, seeds):
    tried = Counter[str]()
    for seed in seeds:
        args = infeasible(Random(seed))
        code, _, err = hrm("search", *flat(args))
        if code == 0:
            continue
        assert "no policy fits" in err
        assert re.search(r"level (gpu|cpu) lacks [\d.]+ \w?B \([\d.]+ \w?B needed", err), err
        for remedy in options_of(err.strip().rpartition("; ")[2]):
            code, _, err = hrm("search", *with_options(args, remedy), "--json")
            assert code == 0, (args, remedy, err)
            tried[re.sub(r" [^- ]\S*", "", remedy)] += 1
    for remedy in ("--gpu-memory", "--cpu-memory", "--gpus", "--dtype"):
        assert tried[remedy] >= 2, tried
    assert tried["--gpu-memory --cpu-memory"], tried
    assert any("prompt-len" in remedy for remedy in tried), tried


@pytest.mark.parametrize(
    ("changes", "flag"), [({"--gpu-memory": "300MB"}, "--gpu-memory"), ({"--cpu-memory": "20GB"}, "--cpu-memory")]
)
def test_the_memory_that_is_asked_for_is_the_least(refused, changes, flag):
    args = {
        "--model": "mixtral-8x7b",
        "--gpus": "1xT4",
        "--prompt-len": "64",
        "--gen-len": "16",
        "--requests": "1",
        **changes,
    }
    said = refused("search", *flat(args))
    asked = parse_bytes(re.findall(rf"{flag} (\S+[GM]B)", said)[0])
    assert "no policy fits" in refused("search", *flat({**args, flag: f"{0.99 * asked:.0f}B"}))


MISFITS = {
    "too many residents": ["-u", "8", "-n", "4", "--resident-experts", "8"],
    "a few residents too many": ["-u", "8", "-n", "4", "--resident-experts", "2"],
    "too large micro-batches": ["-u", "80000", "-n", "4"],
    "too many of them": ["-u", "8000", "-n", "40"],
    "the cache on the GPU": ["-u", "800", "-n", "40", "--kv-on-gpu"],
    "both memories": ["-u", "8000", "-n", "40", "--resident-experts", "8"],
    "more than any machine has": ["-u", "1000000000000000", "-n", "1"],
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_every_remedy_of_a_policy_that_does_not_fit_makes_it_fit(refused, hrm, misfit):
    words = MISFITS[misfit]
    words = words if len(words) % 2 == 0 else [*words, "1"]
    args = dict(zip(words[::2], words[1::2], strict=True))
    said = refused("estimate", *T4, "--gen-len", "16", "--prompt-len", "64", *flat(args)).strip()
    remedies = said.rpartition("; ")[2].replace(" is enough", "").split(", or ")
    assert len(remedies) == (1 if misfit == "more than any machine has" else 2)
    for remedy in remedies:
        words = remedy.replace(" with ", " ").split()
        changed = flat({**args, **dict(zip(words[::2], words[1::2], strict=True))})
        code, _, err = hrm("estimate", *T4, "--gen-len", "16", "--prompt-len", "64", *changed)
        assert code == 0, (remedy, err)


@pytest.mark.parametrize(
    ("model", "gpus", "sizes"),
    [("qwen3-30b-a3b", "1xL4", ["-u", "32", "-n", "4"]), ("mixtral-8x7b", "4xT4", ["-u", "90000", "-n", "1"])],
)
def test_no_more_residents_are_given_up_than_must_be(refused, hrm, model, gpus, sizes):
    args = ["estimate", "--model", model, "--gpus", gpus, "--gen-len", "16", "--prompt-len", "64"]
    said = refused(*args, *sizes, "--resident-experts", "8" if model == "mixtral-8x7b" else "90")
    remedy = said.strip().rpartition(", or ")[2].split()
    count = int(remedy[remedy.index("--resident-experts") + 1])
    assert count > 0
    fits, more = ([*args, *sizes, *remedy[:-1], str(number)] for number in (count, count + 1))
    merged = [dict(zip(words[1::2], words[2::2], strict=True)) for words in (fits, more)]
    assert hrm("estimate", *flat(merged[0]))[0] == 0
    refused("estimate", *flat(merged[1]))


def test_the_level_of_a_machine_without_a_gpu_is_not_given_gpu_memory(refused, tmp_path):
    path = tmp_path / "cpu.yaml"
    alone = replace(machine(), levels=machine().levels[1:], links=(), accelerator="cpu")
    save_profile(path, alone)
    args = ["--model", "dbrx", "--profile", path]
    for command in (["search"], ["estimate", "-u", "1", "-n", "1"]):
        said = refused(*command, *args)
        assert "level cpu" in said
        assert "--cpu-memory" in said
        assert "--gpu-memory" not in said


# ------------------------------------------------------------------------------ waiting times


@pytest.mark.usefixtures("coarse_searches")
def test_first_tokens_come_when_the_simulation_of_prefill_has_them():
    for name, workload in (("mixtral-8x7b", "mtbench"), ("qwen3-30b-a3b", "summarization")):
        spec, profile = BUILT_IN_MODELS[name], compose("1xL4")
        asked = replace(WORKLOADS[workload], num_requests=60)
        best = search(Space(spec, profile, asked)).require()
        costs = Costs(spec, profile, best.policy.formats)
        spans = simulate_work(prefill_work(costs, best.policy, asked)).spans
        ends = [span.end_s for span in spans if span.id.act.ends_step]
        assert best.num_batches == 1
        assert best.latency.last_ttft_s == pytest.approx(max(ends), rel=0.01)
        assert best.latency.mean_ttft_s == pytest.approx(sum(ends) / len(ends), rel=0.02)
        assert best.latency.tpot_s == pytest.approx(best.decode.seconds / asked.decode_steps)


def test_a_requests_latency_is_that_of_its_batch_whatever_the_number_of_batches():
    spec, profile = BUILT_IN_MODELS["mixtral-8x7b"], compose("1xL4")
    workload = replace(WORKLOADS["mtbench"], num_requests=32)
    policy = search(Space(spec, profile, workload)).require().policy
    once = estimate(spec, policy, profile, workload).latency
    for requests in (32 * 7, 32 * 7 + 3, None):
        many = estimate(spec, policy, profile, replace(workload, num_requests=requests))
        assert many.latency.last_ttft_s == pytest.approx(once.last_ttft_s)
        assert many.latency.tpot_s == pytest.approx(once.tpot_s)


@pytest.mark.usefixtures("coarse_searches")
def test_a_pipelines_batch_passes_all_stages():
    spec, profile = BUILT_IN_MODELS["mixtral-8x7b"], compose("4xT4")
    space = Space(spec, profile, WORKLOADS["mtbench"], dtype="float16", parallelism=Parallelism.PIPELINE)
    best = search(space).require()
    # Prefill of a batch counts its share of what the last stage waits for the first batch: three parts of four, but for
    # one of eight layers.
    assert best.latency.last_ttft_s == pytest.approx(4 * best.prefill.seconds / (1 + 3 / 4 * 7 / 8))
    assert best.latency.tpot_s == pytest.approx(4 * best.decode.seconds / 127)


@pytest.mark.parametrize("gpus", chosen(["1xT4", "1xL4", "4xT4"], at=(1, 2)))
def test_a_search_within_limits_finds_what_keeps_them_and_is_nearly_the_best(gpus):
    spec, profile = BUILT_IN_MODELS["mixtral-8x7b"], compose(gpus)
    dtype = profile.default_dtype
    workload = replace(WORKLOADS["mtbench"], num_requests=24)
    ffn = Device.CPU if profile.num_gpus > 1 else None  # of each way to share GPUs half of a search
    space = Space(spec, profile, workload, dtype=dtype, ffn=ffn)
    free = search(space).require()
    assert free.latency.tpot_s is not None
    for ttft, tpot in ((0.95, None), (None, 0.5), (0.97, 0.8)):
        limits = LatencyLimits(
            max_ttft_s=None if ttft is None else ttft * free.latency.last_ttft_s,
            max_tpot_s=None if tpot is None else tpot * free.latency.tpot_s,
        )
        result = search(replace(space, limits=limits))
        if result.best is None:
            assert result.outcome is Outcome.TOO_SLOW
            continue
        for found in (result.best, *result.runner_ups):
            assert limits.are_met(found.latency)
        assert result.best.tokens_per_s <= 1.002 * free.tokens_per_s
        if profile.num_gpus == 1:
            best = best_within(spec, profile, workload, dtype, limits)
            assert result.best.tokens_per_s >= 0.97 * best


def best_within(spec, profile, workload, dtype, limits) -> float:
    """The best throughput within limits of some policies by themselves."""
    rng, best = Random(3), 0.0
    for _ in range(40):
        size, number = rng.randint(1, 24), rng.choice([1, 1, 2, 3, 6])
        batch = min(size * number, 24)
        size, number = min(size, batch), -(-batch // min(size, batch))
        attention = rng.choice(list(Device))
        chunk = max(workload.max_prompt_len, min(round(batch * workload.prompt_len), 1672))
        policy = Policy(
            batch_size=batch,
            micro_batch_size=size,
            attention=attention,
            ffn=rng.choice(list(Device)),
            resident_experts=(rng.randint(0, 1),) * spec.num_layers,
            gpu_kv_micro_batches=0,
            kv_tokens_per_micro_batch=kv_tokens_for(size, workload.mean_context_len, workload.max_context_len),
            prefill_chunk_tokens=chunk,
            dtype=dtype,
        )
        predicted = estimate(spec, policy, profile, workload)
        if predicted.memory.fits and limits.are_met(predicted.latency):
            best = max(best, predicted.tokens_per_s)
    return best


@pytest.mark.usefixtures("coarse_searches")
def test_limits_that_nothing_keeps_are_told_with_some_that_can_be_kept(refused, hrm):
    args = {"--model": "mixtral-8x7b", "--gpus": "1xT4", "--prompt-len": "64", "--gen-len": "16", "--requests": "4"}
    for limits in ({"--max-ttft": "1s"}, {"--max-tpot": "20ms"}, {"--max-ttft": "1s", "--max-tpot": "20ms"}):
        said = refused("search", *flat({**args, **limits}))
        assert "policies fit, but none answers within the limits" in said
        (remedy,) = options_of(said.strip().rpartition("; ")[2])
        assert set(remedy.split()[::3]) == set(limits), remedy
        code, out, err = hrm("search", *with_options({**args, **limits}, remedy))
        assert code == 0, (remedy, err)
        assert "first tokens within" in out


def test_an_estimate_that_misses_a_limit_is_refused_with_one_that_it_keeps(refused, hrm):
    for flag, short in (("--max-ttft", "1s"), ("--max-tpot", "10ms")):
        said = refused(*ESTIMATE, flag, short)
        assert said.startswith(f"error: {flag} is <")
        allowed = re.findall(rf"allow {flag} (\S+),", said)[0]
        assert hrm(*ESTIMATE, flag, allowed)[0] == 0


@pytest.mark.usefixtures("coarse_searches")
def test_limits_hold_on_several_machines_and_along_a_front(hrm):
    def rows_of(*args: str) -> list[dict]:
        code, out, _ = hrm(*args, "--json")
        assert code == 0
        return json.loads(out)["rows"]

    args = ["--model", "mixtral-8x7b", "--ffn", "cpu", *LENGTHS, "--max-tpot", "2s"]
    rows = rows_of("search", *args, "--gpus", "1xT4,1xL4")
    free = rows_of("search", *args[:-2], "--gpus", "1xT4,1xL4")
    slower = {row["machine"]: row["tokens_per_s"] for row in rows}
    assert all(slower[row["machine"]] <= row["tokens_per_s"] * 1.002 for row in free)
    assert slower != {row["machine"]: row["tokens_per_s"] for row in free}
    front = rows_of("search", *args, "--gpus", "1xT4", "--pareto", "latency")
    assert all(row["time_per_output_token_s"] <= 2 for row in front if not row["reason"])


@pytest.mark.parametrize("command", [["search"], ["estimate", "-u", "8", "-n", "4"]])
def test_one_token_a_request_has_no_decode(hrm, hrm_json, command):
    args = [*command, *T4, "--prompt-len", "64", "--gen-len", "1", "--requests", "64"]
    code, out, _ = hrm(*args)
    assert code == 0
    assert "decode" not in out
    assert "a token every" not in out
    predicted = hrm_json(*args)["predicted"]
    assert predicted["time_per_output_token_s"] is None
    assert predicted["bottleneck"]["decode"] is None
    assert predicted["decode_s"] == 0


# ------------------------------------------------------------------ ranges of assumed figures


def test_the_range_of_a_link_bound_plan_is_that_of_its_link():
    spec, profile = tiny_spec(), machine(link=1e8, gpu_bytes=GB, cpu_read=1e13, gpu_read=1e14)
    workload = replace(WORKLOADS["mtbench"], num_requests=32)
    policy = search(Space(spec, profile, workload, ffn=Device.GPU, attention=Device.GPU)).require().policy
    policy = replace(policy, resident_experts=(0,) * spec.num_layers, resident_dense=False)
    ends = throughput_range(spec, policy, profile, workload)
    now = estimate(spec, policy, profile, workload)
    assert now.limits.decode.cause is Cause.H2D_LINK
    assert ends is not None
    assert ends.assumed == ("cpu to gpu bandwidth",)
    assert ends.low_tokens_per_s / now.tokens_per_s == pytest.approx(0.7, rel=0.02)
    assert ends.high_tokens_per_s / now.tokens_per_s == pytest.approx(1.3, rel=0.02)


def with_link(profile, figure: Figure):
    links = tuple(
        replace(link, bandwidth_bytes_per_s=Rate(achieved=figure)) if link == profile.h2d else link
        for link in profile.links
    )
    return replace(profile, links=links)


def exact(profile):
    """The machine with every figure from a data sheet."""
    text = dump_profile(profile).replace("source: assumed", "source: datasheet")
    return decode_strictly(yaml.safe_load(text), HardwareProfile, "")


def test_figures_that_are_known_have_no_range_and_measured_ones_that_of_their_spread():
    spec, profile = tiny_spec(), exact(machine(link=1e8, gpu_bytes=GB))
    workload = replace(WORKLOADS["mtbench"], num_requests=32)
    policy = search(Space(spec, profile, workload, ffn=Device.GPU)).require().policy
    policy = replace(policy, resident_experts=(0,) * spec.num_layers, resident_dense=False)
    assert throughput_range(spec, policy, profile, workload) is None
    measured = Figure(value=1e8, source=Source.MEASURED, samples=9, p20=0.8e8, p80=1.1e8)
    ends = throughput_range(spec, policy, with_link(profile, measured), workload)
    assert ends is not None
    assert (ends.assumed, ends.spread) == ((), ("cpu to gpu bandwidth",))
    slow, fast = (
        estimate(spec, policy, with_link(profile, replace(measured, value=value)), workload).tokens_per_s
        for value in (0.8e8, 1.1e8)
    )
    assert ends.low_tokens_per_s == pytest.approx(slow)
    assert ends.high_tokens_per_s == pytest.approx(fast)


def test_reports_tell_the_range_and_what_it_comes_from(hrm, hrm_json):
    args = ["search", "--model", "qwen3-30b-a3b", "--gpus", "1xH100"]
    plan = hrm_json(*args)["predicted"]
    ends = plan["tokens_per_s_range"]
    assert ends["low_tokens_per_s"] < plan["tokens_per_s"] < ends["high_tokens_per_s"]
    assert "gpu compute in bfloat16" in ends["assumed"]
    assert "tokens/s, if assumed figures are up to 30% off (gpu compute" in hrm(*args)[1]
    given = hrm_json(*args, "--set", "gpu-flops=400TFLOP/s")["predicted"]["tokens_per_s_range"]
    assert "gpu compute in bfloat16" not in given["assumed"], "what is given is known"


# ------------------------------------------------------------------------- what can be done


def test_only_what_the_executor_has_is_said_to_run(hrm, tmp_path):
    planned_only = tmp_path / "config.json"
    planned_only.write_text(json.dumps({"model_type": "jamba", **SMALL_JAMBA}))
    lengths = ["--prompt-len", "64", "--gen-len", "8", "--requests", "8"]
    for model, gpus, reason in (
        ("mixtral-8x7b", "1xT4", ""),
        (str(planned_only), "1xT4", "does not know the family jamba; hrm models lists"),
        ("dbrx", "4xT4", ""),
        ("olmoe-1b-7b", "2xT4", "cannot divide olmoe-1b-7b, whose query_norm needs all that ranks have"),
    ):
        sizes = ["-u", "1", "-n", "1", "--attention", "gpu"]
        code, out, _ = hrm("estimate", "--model", model, "--gpus", gpus, *lengths, *sizes)
        assert code == 0
        assert ("executor run --model" in out) == (not reason)
        assert ("a prediction only: executor run" in out) == bool(reason)
        assert reason in out


def test_weights_that_are_published_quantised_are_converted_before_they_are_run(tmp_path):
    stored = replace(BUILT_IN_MODELS["mixtral-8x7b"], published_dtype="fp8")
    profile = compose("1xT4")
    by_name = run_text("mixtral-8x7b", Path("p.json"), spec=stored, stored=stored, profile=profile)
    assert "FOLDER-WITH-WEIGHTS --policy p.json" in by_name
    assert "(after converting the published weights (fp8) to bfloat16, float16 or float32)" in by_name
    in_folder = run_text(str(tmp_path), None, spec=stored, stored=stored, profile=profile)
    assert "a prediction only: executor run reads no fp8 weights; convert them to bfloat16" in in_folder
    plain, gpt_oss = BUILT_IN_MODELS["mixtral-8x7b"], BUILT_IN_MODELS["gpt-oss-20b"]
    for as_stored in (plain, gpt_oss):
        told = run_text(str(tmp_path), Path("p.json"), spec=as_stored, stored=as_stored, profile=profile)
        assert f"executor run --model {tmp_path} --policy p.json" in told
        assert "after" not in told
    otherwise = run_text(str(tmp_path), None, spec=gpt_oss.without_packing, stored=gpt_oss, profile=profile)
    assert "reads weights as they are stored: experts in mxfp4; plan so[/]" in otherwise


@pytest.mark.parametrize(
    ("name", "is_written"),
    [("int4-g32", True), ("fp8-b128", True), ("mxfp4", True), ("int8", True), ("nvfp4", False), ("int4-g24", False)],
)
def test_quantise_is_advised_for_the_formats_that_it_writes(tmp_path, name, is_written):
    plain, profile = BUILT_IN_MODELS["mixtral-8x7b"], compose("1xT4")
    form = packed_format(name)
    assert form is not None
    packed = packed_as(plain, form)
    by_name = run_text("mixtral-8x7b", Path("p.json"), spec=packed, stored=plain, profile=profile)
    in_folder = run_text(str(tmp_path), Path("p.json"), spec=packed, stored=plain, profile=profile)
    assert in_folder.startswith(
        "[dim]a prediction only: executor run reads weights as they are stored: no matrix packed"
    )
    for told in (by_name, in_folder):
        assert (f"executor quantise --format {name}" in told) == is_written
    if not is_written:
        assert f"finding weights with experts in {name}, which executor quantise does not write" in by_name
        assert in_folder.endswith("; plan so[/]")
    with nullcontext() if is_written else pytest.raises(ModelError):
        publication_of(name, "bf16", stacked=False)  # what the command itself asks


def test_one_count_of_residents_is_that_of_every_layer_with_experts(hrm, hrm_json, refused):
    args = ["estimate", "--model", "deepseek-v2-lite", "--gpus", "1xT4", "-u", "8", "-n", "4"]
    args = [*args, "--resident-experts"]
    assert hrm_json(*args, "8")["policy"]["resident_experts"] == [0] + [8] * 26
    assert "8 of 64 a layer with experts stay on the GPU" in hrm(*args, "8")[1]
    each = ",".join(["0", *["7"] * 26])
    assert hrm_json(*args, each)["policy"]["resident_experts"][1] == 7
    said = refused(*args, ",".join(["8"] * 27))
    assert "--resident-experts of layer 0 is 8: the layer has no experts" in said


@pytest.mark.parametrize("model", ["deepseek-v2-lite", "kimi-k2", "glm-4.5-air"])
def test_models_with_dense_layers_are_estimated_on_one_level(hrm_json, tmp_path, model):
    path = tmp_path / "cpu.yaml"
    alone = replace(machine(), levels=machine().levels[1:], links=(), accelerator="cpu")
    save_profile(path, alone)
    args = ["estimate", "--model", model, "--profile", path, "--cpu-memory", "9TB"]
    plan = hrm_json(*args, "-u", "2", "-n", "2", "--resident-experts", "1")
    assert plan["policy"]["paper_tuple"]["r_w"] == 1


# ------------------------------------------------------------------------------- near ties


def test_of_plans_that_are_nearly_as_fast_the_smaller_is_chosen():
    """Where the GPU's compute limits all, throughput hardly grows with the batch."""
    spec = BUILT_IN_MODELS["qwen3-30b-a3b"]
    profile, workload = compose("1xH100"), WORKLOADS["mtbench"]
    result = search(Space(spec, profile, workload))
    best = result.require()
    fastest = max(result.runner_ups, key=lambda one: one.tokens_per_s)
    assert best.policy.batch_size < 0.8 * fastest.policy.batch_size
    assert (1 - TIE) * fastest.tokens_per_s <= best.tokens_per_s < fastest.tokens_per_s


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["RTX4090", "rtx-4090", "4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "rtx_4090"])
def test_a_gpu_is_shown_however_its_name_is_spelled(hrm, name):
    code, out, _ = hrm("profiles", name, "--table")
    assert code == 0
    assert out.startswith("RTX-4090")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("A100", "did you mean A100-40G or A100-80G or A100-PCIe-80G?"),
        ("90", "did you mean RTX-"),
        ("A10", "did you mean A10G"),
        ("gcp-n1", "did you mean gcp-n1-"),
        ("attic", "alone lists"),
    ],
)
def test_a_name_of_none_or_of_several_is_refused_with_what_there_is(refused, name, said):
    assert said in refused("profiles", name)


def test_the_same_spellings_name_the_gpus_of_a_machine_and_its_host():
    assert compose("2x4090").name == compose("2xRTX-4090").name
    assert compose("1x tesla t4", "GCP n1 highmem 64").name == compose("1xT4").name


@pytest.mark.usefixtures("coarse_searches")
def test_names_with_what_styles_are_written_with_are_printed_as_they_are(hrm, tmp_path):
    model, gpu, policy = tmp_path / "[x] [bold]m", tmp_path / "gpu.yaml", tmp_path / "policy.json"
    name = "[bold]a[/] [/x]"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**PUBLISHED["mixtral-8x7b"], "num_hidden_layers": 2}))
    gpu.write_text(dump_profile(replace(load_gpu("T4"), name=name)))
    both, plan = [model.name, name], ["--model", model, *LENGTHS, "--gpus"]
    for command, told in (
        (["search", *plan, gpu], both),
        (["search", *plan, f"T4,{gpu}"], both),
        (["estimate", *plan, gpu, "-u", "8", "-n", "4", "--out", policy], both),
        (["simulate", "--policy", policy, "--steps", "1"], both),
        (["models", model], [model.name]),
        (["profiles", gpu, "--table"], [name]),
        (["profiles", "diff", "1xT4", gpu], [name]),
    ):
        code, out, err = hrm(*command)
        assert (code, err) == (0, ""), command
        assert [each for each in told if each not in out] == [], command


# ------------------------------------------------------------------------------ words for newcomers


def test_the_two_bounds_of_a_page_are_told_apart(hrm):
    _, out, _ = hrm("search", *T4, *LENGTHS)
    one = re.search(r"% of ([\d.,]+), the bound of this policy, if nothing waited", out)
    every = re.search(r"no policy at all can exceed ([\d.,]+) tokens/s", out)
    assert one is not None
    assert every is not None
    assert float(every[1]) >= float(one[1])
    assert out.count("bound") == 1


@pytest.mark.parametrize("gpus", ["4xT4", "1xT4", "1xL4"])
def test_why_a_faster_policy_is_not_chosen_is_said_where_there_is_one(hrm, hrm_json, gpus):
    args = ["search", "--model", "dbrx", "--gpus", gpus, "--cpu-memory", "400GB"]
    found = hrm_json(*args)
    rates = [each["predicted"]["tokens_per_s"] for each in found["runner_ups"]]
    is_faster = any(rate > found["predicted"]["tokens_per_s"] for rate in rates)
    assert ("equally fast to 0.1% the smallest batch is chosen" in hrm(*args)[1]) == is_faster


def test_a_named_workload_with_other_lengths_is_not_called_by_its_name_alone(hrm_json):
    args = ["estimate", *T4, "-u", "8", "-n", "4", "--workload", "mtbench"]
    named = {None: "mtbench", "--gen-len": "mtbench with other lengths", "--requests": "mtbench"}
    for option, name in named.items():
        words = [] if option is None else [option, "64"]
        assert hrm_json(*args, *words)["workload"]["name"] == name


def test_tables_name_what_limits_the_whole_job_as_their_throughput_is_its(hrm, hrm_json):
    args = ["search", "--model", "mixtral-8x7b", "--gpus", "1xA10G,1xL4"]
    rows = hrm_json(*args)["rows"]
    assert any(row["bottleneck"] != row["decode_bottleneck"] for row in rows)
    lines = hrm(*args)[1].splitlines()
    assert any(line.rstrip().endswith("limited by") for line in lines)
    for row in rows:
        assert any(line.startswith(row["machine"]) and line.rstrip().endswith(row["bottleneck"]) for line in lines)


@pytest.mark.parametrize(
    "words",
    [
        ["search", "--model", "gpt-oss-20b", "--gpus", "8xH100"],
        ["search", "--model", "gpt-oss-20b", "--gpus", "8xH100,4xH100"],
        ["search", "--model", "olmoe-1b-7b", "--fleet", "9000x(1xT4)", "--prices", "1xT4=1234.5"],
        ["search", *T4, "--prompt-len", "1234567", "--gen-len", "1", "--requests", "1", "--cpu-memory", "9TB"],
    ],
)
@pytest.mark.usefixtures("coarse_searches")
def test_nothing_is_printed_with_an_exponent(hrm, words):
    out = "".join(hrm(*words)[1:])
    assert not re.search(r"\de[+-]?\d", out), out


def test_a_folder_without_a_config_is_told_so(refused, tmp_path):
    said = refused("search", "--model", str(tmp_path), "--gpus", "1xT4")
    assert (
        said == f"error: --model is '{tmp_path}': has no config.json; download it too, or name the folder that has it\n"
    )


def test_what_a_fleet_costs_is_told_by_what_is_paid(hrm):
    _, out, _ = hrm(
        "search", "--model", "olmoe-1b-7b", "--fleet", "2x(1xT4)", "--prices", "1xT4=0.5", "--requests", "99"
    )
    assert "tokens for each 1 paid" in " ".join(out.split())
    assert re.search(r"; at 1 an hour, [\d,]+ tokens for each 1 paid; [\d.]+ to pay for the job", out)


def test_a_dash_is_no_file_to_write(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(*ESTIMATE, "--out", "-") == "error: --out is '-': must be a file; name one, or /dev/stdout\n"
    assert not list(tmp_path.iterdir())
