"""What users hand over is decoded within limits, or refused in one line."""

import json
import re
import time
from pathlib import Path
from random import Random

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hrm.decoding import Malformed, decode_json, decode_yaml, reads_as_text
from hrm.errors import HrmError, ProfileError, one_line

BRACKETS = b"a: " + b"[" * 40_000
ALIASES = b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n".encode() for i in range(1, 10)
)
DEEP_ALIASES = b"a0: &a0 [1]\n" + b"".join(f"a{i}: &a{i} [*a{i - 1}]\n".encode() for i in range(1, 99))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BRACKETS, "nested deeper than 64"),
        (b"- " * 40_000, "nested deeper than 64"),
        (b'{"a":' * 40_000, "nested deeper than 64"),
        (ALIASES, "more than 200,000 values once its aliases are followed"),
        (DEEP_ALIASES, "nested deeper than 64"),
        (b"a: &a [*a]", "no anchor before it"),
        (b"a: 1\na: 2", "line 2: the key 'a' comes twice"),
        (b"{a: 1, 'a': 2}", "comes twice"),
        (b"a: !!int _", "has the tag"),
        (b"a: !!timestamp x", "has the tag"),
        (b"a: !!python/object/apply:os.system [ls]", "has the tag"),
        (b"a: !x []", "has the tag"),
        (b"a: .inf", "no finite number"),
        (b"a: -.INF", "no finite number"),
        (b"a: .nan", "no finite number"),
        (b"a: 1e999", "not finite"),
        (b"a: " + b"9" * 5000, "5000 digits"),
        (b"a: 0x" + b"f" * 5000, "digits"),
        (b'a: "\\ud800"', "line 1, column"),
        (b"a: [\x00]", "zero byte"),
        ("a: é".encode("utf-16"), "UTF-16"),
        ("a: é".encode("latin-1"), "is no UTF-8"),
        (b"a: \x1b[0m", "not a"),
        (b"[a]: 1", "a key must be a text"),
        (b"a: 1\n---\na: 2\n", "must be one document"),
        (b"a: [1", "line 1, column|line 2, column"),
    ],
)
def test_yaml_that_breaks_a_bound_is_refused_at_once(text, said):
    started_s = time.process_time()
    with pytest.raises(Malformed, match=said) as caught:
        decode_yaml(text)
    assert time.process_time() - started_s < 5
    assert str(caught.value).isprintable()


def test_yaml_has_the_types_of_its_core_schema():
    text = b"""
    whole: [0, -12, 010, 0o17, 0x1F]
    broken: [2e9, -.5, 1., 6.02E+23]
    nothing: [~, null, ]
    truth: [true, False]
    texts: [yes, no, on, 1:30, 2001-01-01, 1_000, '2e9', "~", 1e, 0b1, <<]
    same: [&a {b: 1}, *a]
    """
    assert decode_yaml(text) == {
        "whole": [0, -12, 10, 15, 31],
        "broken": [2e9, -0.5, 1.0, 6.02e23],
        "nothing": [None, None],
        "truth": [True, False],
        "texts": ["yes", "no", "on", "1:30", "2001-01-01", "1_000", "2e9", "~", "1e", "0b1", "<<"],
        "same": [{"b": 1}, {"b": 1}],
    }
    assert decode_yaml(b"") is None
    assert decode_yaml(b"\xef\xbb\xbf2") == 2


# JSON writes others as two escapes, of which YAML has none.
_LETTERS = st.characters(max_codepoint=0xD7FF)
_KEYS = st.text("abé ", min_size=1, max_size=4)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.text(_LETTERS, max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES)
def test_json_is_read_as_python_reads_it_and_is_yaml_too(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert decode_json(text.encode()) == value
    assert decode_yaml(json.dumps(value).encode()) == value


@given(st.text())
def test_a_text_is_quoted_where_yaml_would_read_another_value(text):
    if reads_as_text(text) and text.isidentifier():
        assert decode_yaml(text.encode()) == text
    if isinstance(yaml.safe_load(f"'{text}'" if text.isidentifier() else "x"), str):
        assert isinstance(reads_as_text(text), bool)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 100_000, "nested deeper than 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "not finite"),
        (b"[-1E+999]", "not finite"),
        (b"[1" + b"0" * 400 + b".0]", "not finite"),
        (b"9" * 5000, "5000 digits"),
        (b'"\\ud800"', "half of a pair of surrogates"),
        (b'{"\\udc00x": 1}', "half of a pair of surrogates"),
        (b'"\xed\xa0\x80"', "is no UTF-8"),
        ('{"a": 1}'.encode("utf-16-be"), "zero byte|UTF-16"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"{}{}", "line 1, column 3"),
        (b"", "line 1, column 1"),
        (b'"a\nb"', "line 1, column 3"),
    ],
)
def test_json_that_breaks_a_bound_is_refused_at_once(text, said):
    with pytest.raises(Malformed, match=said) as caught:
        decode_json(text)
    assert str(caught.value).isprintable()


def test_json_within_the_bounds_is_read():
    assert decode_json(b"[" * 64 + b"]" * 64) is not None
    assert decode_json(b'"\\ud83d\\ude00"') == "😀"
    published = b'{"model_max_length": 1000000000000000019884624838656}'  # by transformers
    assert decode_json(published) == {"model_max_length": int(1e30)}


# -- messages ---------------------------------------------------------------------------------

AWKWARD = ["a\nb", "\x1b[31mred\x07", "\ud800", "x" * 10**6, ["x" * 999] * 999, 10**6000, "é [/x]"]


@pytest.mark.parametrize("value", AWKWARD, ids=range(len(AWKWARD)))
def test_a_message_is_one_short_line_whatever_it_is_about(value):
    for error in (
        HrmError("f: x", value, "must be another", "correct it"),
        HrmError(str(value)[:5000] if value != 10**6000 else "y", 1, "must be another", "correct"),
        ProfileError("f", f"<{str(value)[:5000] if value != 10**6000 else 'y'}>", "must", "do"),
    ):
        assert str(error).isprintable()
        assert len(str(error)) < 500


def test_a_message_keeps_what_is_short():
    error = HrmError("f: x", "two words", "must be another", "correct it")
    assert str(error) == "f: x is 'two words': must be another; correct it"
    assert one_line("a\tb\n  c\x00 ü") == "a b c\\x00 ü"


# -- the readers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profile", "config", "policy", "run", "routing", "trace"])
def test_every_reader_refuses_what_is_nested_too_deep(tmp_path: Path, name):
    from hrm.machines import load_profile
    from hrm.model_spec import load_model
    from hrm.policy_file import load_policy_file
    from hrm.routing import with_measured_routing
    from hrm.run_record import read_run
    from hrm.trace import read_chrome_trace
    from tests.hrm.support import tiny_spec

    path = tmp_path / "run.json"
    readers = {
        "profile": load_profile,
        "config": lambda p: load_model(str(p)),
        "policy": load_policy_file,
        "run": lambda p: read_run(p.parent),
        "routing": lambda p: with_measured_routing(tiny_spec(), p),
        "trace": read_chrome_trace,
    }
    for text in (b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff\xfe{\x00", b'{"a": 1e999}'):
        path.write_bytes(text)
        with pytest.raises(HrmError, match=r"run\.json.* is <"):
            readers[name](path)


# -- paths of type errors ---------------------------------------------------------------------


def _leaves(node, path=""):
    """Every value in a plain tree with its path as messages give it, and where it stands."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        name = value.get("name", key) if isinstance(value, dict) and isinstance(key, int) else key
        where = f"{path}[{name}]" if isinstance(key, int) else f"{path}.{key}".removeprefix(".")
        yield (where, f"{path}[{key}]"), node, key
        if isinstance(value, dict | list):
            yield from _leaves(value, where)


def test_a_wrong_type_is_told_at_its_path_in_every_structure(tmp_path):
    from hrm.hardware import Disk
    from hrm.run_record import RunRecord
    from hrm.strict import decode_strictly
    from tests.fuzz.targets_hrm import a_run, plain
    from tests.hrm.support import figure, rate

    run = plain(a_run())
    level = run["policy_file"]["profile"]["levels"][0]
    level["caches"] = [
        {
            "name": "L2",
            "capacity_bytes": plain(figure(1e6)),
            "read_bytes_per_s": plain(rate(1e12, ((1.0, 2.0), (2.0, 3.0)))),
        }
    ]
    run["policy_file"]["profile"]["disk"] = plain(
        Disk(path="/", capacity_bytes=figure(1e9), read_bytes_per_s=rate(1e9))
    )
    decode_strictly(run, RunRecord, "run.json", other_keys=True)
    checked = 0
    for where, outer, key in list(_leaves(run)):
        kept = outer[key]
        for wrong in (object(), {"x": [kept]} if not isinstance(kept, dict) else [kept]):
            outer[key] = wrong
            with pytest.raises(ProfileError) as caught:
                decode_strictly(run, RunRecord, "run.json", other_keys=True)
            assert str(caught.value).startswith("run.json: "), caught.value
            inner = caught.value.where.removeprefix("run.json: ")
            # An item of a list goes by its name, if it still has one.
            known = {re.sub(r"\[[^\]]*\]", "[]", name) if key == "name" else name for name in where}
            inner = re.sub(r"\[[^\]]*\]", "[]", inner) if key == "name" else inner
            assert inner in known or inner.startswith((f"{where[0]}.", f"{where[0]}["))
            checked += 1
        outer[key] = kept
    assert checked > 200


def test_integers_that_64_bits_do_not_hold_are_refused_by_path():
    from hrm.policy import Policy
    from hrm.strict import decode_strictly

    policy = msgspec.to_builtins(
        Policy(
            batch_size=4,
            micro_batch_size=2,
            resident_experts=(1,),
            kv_tokens_per_micro_batch=16,
            prefill_chunk_tokens=1,
        )
    )
    policy = json.loads(msgspec.json.encode(policy))
    decode_strictly(policy, Policy, "p.json")
    policy["prefill_chunk_tokens"] = 10**19
    with pytest.raises(ProfileError, match=r"prefill_chunk_tokens is 10{19}: must fit 64 bits"):
        decode_strictly(policy, Policy, "p.json")


# -- markup -----------------------------------------------------------------------------------


def test_names_are_printed_as_they_are(capsys):
    from rich.table import Table

    from hrm.cli.console import as_is, console

    random = Random(4)
    parts = ["[x]", "[/x]", "[/]", "[bold]", "\\", "a", " ", "[#fff]", ":smile:", "[", "]", "[[", "[0]", "[a b=c]"]
    for _ in range(200):
        name = "".join(random.choices(parts, k=random.randint(1, 5))).strip() or "a"
        console.print(f"[bold]{as_is(name)}[/]|")
        assert capsys.readouterr().out == f"{name}|\n"
        table = Table("x", box=None)
        table.add_row(as_is(name))
        console.print(table)
        assert name in " ".join(capsys.readouterr().out.split()) or " " in name
    console.print("[/]\x1b[31m[dim]x[/]" + as_is("\x1b\ue000"))
    assert capsys.readouterr().out == "[/]\\x1b[31mx\\x1b\\ue000\n"


# -- what fuzzing found -----------------------------------------------------------------------

IMPOSSIBLE_RUNS = [
    (("batches", 0, "requests"), 0, r"batches\[0\].requests is 0: must be at least 1"),
    (("totals", "requests"), -1, r"totals.requests is -1: must be from 0 to"),
    (("phases", "prefill", "lanes"), {"0": {"busy_s": 1.0}}, "prefill.lanes is '0': must be of"),
    (
        ("phases", "decode", "kinds"),
        {"x": {"count": 1, "seconds": 1.0, "num_bytes": 1}},
        r"decode.kinds is 'x': must be of",
    ),
    (("phases", "later"), {"seconds": 1.0, "kinds": {}, "lanes": {}}, "phases is 'later'"),
    (("schedule",), "x", "schedule is 'x': must be one of cgopipe"),
    (("policy_file", "policy", "resident_experts"), [4, 4, 4], "one count for each of the 4"),
    (("policy_file", "profile", "levels", 0, "capacity_bytes", "value"), 1e19, "at most 1e[+]18"),
]


@pytest.mark.parametrize(("place", "value", "said"), IMPOSSIBLE_RUNS)
def test_a_run_that_cannot_have_been_is_refused_by_path(tmp_path, place, value, said):
    from hrm.errors import TraceError
    from hrm.run_record import read_run
    from tests.fuzz.targets_hrm import a_run, plain

    run = plain(a_run())
    (tmp_path / "run.json").write_text(json.dumps(run))
    read_run(tmp_path)
    *parents, key = place
    node = run
    for parent in parents:
        node = node[parent]
    node[key] = value
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(TraceError, match=rf"run\.json: .*{said}"):
        read_run(tmp_path)


def test_a_name_of_any_length_is_looked_up_or_refused():
    from hrm.machines import load_profile
    from hrm.model_spec import load_model

    for name in ("x" * 300, "x" * 200_000, "\0", " " * 120_000):
        for load in (load_model, load_profile):
            with pytest.raises(HrmError):
                load(name)
