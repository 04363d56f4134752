"""Policy files and traces: what is written reads back, and what is wrong is named."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.errors import PolicyError, ProfileError, TraceError
from hrm.estimate import estimate
from hrm.formats import FORMATS
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import load_policy_file, policy_file_of, profile_hash, save_policy_file
from hrm.strict import decode_strictly
from hrm.tasks import Device, Lane, TaskId
from hrm.trace import Span, Trace, lane_chart, read_chrome_trace, write_chrome_trace
from hrm.workload import Workload
from tests.contracts.tasks import EVERY_ACT, act
from tests.hrm.support import machine, tiny_spec

AGAIN = "correct it, or write the file again with hrm search --out"
WORKLOAD = Workload(name="test", prompt_len=12.5, max_prompt_len=20, gen_len=4, num_requests=40)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    micro_batch_size = draw(st.integers(1, 50))
    batch_size = draw(st.integers(micro_batch_size, 500))
    return Policy(
        schedule=draw(st.sampled_from(ScheduleName)),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        attention=draw(st.sampled_from(Device)),
        ffn=draw(st.sampled_from(Device)),
        resident_experts=tuple(draw(st.lists(st.integers(0, 4), min_size=4, max_size=4))),
        resident_dense=draw(st.booleans()),
        gpu_kv_micro_batches=draw(st.integers(0, -(-batch_size // micro_batch_size))),
        kv_tokens_per_micro_batch=16 * draw(st.integers(1, 1000)),
        prefill_chunk_tokens=draw(st.integers(1, 10**6)),
        staging=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(FORMATS))),
        weight_format=draw(st.sampled_from(["", *FORMATS])),
        kv_format=draw(st.sampled_from(["", *FORMATS])),
    )


A_POLICY = Policy(
    batch_size=40,
    micro_batch_size=10,
    resident_experts=(1, 2, 1, 2),
    gpu_kv_micro_batches=1,
    kv_tokens_per_micro_batch=256,
    prefill_chunk_tokens=64,
)
SPEC, MACHINE = tiny_spec(), machine(gpu_bytes=1e8, cpu_bytes=1e9)
PREDICTED = estimate(SPEC, A_POLICY, MACHINE, WORKLOAD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("policies")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(policy=policies())
def test_a_policy_file_reads_back_as_it_was_written(folder, policy):
    content = policy_file_of(replace(PREDICTED, policy=policy), SPEC, MACHINE, WORKLOAD)
    save_policy_file(folder / "policy.json", content)
    assert load_policy_file(folder / "policy.json") == content
    assert [path.name for path in folder.iterdir()] == ["policy.json"], "nothing partial is left"


def test_a_policy_file_from_before_formats_were_told_apart_has_its_dtype_for_all(folder):
    content = policy_file_of(replace(PREDICTED, policy=A_POLICY), SPEC, MACHINE, WORKLOAD)
    save_policy_file(folder / "new.json", content)
    plain = json.loads((folder / "new.json").read_text())
    del plain["policy"]["weight_format"], plain["policy"]["kv_format"]
    (folder / "old.json").write_text(json.dumps(plain))
    assert load_policy_file(folder / "old.json") == content


def test_a_policy_file_carries_budgets_machine_and_prediction():
    content = policy_file_of(PREDICTED, SPEC, MACHINE, WORKLOAD)
    assert content.memory_budget_bytes == {"gpu": 10**8, "cpu": 10**9}
    assert content.predicted["tokens_per_s"] == PREDICTED.tokens_per_s
    assert content.profile_hash == profile_hash(MACHINE)
    assert content.profile_hash != profile_hash(machine(gpu_bytes=1e8 + 1, cpu_bytes=1e9))


MALFORMED = [
    (("policy", "batch_size"), None, "batch_size"),
    (("policy", "batch_size"), "forty", r"policy\.batch_size is 'forty'"),
    (("policy", "batch_size"), 9, "batch_size is 9: must be at least micro_batch_size 10"),
    (("policy", "gpu_kv_micro_batches"), 5, "gpu_kv_micro_batches is 5: must lie between 0 and"),
    (("policy", "kv_tokens_per_micro_batch"), 250, "multiple of the KV block of 16 tokens"),
    (("policy", "resident_experts"), [1, 2, 1], "one count for each of the 4 layers"),
    (("policy", "resident_experts"), [1, 2, 1, 5], "at most the 4 experts of tiny"),
    (("policy", "resident_experts"), [1, 2, 1, -1], "count of at least 0"),
    (("policy", "attention"), "tpu", r"policy\.attention is 'tpu'"),
    (("policy", "dtype"), "int4", r"json: policy\.dtype is 'int4': must be one of float32"),
    (("policy", "schedule"), "s5", r"policy\.schedule is 's5'"),
    (("model", "order"), [], "model.order is <0 layers>: must be at least one"),
    (("workload", "gen_len"), 0, "gen_len is 0"),
    (("memory_budget_bytes",), None, "memory_budget_bytes"),
    (("memory_budget_bytes", "gpu"), -1, "memory_budget_bytes.gpu is -1: must be a positive"),
    (("memory_budget_bytes", "cpu"), None, "memory_budget_bytes.cpu is <missing>"),
    (("profile", "num_gpus"), 0, "num_gpus is 0: must be at least 1"),
    (("schema",), 99, "schema is 99: must be 1"),
    (("profile", "levels"), [], "levels"),
]


@pytest.mark.parametrize(("where", "value", "message"), MALFORMED)
def test_a_malformed_policy_file_is_refused_by_file_and_field(tmp_path, where, value, message):
    path = tmp_path / "policy.json"
    save_policy_file(path, policy_file_of(PREDICTED, SPEC, MACHINE, WORKLOAD))
    content = json.loads(path.read_text())
    *parents, key = where
    node = content
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[key]
    else:
        node[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match=message) as caught:
        load_policy_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "remedy"),
    [
        ("policy", "atention", "cpu", "did you mean attention?"),
        ("policy", "schedule", "cgopip", "did you mean cgopipe?"),
        ("policy", "schedule", "s5", AGAIN),
        ("policy", "batch_size", 9, AGAIN),
        ("workload", "gen_len", 0, AGAIN),
    ],
)
def test_the_remedy_is_the_word_that_was_meant_or_what_helps_with_a_policy_file(tmp_path, section, key, value, remedy):
    path = tmp_path / "policy.json"
    save_policy_file(path, policy_file_of(PREDICTED, SPEC, MACHINE, WORKLOAD))
    content = json.loads(path.read_text())
    content[section][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError) as caught:
        load_policy_file(path)
    assert (caught.value.where, caught.value.remedy) == (f"{path}: {section}.{key}", remedy)


@dataclass(frozen=True)
class Colour:
    name: str

    def __post_init__(self) -> None:
        if self.name == "mauve":
            raise PolicyError("name", self.name, "must be one that is made", "name another, like red")


@pytest.mark.parametrize(
    ("plain", "remedy"),
    [
        ({"name": "mauve"}, "buy paint"),
        ({"name": 3}, "buy paint"),
        ({}, "buy paint"),
        ({"name": "red", "nam": 1}, "did you mean name?"),
    ],
)
def test_what_a_kind_of_file_says_of_mistakes_replaces_what_its_values_say(plain, remedy):
    with pytest.raises(ProfileError) as caught:
        decode_strictly(plain, Colour, "colours.json", remedy="buy paint")
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "json is <.*>: must be a policy file"),
        (b"{", "json is <.*>: must be a policy file"),
        (b'{"policy": "\xff"}', "json is <.*>: must be a policy file"),
        (b"[" * 100_000, "json is <.*>: must be a policy file"),
        (b"[]", "json is <no mapping>: must be a mapping with schema, policy"),
        (b"null", "json is <no mapping>: must be a mapping with schema, policy"),
        (b'{"policy": 3}', "json: memory_budget_bytes is <missing>: must be given"),
    ],
)
def test_what_is_no_policy_file_is_refused(tmp_path, text, message):
    path = tmp_path / "policy.json"
    path.write_bytes(text)
    with pytest.raises(PolicyError, match=rf"policy\.{message}"):
        load_policy_file(path)


@pytest.mark.parametrize(
    ("where", "close"),
    [
        (("micro_batch_siz",), None),
        (("policy", "micro_batch_siz"), "micro_batch_size"),
        (("model", "kinds", 0, "mixer", "head_dims"), "head_dim"),
        (("profile", "links", 0, "latencys"), "latency_s"),
    ],
)
def test_a_field_that_there_is_not_is_named(tmp_path, where, close):
    path = tmp_path / "policy.json"
    save_policy_file(path, policy_file_of(PREDICTED, SPEC, MACHINE, WORKLOAD))
    content = json.loads(path.read_text())
    *parents, key = where
    node = content
    for parent in parents:
        node = node[parent]
    node[key] = 8
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match=rf"{key} is 8: is no field of .*") as caught:
        load_policy_file(path)
    if close is not None:
        assert f"did you mean {close}?" in str(caught.value)


def test_a_policy_file_that_cannot_be_read_or_written_is_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"none\.json is <No such file"):
        load_policy_file(tmp_path / "none.json")
    content = policy_file_of(PREDICTED, SPEC, MACHINE, WORKLOAD)
    with pytest.raises(PolicyError, match=r"policy\.json is <No such file.*must be writable"):
        save_policy_file(tmp_path / "missing" / "policy.json", content)


def test_the_papers_tuple_follows_from_the_policy():
    n, mu, a_g, f_g, r_w, r_c = A_POLICY.paper_tuple(SPEC)
    assert (n, mu, a_g, f_g) == (40, 10, 0, 1)
    expert, dense = 3 * 64 * 96, SPEC.layers[0].dense_parameters
    assert r_w == pytest.approx((6 * expert + 4 * dense) / (4 * (4 * expert + dense)))
    assert r_c == 1 / 4


# -- traces -----------------------------------------------------------------------------------


def random_trace(seed: int) -> Trace:
    rng = Random(seed)
    spans: list[Span] = []
    for number in range(rng.randint(0, 40)):
        start = rng.uniform(0, 5)
        spans.append(
            Span(
                TaskId(rng.choice(EVERY_ACT), rng.randint(0, 9), number, rng.randint(0, 3)),
                start,
                start + rng.uniform(0, 1),
                rng.randint(0, 2),
                rng.randint(0, 10**9),
            )
        )
    return Trace(tuple(spans))


def test_a_chrome_trace_reads_back_to_the_nanosecond(tmp_path):
    path = tmp_path / "trace.json"
    for seed in range(30):
        measured, predicted = random_trace(seed), random_trace(1000 + seed)
        write_chrome_trace(path, measured=measured, predicted=predicted)
        for name, trace in (("measured", measured), ("predicted", predicted)):
            back = read_chrome_trace(path, process=name)
            for ours, theirs in zip(back.spans, trace.spans, strict=True):
                assert ours == theirs._replace(start_s=ours.start_s, end_s=ours.end_s)
                assert ours.start_s == pytest.approx(theirs.start_s, abs=1e-9)
                assert ours.end_s == pytest.approx(theirs.end_s, abs=2e-9)


def test_a_chrome_trace_names_its_lanes(tmp_path):
    path = tmp_path / "trace.json"
    write_chrome_trace(path, measured=random_trace(1))
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == [lane.value for lane in Lane]


@pytest.mark.parametrize("text", ["", "{}", '{"traceEvents": [{"ph": "X"}]}', "[]"])
def test_what_is_no_trace_is_refused(tmp_path, text):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(TraceError, match=r"trace\.json is <.*must be a trace"):
        read_chrome_trace(path)


def test_the_chart_shows_what_each_lane_did_when():
    spans = (
        Span(TaskId(act("PRE_ATTENTION"), 0, 0), 0, 2),
        Span(TaskId(act("ATTENTION", Lane.CPU), 0, 0), 2, 8),
        Span(TaskId(act("POST_ATTENTION"), 0, 0), 8, 10),
    )
    assert lane_chart(Trace(spans), width=10) == "  GPU │AA······CC│\n  CPU │··BBBBBB··│"
    assert lane_chart(Trace(())) == ""
