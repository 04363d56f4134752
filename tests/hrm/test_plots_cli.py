"""`hrm plot`: pictures from the command line, and one line for every mistake."""

import csv

import pytest

from hrm.machines import save_profile
from tests.hrm.pictures import MAGIC
from tests.hrm.support import machine

pytestmark = pytest.mark.usefixtures("coarse_searches")  # what is found is told, however good it is

T4 = ["--model", "mixtral-8x7b", "--gpus", "1xT4"]
SMALL = ["--requests", "64", "--prompt-len", "64", "--gen-len", "16"]
STEPS = "--steps is 64: must be at most 15, as many as there are"  # the first of 16 tokens is of prefill


def test_roofline_takes_options_more_than_once(hrm, tmp_path):
    path = tmp_path / "roof.pdf"
    code, out, err = hrm(
        "plot",
        "roofline",
        *T4,
        "--dtype",
        "auto",
        "--dtype",
        "float32",
        "--context",
        512,
        "--context",
        2048,
        "--batch-size",
        64,
        "--batch-size",
        1024,
        "--out",
        path,
    )
    assert (code, out, err) == (0, f"written to {path}\n", "")
    assert path.read_bytes().startswith(MAGIC[".pdf"])


def test_roofline_of_a_measured_profile(hrm, tmp_path):
    save_profile(tmp_path / "machine.yaml", machine())
    code, _, err = hrm("plot", "roofline", "--profile", tmp_path / "machine.yaml", "-o", tmp_path / "a.svg")
    assert (code, err) == (0, "")
    assert (tmp_path / "a.svg").stat().st_size > 10_000


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_timeline_compares_schedules(hrm, tmp_path, phase):
    path = tmp_path / "lanes.png"
    code, out, err = hrm(
        "plot",
        "timeline",
        *T4,
        *SMALL,
        "--schedule",
        "cgopipe",
        "--schedule",
        "flexgen",
        "--phase",
        phase,
        "--from-layer",
        1,
        "--layers",
        2,
        "--steps",
        1,
        "--out",
        path,
    )
    assert (code, out, err) == (0, f"written to {path}\n", "")
    assert path.read_bytes().startswith(MAGIC[".png"])


def test_sweep_draws_prints_and_writes_the_same_points(hrm, tmp_path):
    path, table = tmp_path / "sweep.png", tmp_path / "sweep.csv"
    code, out, _ = hrm(
        "plot",
        "sweep",
        *T4,
        *SMALL,
        "--vary",
        "cpu-memory",
        "--from",
        "64GB",
        "--to",
        "256GB",
        "--points",
        3,
        "--schedule",
        "cgopipe",
        "--schedule",
        "deepspeed",
        "--csv",
        table,
        "--out",
        path,
    )
    assert code == 0
    assert path.read_bytes().startswith(MAGIC[".png"])
    with table.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["schedule"], float(row["cpu_memory_bytes"])) for row in rows] == [
        (name, memory) for name in ("cgopipe", "deepspeed") for memory in (64e9, 160e9, 256e9)
    ]
    shown = out.splitlines()
    assert shown[-1] == f"written to {path}"
    for row, line in zip(rows, shown[1:7], strict=True):
        assert line.startswith(row["schedule"])
        told = f"{float(row['tokens_per_s']):.4g}" if row["tokens_per_s"] else "no policy fits"
        assert told in line
    assert rows[0]["reason"].startswith("no policy fits")


def test_ctrl_c_ends_a_sweep_with_130_and_leaves_no_file(hrm, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hrm.analysis.rows.search", interrupted)
    code, out, err = hrm(
        "plot",
        "sweep",
        *T4,
        *SMALL,
        "--vary",
        "gen-len",
        "--from",
        8,
        "--to",
        16,
        "--points",
        2,
        "--csv",
        tmp_path / "a.csv",
        "--out",
        tmp_path / "a.png",
    )
    assert (code, out) == (130, "")
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


SWEEP = ["sweep", *T4, "--out", "a.png"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["roofline", "--gpus", "1xT4", "--out", "a.gif"], "must end in .png, .svg, .pdf"),
        (["roofline", "--gpus", "1xT4", "--out", "none/a.png"], "No such file or directory"),
        (["roofline", "--gpus", "1xT4", "--dtype", "int4", "--out", "a.png"], "--dtype is 'int4'"),
        (["timeline", "--out", "a.png"], "--policy or --model is <missing>"),
        (["timeline", *T4, "--layers", "99", "--out", "a.png"], "--layers is 99: must be at least 1 and at most 32"),
        (["timeline", *T4, "--from-layer", "32", "--out", "a.png"], "--from-layer is 32: must be one of the 32 layers"),
        (["timeline", *T4, *SMALL, "--steps", "64", "--out", "a.png"], STEPS),
        (["timeline", "--run", ".", "--schedule", "flexgen", "--out", "a.png"], "holds its own"),
        (["timeline", "--run", ".", "--gen-len", "0", "--out", "a.png"], "holds its own"),
        (["timeline", "--run", ".", "--out", "a.png"], "must be a run.json"),
        ([*SWEEP, "--vary", "colour", "--from", "1", "--to", "2"], "--vary is 'colour'"),
        ([*SWEEP, "--vary", "cpu-memory", "--from", "2GB", "--to", "1GB"], "greater one"),
        ([*SWEEP, "--vary", "gpu-flops", "--from", "2GB", "--to", "1GB"], "--from is '2GB'"),
        ([*SWEEP, "--vary", "peer-bandwidth", "--from", "1GB/s", "--to", "2GB/s"], "has no link between GPUs"),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_work(hrm, tmp_path, monkeypatch, args, told):
    monkeypatch.chdir(tmp_path)
    code, out, err = hrm("plot", *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err
    assert not list(tmp_path.iterdir())
