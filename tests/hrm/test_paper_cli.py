"""`hrm paper`: what scripts rely on, what people see, and what it refuses."""

import csv
import json
from functools import cache, partial

import pytest

from hrm.published import command, report
from hrm.published.compare import compare
from hrm.published.data import MTBENCH, SEVERAL_GPUS, TABLE_4
from hrm.published.scaling import PAIRS, Scaling, closed_form, machine_of

FEW = {
    TABLE_4: tuple(run for run in TABLE_4 if run.setup == "S2"),
    MTBENCH: tuple(run for run in MTBENCH if run.workload.gen_len == 32 and run.setup == "S2"),
}


@cache
def compared(runs):
    return compare(FEW[runs])


@cache
def scaled_few():
    """Both models at 32 generated tokens, simulated once for all tests."""
    found = []
    for pair in PAIRS:
        two, four = (next(run for run in SEVERAL_GPUS if run.setup == setup) for setup in pair)
        comparisons = compare((two, four), {setup: machine_of(setup) for setup in pair})
        shared = {setup: machine_of(setup, shared_links=True) for setup in pair}
        found.append(
            Scaling(
                two=comparisons[0],
                four=comparisons[1],
                shared_two=closed_form(two, shared[two.setup]),
                shared_four=closed_form(four, shared[four.setup]),
            )
        )
    return found


@pytest.fixture
def hrm(hrm, monkeypatch):
    """Run `hrm paper …` over fewer runs; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(command, "compare", compared)
    monkeypatch.setattr(command, "compare_scaling", scaled_few)
    return partial(hrm, "paper")


def test_help_names_its_parts(hrm):
    code, out, _ = hrm("--help")
    assert code == 0
    assert out.startswith("Usage: hrm paper")
    assert all(option in out for option in ("--held-out", "--scaling", "--fit", "--csv"))


@pytest.mark.parametrize("part", [[], ["--held-out"], ["--scaling"]])
def test_every_part_is_readable_in_a_hundred_columns(hrm, part):
    code, out, err = hrm(*part)
    assert (code, err) == (0, "")
    assert max(len(line.rstrip()) for line in out.splitlines()) <= report.WIDTH


def test_table_shows_each_run_with_its_error_limits_and_what_was_fitted(hrm):
    _, out, _ = hrm()
    lines = out.splitlines()
    header = next(line for line in lines if "predicted  measured" in line)
    assert header.split() == [
        "μ,",
        "N/μ",
        "predicted",
        "measured",
        "error",
        "prefill",
        "limited",
        "by",
        "step",
        "limited",
        "by",
    ]
    for comparison in compared(TABLE_4):
        shown = next(
            line
            for line in lines
            if f"{comparison.run.tokens_per_s:.4g} " in line and f"{comparison.error:+.1%}" in line
        )
        assert shown.strip().startswith(comparison.run.system.value)
        assert comparison.predicted.limits.decode.cause.value in shown
    assert "order of the systems: as published in all 2 columns" in out
    assert "fitted in paper-s2: 2 figures" in out
    assert "gpu float16 GEMM: 25.1 TFLOP/s" in out
    assert "cpu->gpu pageable link: 5.14 GB/s" in out
    assert "3.93 GB more than there is" in " ".join(out.split())


def test_a_changed_order_is_said(hrm, monkeypatch):
    monkeypatch.setattr(report, "order_as_published", lambda column: len(column) != 4)
    _, out, _ = hrm()
    assert "not as published in reasoning on S2, summarization on S2" in out


def test_json_has_the_promised_keys(hrm):
    code, out, err = hrm("--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"cells", "systems", "all", "order_as_published", "fitted"}
    assert len(found["cells"]) == 8
    cell = found["cells"][0]
    assert set(cell) >= {
        "system",
        "setup",
        "machine",
        "workload",
        "micro_batch_size",
        "batch_size",
        "predicted_tokens_per_s",
        "measured_tokens_per_s",
        "error",
        "prefill_limit",
        "decode_limit",
    }
    assert cell["error"] == pytest.approx(cell["predicted_tokens_per_s"] / cell["measured_tokens_per_s"] - 1)
    assert set(found["systems"]["FlexGen"]) >= {"count", "mean_error", "worst_error"}
    assert found["order_as_published"] == {"reasoning on S2": True, "summarization on S2": True}
    assert set(found["fitted"]) == {"paper-s2"}
    assert all(figure["note"] and figure["value"] > 0 for figure in found["fitted"]["paper-s2"])


@pytest.mark.parametrize(
    ("part", "rows", "column"),
    [
        ([], 8, "predicted_tokens_per_s"),
        (["--held-out"], 3, "error"),
        (["--scaling"], 2, "measured_ratio"),
        (["--fit"], 6, "found"),
    ],
)
def test_csv_has_a_row_for_each_run_or_figure(hrm, part, rows, column):
    code, out, err = hrm(*part, "--csv")
    assert (code, err) == (0, "")
    found = list(csv.DictReader(out.splitlines()))
    assert len(found) == rows
    assert all(float(row[column]) for row in found)


def test_scaling_explains_ratio_and_batch(hrm):
    _, out, _ = hrm("--scaling")
    text = " ".join(out.split())
    assert "batch on 2: 252 requests; MoE-Lightning's memory rule allows 252" in text
    assert "bound by GPU memory" in text
    assert "predicted ×2.10, measured ×2.76: short by 24 %" in text
    assert "nothing is fitted on these runs" in text


def test_scaling_tells_limits_memory_left_and_what_stays_unexplained(hrm):
    _, out, _ = hrm("--scaling")
    lines = [line.split() for line in out.splitlines()]
    steps = [cells for cells in lines if cells[:1] == ["32"] and cells[3:4] == ["s"]]
    assert [cells[1] for cells in steps] == ["2", "4", "2", "4"]
    limits = ["H2D link", "GPU compute", "GPU compute", "GPU compute"]
    assert [" ".join(cells[4:6]) for cells in steps] == limits
    assert all(cells[-1] == "GB" and float(cells[-2]) > 0 for cells in steps)
    text = " ".join(out.split())
    assert "×2.57 for the host's memory or cores, ×2 for what each card does" in text
    assert "no source says that neighbours share a link, so it is not modelled" in text
    assert text.count("not explained") == 1


def test_fit_prints_found_beside_shipped(hrm):
    code, out, _ = hrm("--fit")
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith("paper-s")]
    assert len(rows) == 6
    assert all(abs(float(row.split()[-1].rstrip("%"))) < 0.5 for row in rows)


@pytest.mark.parametrize("part", [[], ["--held-out"], ["--scaling"]])
def test_picture_is_written(hrm, tmp_path, part):
    path = tmp_path / "paper.svg"
    code, out, _ = hrm(*part, "--plot", path)
    assert (code, out) == (0, f"written to {path}\n")
    assert "MoE-Lightning" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scaling", "--fit"], "--scaling and --fit is <together>"),
        (["--json", "--csv"], "--json and --csv is <together>"),
        (["--fit", "--plot", "x.png"], "--plot is 'x.png': draws runs, not fits"),
        (["--plot", "x.txt"], "must end in .png, .svg, .pdf"),
    ],
)
def test_mistakes_are_one_line(hrm, args, message):
    code, out, err = hrm(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
