"""`make bench-peers`: its arithmetic and settings, and turns of real processes, with engines that take no time."""

import json
import os
import runpy
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from safetensors import safe_open

from executor.checkpoint import Checkpoint
from hrm.errors import HrmError
from hrm.model_spec import load_model, spec_from_hf_config
from tests.bench.peers import environments, turns
from tests.bench.peers.__main__ import main
from tests.bench.peers.drivers.llama_batch import write_gguf
from tests.bench.peers.drivers.roofs import roofs
from tests.bench.peers.drivers.turn import Job
from tests.bench.peers.environments import REQUIREMENTS, PeerFailedError, last_words, python_of, run_logged
from tests.bench.peers.report import Timings, equal_share, prefill_flops, ratio, step_bytes, tables, timings
from tests.bench.peers.setting import (
    DRIVERS,
    FULL,
    OURS,
    PEERS,
    ROOFS,
    SMALL,
    TRANSFORMERS,
    Row,
    Setting,
    parse_names,
    parse_rows,
)
from tests.bench.peers.turns import Outcome, Turn, order, read_journal, run_turns
from tests.bench.reference_checkpoint import reference_checkpoint
from tests.hrm.profiling.fakes import small_sizes

TINY = "tests.tooling.tiny_peer"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of the small models by their short names."""
    kept = tmp_path_factory.mktemp("checkpoints")
    return {name: reference_checkpoint(config, kept / name) for name, config in SMALL.configs.items()}


def setting(out, **changes) -> Setting:
    usual = Setting(
        scale=SMALL,
        peers=("vllm", TRANSFORMERS),
        models=("mixtral",),
        rows=(Row(2, 3),),
        repeats=2,
        out=out,
        turn_minutes=1.0,
    )
    return replace(usual, **changes)


def outcome(engine, repeat, seconds, *, tokens=((1, 2, 3), (4, 5, 6)), facts=None, model="mixtral") -> Outcome:
    row = {
        "prefill_s": 0.5,
        "seconds": seconds,
        "processor_s": 2 * seconds,
        "others": 0.25,
        "tokens": [list(one) for one in tokens],
    }
    return Outcome(Turn(model, repeat, engine), {"rows": {"2x3": row | {"facts": facts or {}}}})


# --------------------------------------------------------------------------------- arithmetic


def test_ratio_is_of_repeats_that_both_took_part_in():
    """The machine was at half its speed in repeat 1, and ours alone ran in repeat 3."""
    assert ratio({0: 1.0, 1: 2.0, 2: 1.1, 3: 9.0}, {0: 1.5, 1: 3.0, 2: 1.65}) == pytest.approx(1.5)
    assert ratio({0: 1.0}, {1: 1.0}) is None
    assert ratio({0: 0.0, 1: 1.0}, {0: 1.0, 1: 2.0}) == 2.0
    assert ratio({0: 0.0}, {0: 1.0}) is None


def test_equal_tokens_are_counted_over_all_or_over_the_certain_ones():
    ours, theirs = [[1, 2, 3], [4, 5, 6]], [[1, 2, 9], [4, 9, 9]]
    assert equal_share(ours, theirs) == pytest.approx(3 / 6)
    assert equal_share(ours, theirs, [2, 1]) == 1
    assert equal_share(ours, theirs, [0, 0]) is None


def test_a_step_is_what_tokens_after_the_first_took():
    both = Timings(seconds={0: 2.5, 1: 4.5}, prefill_s={0: 0.5, 1: 0.5}, processor_s={}, others={}, tokens=[])
    assert both.step_s(Row(2, 3)) == pytest.approx(1.5)
    assert both.step_s(Row(2, 1)) is None
    disturbed = replace(both, prefill_s={0: 3.0, 1: 5.0})
    assert disturbed.step_s(Row(2, 3)) is None


@pytest.mark.parametrize("name", SMALL.configs)
def test_steps_of_many_requests_read_all_weights_but_the_embedding(checkpoints, name):
    read = multiplied = 0
    for file in checkpoints[name].glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            sizes = {tensor: opened.get_tensor(tensor).numel() for tensor in opened.keys()}  # noqa: SIM118 - no mapping
        read += sum(size for tensor, size in sizes.items() if "embed_tokens" not in tensor)
        multiplied += sum(
            size
            for tensor, size in sizes.items()
            if not ("embed" in tensor or "lm_head" in tensor or "experts" in tensor)
        )
        multiplied += (
            sum(size for tensor, size in sizes.items() if ".experts.0." in tensor)
            * (SMALL.configs[name]["num_experts_per_tok"])
        )
    spec = spec_from_hf_config(SMALL.configs[name], name)
    assert step_bytes(spec, 10_000) == pytest.approx(2 * read)
    assert step_bytes(spec, 1) < step_bytes(spec, 2) < 2 * read
    head = 512 * 128
    assert prefill_flops(spec, Row(3, 1), 16) == pytest.approx(2 * 3 * (16 * multiplied + head), rel=0.001)


def test_models_are_of_the_sizes_that_are_told():
    mixtral, qwen = (spec_from_hf_config(config, name) for name, config in FULL.configs.items())
    assert 1.0e9 < mixtral.parameters < 1.2e9
    assert 1.0e9 < qwen.parameters < 1.2e9
    assert (qwen.num_experts, qwen.experts_per_token) == (64, 8)


# ------------------------------------------------------------------------------------- tables


def test_table_tells_rates_ratios_and_shares(tmp_path):
    figures = {"bound_tokens_per_s": 12.0, "predicted_tokens_per_s": 9.0, "policy": "4 in micro-batches of 2"}
    outcomes = [
        Outcome(Turn("mixtral", 0, ROOFS), {"gemm_flops_per_s": 4e11, "read_bytes_per_s": 3e10}),
        outcome(OURS, 0, 1.0, facts=figures),
        outcome("vllm", 0, 1.5, tokens=((1, 2, 3), (4, 5, 9))),
        outcome(TRANSFORMERS, 0, 3.0, facts={"safe": [3, 2]}),
        outcome(OURS, 1, 1.2, facts=figures),
        outcome("vllm", 1, 1.5),
        Outcome(Turn("mixtral", 1, "openvino"), failed="no such kernel"),
    ]
    text = "\n".join(tables(setting(tmp_path), outcomes))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ") and "%" in line}
    assert lines["ours"][1:4] == ["5.5", "5.0", "6.0"]
    assert lines["vllm"][1:8] == ["4.0", "4.0", "4.0", "1.38", "×", "1.38", "×"]
    assert lines["vllm"][-3:] == ["83%", "100%", "25%"]  # the token that differs is not a certain one
    assert lines[TRANSFORMERS][4] == "3.00"
    assert "46%" in lines["ours"]  # of the bound
    assert text.index("\n  ours ") < text.index("\n  vllm ") < text.index(f"\n  {TRANSFORMERS} ")
    assert "ours is 1.38 times the best peer, vllm (goal 1.2)" in text
    assert "bfloat16 GEMM: 400 GFLOP/s (400 to 400, 1 times among the turns)" in text
    assert "openvino on mixtral is left out: no such kernel" in text


def test_tables_of_peers_alone_compare_with_nothing(tmp_path):
    text = "\n".join(tables(setting(tmp_path), [outcome("vllm", 0, 1.5)]))
    assert "4.0" in text
    assert "best peer" not in text


# ------------------------------------------------------------------------------------ settings


def test_names_and_rows_are_read():
    assert parse_names(" vllm,llama,vllm ", PEERS, "--peers") == ("vllm", "llama")
    assert parse_names("", PEERS, "--peers") == PEERS
    assert parse_rows("32x32, 8x1", ()) == (Row(32, 32), Row(8, 1))
    assert parse_rows("", FULL.rows) == FULL.rows


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--peers", "vlm"], "did you mean vllm?"),
        (["--models", "dbrx"], "mixtral, qwen"),
        (["--rows", "32"], "REQUESTSxNEW_TOKENS"),
        (["--rows", "0x4"], "REQUESTSxNEW_TOKENS"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_mistakes_are_told(arguments, told, capsys):
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("peer", PEERS)
def test_every_package_of_a_peer_is_pinned_once(peer):
    """Environments are made without dependencies, so that nothing else gets in."""
    lines = (REQUIREMENTS / f"{peer}.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith(("#", "--"))]
    assert all([clause.operator for clause in pin.specifier] == ["=="] for pin in pins)
    assert len({pin.name.lower() for pin in pins}) == len(pins)


def test_no_engine_always_follows_another(tmp_path):
    taken = [turn.engine for turn in order(setting(tmp_path, repeats=3))]
    assert taken == [
        *(ROOFS, OURS, "vllm", TRANSFORMERS),
        *(ROOFS, "vllm", TRANSFORMERS, OURS),
        *(ROOFS, TRANSFORMERS, OURS, "vllm"),
        ROOFS,
    ]


# ---------------------------------------------------------------------------- turns of processes


@pytest.fixture
def tiny_engines(monkeypatch, tmp_path):
    """Every engine is the tiny one, run by this Python."""
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(turns, "python_of", lambda _: Path(sys.executable))
    monkeypatch.setitem(DRIVERS, OURS, TINY)
    monkeypatch.setitem(DRIVERS, "vllm", TINY)
    monkeypatch.setattr(turns, "order", lambda asked: (Turn("mixtral", 0, engine) for engine in asked.engines))


def test_turns_are_kept_and_gone_on_with(tiny_engines, tmp_path, monkeypatch):
    asked = setting(tmp_path / "out", peers=("vllm",))
    done = run_turns(asked)
    assert [one.turn.engine for one in done] == [OURS, "vllm"]
    assert [one.failed for one in done] == ["", ""]
    row = done[0].found["rows"]["2x3"]
    sums = [sum(prompt) for prompt in turns.prompts(512, 2, SMALL.prompt_len)]
    assert row["tokens"] == [[first, first + 1, first + 2] for first in sums]
    assert 0 <= row["prefill_s"] < 60
    assert 0 <= row["processor_s"] < 60
    assert 0 <= row["others"] <= 1
    assert done[0].found["versions"]["pytest"] == pytest.__version__

    journal = asked.out / turns.JOURNAL
    with journal.open("a", encoding="utf-8") as file:
        file.write('{"turn": {"mod')  # killed here
    monkeypatch.setattr(turns, "take", lambda *_: pytest.fail("was held already"))
    assert run_turns(asked) == done
    assert read_journal(asked.out, asked) == done
    with pytest.raises(HrmError, match="name another folder"):
        run_turns(replace(asked, rows=(Row(2, 4),)))
    assert timings(done, Row(2, 3)).keys() == {OURS, "vllm"}


def test_a_failed_engine_is_left_out_and_tried_again_next_time(tiny_engines, tmp_path, monkeypatch):
    """The others go on; its next turns of this model are not even begun."""
    monkeypatch.setattr(turns, "order", lambda _: (Turn("mixtral", n, name) for n in (0, 1) for name in ("vllm", OURS)))
    monkeypatch.setitem(DRIVERS, "vllm", "tests.tooling.no_such_driver")
    asked = setting(tmp_path / "out", peers=("vllm",))
    done = run_turns(asked)
    assert [(one.turn.engine, bool(one.failed)) for one in done] == [("vllm", True), (OURS, False), (OURS, False)]
    assert "no_such_driver" in done[0].failed
    monkeypatch.setitem(DRIVERS, "vllm", TINY)
    assert [one.failed for one in run_turns(asked)] == [""] * 4


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("raises", "ValueError: no such kernel"),
        ("is short", r"answers of \[2, 2\] where 2 of 3 were asked for"),
        ("hangs", "took over"),
    ],
)
def test_what_an_engine_did_wrong_is_told(tmp_path, mistake, told):
    asked, found = tmp_path / "job.json", tmp_path / "found.json"
    prompts, cpus = [[1, 2], [3, 4]], sorted(os.sched_getaffinity(0))
    job = Job(checkpoint="", kept=mistake, profile="", small=True, cpus=cpus, prompts=prompts, rows=[[2, 3]])
    asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", TINY, str(asked), str(found)]
    minutes = 0.02 if mistake == "hangs" else 1
    with pytest.raises(PeerFailedError, match=told):
        run_logged(command, tmp_path / "log", minutes, cwd=turns.ROOT)
    assert not found.exists()


def test_what_a_peer_started_ends_with_it(tmp_path):
    script = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    )
    run_logged([sys.executable, "-c", script], tmp_path / "log", 1)
    pid = int((tmp_path / "log").read_text(encoding="utf-8"))
    end_s = time.monotonic() + 60
    while alive(pid) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether the process is there and has not ended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_the_last_error_is_the_reason():
    assert last_words("a\nValueError: b\n  at c\n\n") == "ValueError: b"
    assert last_words("a\nb\n") == "b"
    assert last_words("") == ""


def test_environments_are_made_once_and_anew_for_other_requirements(tmp_path, monkeypatch):
    """Without the network: nothing is required of them."""
    calls: list[list[str]] = []
    monkeypatch.setattr(environments, "run_logged", lambda command, *_: calls.append(command))
    wanted, kept = tmp_path / "vllm.txt", tmp_path / "kept"
    wanted.write_text("", encoding="utf-8")
    for text, made in (("", 2), ("", 2), ("gguf==0.19.0", 4)):
        wanted.write_text(text, encoding="utf-8")
        assert python_of("vllm", requirements=tmp_path, kept=kept) == kept / "vllm" / "bin" / "python"
        assert len(calls) == made
    assert python_of(OURS) == python_of(ROOFS) == Path(sys.executable)


def test_the_products_pins_do_not_reach_a_peer(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONSTRAINT", "constraints.txt")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://example.org/simple")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    run_logged(["env"], tmp_path / "log", 1, usual={"GOMP_SPINCOUNT": "7"})
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert "PIP_CONSTRAINT" not in said
    assert "PIP_EXTRA_INDEX_URL=https://example.org/simple" in said
    assert "GOMP_SPINCOUNT=7" in said


# ------------------------------------------------------------------------------------- drivers


def test_a_turn_needs_no_package_of_ours():
    """Peers' environments have none."""
    imports = "".join(f"import {DRIVERS[peer]}\n" for peer in PEERS)
    script = (
        f"{imports}import sys\nprint([name for name in ('hrm', 'executor', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=turns.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_roofs_are_measured():
    assert all(figure > 0 for figure in roofs(small=True).values())


def test_llamas_file_is_the_checkpoint(checkpoints, tmp_path):
    """As our own reader of GGUF understands it."""
    file = tmp_path / "model.gguf"
    write_gguf(checkpoints["qwen"], file)
    spec = load_model(str(checkpoints["qwen"]))
    assert load_model(str(file)) == replace(spec, name=load_model(str(file)).name)
    with Checkpoint.open(file) as written, Checkpoint.open(checkpoints["qwen"]) as given:
        assert set(written.names) == set(given.names)
        for name in given.names:
            assert written.tensor(name).float().equal(given.tensor(name).float()), name


def run_here(command, log, minutes, *, cwd, usual):
    """Stands for `run_logged`: the module runs in this process, which has its imports, on a hasty profile."""
    assert command[:2] == [sys.executable, "-m"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"), small_sizes():
        patch.setattr(sys, "argv", command[2:])
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)


def test_ours_and_transformers_give_the_same_certain_tokens(tmp_path, monkeypatch):
    """Turns of real engines, transformers as it is installed here."""
    monkeypatch.setattr(turns, "run_logged", run_here)
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(turns, "python_of", lambda _: Path(sys.executable))
    monkeypatch.setattr(turns, "order", lambda _: (Turn("qwen", 0, engine) for engine in (OURS, TRANSFORMERS)))
    asked = setting(tmp_path / "out", peers=(TRANSFORMERS,), models=("qwen",), rows=(Row(16, 4),), repeats=1)
    done = run_turns(asked)
    assert [one.failed for one in done] == ["", ""]
    found = {one.turn.engine: one.found for one in done}
    ours, theirs = (found[engine]["rows"]["16x4"] for engine in (OURS, TRANSFORMERS))
    assert sum(theirs["facts"]["safe"]) >= 4
    assert equal_share(ours["tokens"], theirs["tokens"], theirs["facts"]["safe"]) == 1
    assert "times the best peer, transformers" in "\n".join(tables(asked, done))
