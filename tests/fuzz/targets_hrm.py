"""The readers of hrm: machines, models, policies, runs, traces, journals and command-line texts."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final
from zlib import crc32

import msgspec
import numpy as np
from gguf import GGUFWriter

from hrm.catalog import profile_folder
from hrm.cli.analysis import _axis
from hrm.cli.fleet import _fleet_of
from hrm.cli.machine_choice import MachineChoice
from hrm.cli.machine_table import print_card, print_host, print_profile
from hrm.cli.models import _print_model, model_json
from hrm.cli.profiles import profiles as profiles_command
from hrm.cli.validate import print_fleet, print_validation
from hrm.decoding import read_json_object, read_yaml
from hrm.errors import HrmError, ModelError, ProfileError
from hrm.estimate import estimate
from hrm.formats import packed_format
from hrm.hardware import GpuCard, HardwareProfile, Host, Rate
from hrm.machines import assemble, compose, dump_profile, load_gpu, load_host, load_profile, one_part, save_profile
from hrm.memory import plan_memory
from hrm.model_spec import ModelSpec, decoder_keys, load_model, spec_from_hf_config
from hrm.model_spec.published_dtype import MODELOPT_FILE
from hrm.model_spec.quantisation import quantisation
from hrm.model_spec.stored_formats import stored_formats
from hrm.policy import Policy, ScheduleName, kv_tokens_for
from hrm.policy_file import load_policy_file, policy_file_of, save_policy_file
from hrm.profiling.machine.journal import Journal
from hrm.profiling.timing import Timing
from hrm.routing import with_measured_routing
from hrm.run_record import FleetRecord, read_record, read_run
from hrm.scaling import resources, scale
from hrm.search import Space, search, solver_named
from hrm.strict import decode_strictly
from hrm.trace import lane_chart, read_chrome_trace, write_chrome_trace
from hrm.units import parse_bandwidth, parse_bytes, parse_flops, parse_seconds
from hrm.validate import validate as validated
from hrm.validate import validate_fleet
from hrm.workload import Workload
from tests.fuzz.mutations import as_json, as_lines, as_yaml
from tests.fuzz.targets import Target, written
from tests.hrm.published_configs import PUBLISHED
from tests.hrm.support import machine, tiny_spec

SPEC: Final = tiny_spec()
WORKLOAD: Final = Workload(name="fuzz", prompt_len=20, max_prompt_len=30, gen_len=4, num_requests=64)


@contextmanager
def shown() -> Iterator[io.StringIO]:
    """Output of the command line, which must not hold raw control characters."""
    with redirect_stdout(io.StringIO()) as out:
        yield out
    text = out.getvalue().replace("\n", "")
    assert text.isprintable(), next(repr(c) for c in text if not c.isprintable())


def plain(value: Any) -> Any:
    """The value as its JSON or YAML says it."""
    return json.loads(msgspec.json.encode(value))


def planned(spec: ModelSpec, profile: HardwareProfile, content: bytes) -> None:
    """For one input in 24 a search of the model on the machine, which takes its time; for three an estimate."""
    chosen = crc32(content) % 24
    if chosen == 0:
        best = search(Space(spec, profile, WORKLOAD, dtype=profile.default_dtype)).best
        if best is not None:
            estimate(spec, best.policy, profile, WORKLOAD)
    elif chosen % 6 == 0:
        estimate(spec, a_small_policy(spec, profile), profile, WORKLOAD)


def a_small_policy(spec: ModelSpec, profile: HardwareProfile) -> Policy:
    """Four requests in two micro-batches, with nothing on the GPU that need not be there."""
    return Policy(
        batch_size=4,
        micro_batch_size=2,
        resident_experts=(0,) * spec.num_layers,
        resident_dense=False,
        kv_tokens_per_micro_batch=int(kv_tokens_for(2, WORKLOAD.mean_context_len, WORKLOAD.max_context_len)),
        prefill_chunk_tokens=64,
        dtype=profile.default_dtype,
    )


# -- machines ---------------------------------------------------------------------------------


def use_profile(content: bytes, folder: Path) -> None:
    path = written(folder, "machine.yaml", content)
    profile = load_profile(path)
    save_profile(path, profile)
    assert load_profile(path) == profile, "what is written must read back the same"
    with shown():
        print_profile(profile)
    for resource in resources(profile):
        scale(profile, resource, 1.5)
    if profile.num_gpus > 1:
        one_part(profile, is_stage=True)
    planned(SPEC, profile, content)


def machines() -> list[Any]:
    names = ("1xT4", "4xA10G", "1xRTX-4090", "1xL4+1xA10G")
    measured = sorted((profile_folder() / "machines").glob("*.yaml"))
    made = [machine(), *(compose(name) for name in names), *map(load_profile, measured)]
    return [plain(profile) for profile in made]


def use_gpu(content: bytes, folder: Path) -> None:
    path = written(folder, "gpu.yaml", content)
    card = decode_strictly(read_yaml(path, "a GPU", ProfileError), GpuCard, str(path))
    dump_profile(card)
    with shown():
        print_card(card)
    planned(SPEC, assemble(card, 2, load_host("generic-server")), content)


def use_host(content: bytes, folder: Path) -> None:
    path = written(folder, "host.yaml", content)
    host = decode_strictly(read_yaml(path, "a host", ProfileError), Host, str(path))
    with shown():
        print_host(host)
    planned(SPEC, assemble(load_gpu("T4"), 1, host), content)


def use_diff(content: bytes, folder: Path) -> None:
    path = written(folder, "other.yaml", content)
    with shown():
        profiles_command.main(["diff", "1xT4", str(path), "--all"], standalone_mode=False)


# -- models, policies, runs -------------------------------------------------------------------


def use_config(content: bytes, folder: Path) -> None:
    path = written(folder, "some [x] model/config.json", content)
    spec = load_model(str(path.parent))
    with shown():
        _print_model(spec)
    model_json(spec)
    planned(spec, compose("1xA100-80G"), content)


MODELOPT: Final = {
    "producer": {"name": "modelopt", "version": "0.33.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    },
}


@cache
def a_policy_file() -> Any:
    profile = machine(gpu_bytes=1e8, cpu_bytes=1e9)
    best = search(Space(SPEC, profile, WORKLOAD)).require()
    return policy_file_of(best, SPEC, profile, WORKLOAD)


@cache
def a_gguf() -> bytes:
    """The file of a model that has an embedding and nothing else."""

    def add_embedding(writer: GGUFWriter) -> None:
        writer.add_token_list(["a", "b", "c", "d"])
        writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))

    return gguf_of(8, add_embedding)


def gguf_of(width: int, add_rest: Callable[[GGUFWriter], None]) -> bytes:
    """The file of a tiny model of that width, with the tensors and texts that are added to it."""
    path = Path(mkdtemp(prefix="hrm-fuzz-gguf-")) / "model.gguf"
    writer = GGUFWriter(path, "qwen3moe")
    for add in (writer.add_block_count, writer.add_expert_used_count, writer.add_head_count_kv):
        add(1)
    for add in (writer.add_head_count, writer.add_expert_count):
        add(2)
    for add in (writer.add_embedding_length, writer.add_key_length, writer.add_expert_feed_forward_length):
        add(width)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    add_rest(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def use_gguf(content: bytes, folder: Path) -> None:
    load_model(str(written(folder, "model.gguf", content)))


def use_quantisation(content: bytes, folder: Path) -> None:
    """What a config says of a model with experts in most layers, and a dense one."""
    path = written(folder, "quantisation.json", content)
    section = read_json_object(path, "JSON", ModelError, remedy="")
    config = PUBLISHED["deepseek-v3"]
    how = quantisation(decoder_keys({**config, "quantization_config": section}, "config.json"))
    if how is not None:
        for number, layer in enumerate(spec_from_hf_config(config, "x").layers[2:5]):
            assert all(packed_format(form) is not None for _, form in stored_formats(how, layer, number))


def use_modelopt(content: bytes, folder: Path) -> None:
    """What a file beside a config says of quantisation."""
    written(folder, "config.json", as_json(PUBLISHED["qwen3-30b-a3b"]))
    written(folder, MODELOPT_FILE, content)
    load_model(str(folder))


def use_policy(content: bytes, folder: Path) -> None:
    path = written(folder, "policy.json", content)
    plan = load_policy_file(path)
    save_policy_file(path, plan)
    assert load_policy_file(path) == plan, "what is written must read back the same"
    plan_memory(plan.model, plan.policy, plan.profile).check_fits()
    estimate(plan.model, plan.policy, plan.profile, plan.workload)


def a_run() -> Any:
    phase = {
        "seconds": 1.5,
        "step_s": {"n": 3, "median": 0.1, "p20": 0.1, "p80": 0.2},
        "kinds": {"LOAD_PAGE": {"count": 4, "seconds": 0.5, "num_bytes": 1000}},
        "lanes": {"GPU": {"busy_s": 1.0, "num_bytes": 0}, "H2D": {"busy_s": 0.7, "num_bytes": 9}},
    }
    level = {"capacity_bytes": 10**8, "planned_total_bytes": 10**7, "peak_total_bytes": 10**6}
    return {
        "schema": 1,
        "outcome": "completed",
        "schedule": "cgopipe",
        "message": None,
        "accelerator": {
            "name": "emulated",
            "description": "emulated [x]",
            "h2d_bytes_per_s": 1e9,
            "d2h_bytes_per_s": 1e9,
            "pageable": ["kv_cache"],
        },
        "totals": {
            "requests": 8,
            "prompt_tokens": 80,
            "generated_tokens": 32,
            "prefill_s": 0.5,
            "decode_s": 1.0,
            "tokens_per_s": 21.0,
        },
        "workload": {"prompt_len": 10.0, "max_prompt_len": 20, "gen_len": 4.0, "max_gen_len": 4},
        "phases": {"prefill": phase, "decode": phase},
        "memory": {"gpu": level, "cpu": level},
        "batches": [{"requests": 8, "decode_steps": 3}, {"requests": 4, "decode_steps": 3}],
        "routed_tokens": [[4, 3, 2, 1]] * SPEC.num_layers,
        "policy_file": plain(a_policy_file()),
    }


def a_fleet() -> Any:
    worker = {"worker": 1, "node": "a", "policy": "a.json", "outcome": "completed", "requests": 4, "run": a_run()}
    lost = {"worker": 2, "node": "b", "policy": "a.json", "outcome": "died"}
    totals = {"seconds": 3.0, "requests": 4, "generated_tokens": 20, "tokens_per_s": 7.0}
    return {"schema": 1, "outcome": "completed", **totals, "given_up": ["x"], "workers": [worker, lost]}


def use_run(content: bytes, folder: Path) -> None:
    written(folder, "run.json", content)
    record = read_record(folder)
    if isinstance(record, FleetRecord):
        fleet = validate_fleet(record)
        msgspec.json.encode(fleet.to_json())
        with shown():
            print_fleet(fleet)
        return
    validation = validated(read_run(folder))
    msgspec.json.encode(validation.to_json())
    with shown():
        print_validation(validation)


def use_routing(content: bytes, folder: Path) -> None:
    spec = with_measured_routing(SPEC, written(folder, "run.json", content))
    planned(spec, machine(gpu_bytes=1e8, cpu_bytes=1e9), content)


def some_traces() -> list[Any]:
    import tempfile

    from tests.hrm.test_policy_file import random_trace

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        write_chrome_trace(path, measured=random_trace(5), predicted=random_trace(6))
        return [json.loads(path.read_bytes())]


def use_trace(content: bytes, folder: Path) -> None:
    trace = read_chrome_trace(written(folder, "trace.json", content))
    assert trace.busy_s().keys() == trace.utilisation().keys()
    lane_chart(trace)


JOURNAL_KINDS: Final[dict[str, Any]] = {
    "launch": Timing,
    "gemm": Rate | None,
    "sweep": dict[int, Timing],
    "words": tuple[str, ...],
    "share": float,
}
MEASURES: Final = {"accelerator": "cpu", "mode": "quick"}


def some_journals() -> list[Any]:
    timing = plain(Timing(1e-6, 0.9e-6, 1.2e-6, 30))
    rate = {"achieved": {"value": 1e9, "source": "measured", "curve": [[1.0, 2.0], [4.0, 3.0]]}}
    found = (timing, rate, {"1": timing, "16": timing}, ["a", "b"], 0.5)
    steps = zip(JOURNAL_KINDS, found, strict=True)
    lines = [{"step": name, "seconds": 1.0, "found": value} for name, value in steps]
    return [[{"date": "today", "measures": MEASURES}, *lines]]


def use_journal(content: bytes, folder: Path) -> None:
    path = written(folder, "machine.yaml.partial", content)
    with closing(Journal(path, MEASURES, date="now", resume=True)) as journal:
        for name, kind in JOURNAL_KINDS.items():
            journal.recall(name, kind)
        assert journal.seconds >= 0
        journal.keep("more", 1.0, 2)


def some_studies() -> list[Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trials.log"
        _study(path)
        return [[json.loads(line) for line in path.read_bytes().splitlines()]]


def _study(path: Path) -> None:
    space = Space(
        spec=SPEC,
        profile=machine(gpu_bytes=1e8, cpu_bytes=1e9),
        workload=WORKLOAD,
        dtype="bfloat16",
        schedule=ScheduleName.CGOPIPE,
    )
    solver_named("optuna", trials=4, storage=str(path)).find(space)


def use_study(content: bytes, folder: Path) -> None:
    _study(written(folder, "trials.log", content))


# -- texts of the command line ----------------------------------------------------------------

TEXTS: Final = [
    b"16GB",
    b"15.5GiB",
    b"12GB/s",
    b"65TFLOP/s",
    b"4xT4",
    b"1xA100-80GB,2xL4",
    b"T4",
    b"h2d-bandwidth=24GB/s",
    b"cpu-memory=64GB",
    b"cpu=1:10:8",
    b"h2d-bandwidth=1GB/s:9GB/s:9",
    b"mixtral-8x7b",
    b"gcp-n1-highmem-64",
    b"paper-s1",
    b"50ms",
    b"1.5",
    b"3x(4xT4),2x(1xL4)",
    b"4xT4=2.40,1xL4=0.70",
]
READERS_OF_TEXTS: Final[list[Callable[[str], object]]] = [
    parse_bytes,
    parse_bandwidth,
    parse_flops,
    load_model,
    load_profile,
    lambda text: MachineChoice(gpus=text).machines(),
    lambda text: MachineChoice(gpus="T4", host=text).machines(),
    lambda text: MachineChoice(gpus="4xT4", changes=(text,)).machines(),
    lambda text: MachineChoice(gpus="T4", gpu_memory=text, cpu_memory=text).machines(),
    lambda text: _fleet_of(fleet=text, prices=None),
    lambda text: _fleet_of(fleet="3x(4xT4),2x(1xL4)", prices=text),
    parse_seconds,
    lambda text: _axis(text, "--x", log=False).points,
    lambda text: _axis(text, "--y", log=True).points,
]


def use_text(content: bytes, folder: Path) -> None:
    text = content.decode("utf-8", "surrogateescape")  # as arguments come
    for read in READERS_OF_TEXTS:
        try:
            read(text)
        except HrmError as error:
            check_message(error)


def check_message(error: HrmError) -> None:
    """One line that a terminal shows as it stands, and not a long one."""
    assert str(error).isprintable(), str(error)
    assert len(str(error)) < 2500, len(str(error))


HRM_TARGETS: Final = (
    Target(name="profile", bases=machines, use=use_profile, dump=as_yaml),
    Target(name="gpu", bases=lambda: [plain(load_gpu(x)) for x in ("T4", "H100", "MI300X")], use=use_gpu, dump=as_yaml),
    Target(name="host", bases=lambda: [plain(load_host("gcp-n1-highmem-64"))], use=use_host, dump=as_yaml),
    Target(name="diff", bases=machines, use=use_diff, dump=as_yaml, share=0.5),
    Target(name="config", bases=lambda: list(PUBLISHED.values()), use=use_config),
    Target(name="gguf", bases=lambda: [a_gguf()], use=use_gguf, has_values=False),
    Target(name="modelopt", bases=lambda: [MODELOPT], use=use_modelopt, share=0.5),
    Target(name="policy", bases=lambda: [plain(a_policy_file())], use=use_policy, share=2),
    Target(name="run", bases=lambda: [a_run(), a_fleet()], use=use_run, share=2),
    Target(name="routing", bases=lambda: [{"routed_tokens": [[4, 3, 2, 1]] * 4}], use=use_routing),
    Target(name="trace", bases=some_traces, use=use_trace),
    Target(name="journal", bases=some_journals, use=use_journal, dump=as_lines),
    Target(name="study", bases=some_studies, use=use_study, dump=as_lines, share=0.06),
    Target(name="texts", bases=lambda: list(TEXTS), use=use_text, has_values=False),
)
