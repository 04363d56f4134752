"""The steps of the GPU suite, real ones at a small scale, so that it works when a card is there."""

import json
import os

import pytest
import torch

from executor.model.host_kernels import host_kernels
from hrm.contract.openmp import SPINS
from hrm.errors import HrmError
from hrm.policy import ScheduleName
from tests.bench import gpu_suite
from tests.bench.suite import checks
from tests.bench.suite.schedules import FEW, OWN, SAME
from tests.hrm.profiling.fakes import small_sizes

EMULATED = ("--scale", "small", "--accelerator", "emulated")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with a profile in it."""
    folder = tmp_path_factory.mktemp("results")
    with small_sizes():
        assert suite(folder, "profile") == 0
    return folder


def suite(folder, step, *more) -> int:
    return gpu_suite.main([*EMULATED, "--results", str(folder), "--step", step, *more])


def read(folder, step) -> dict:
    return json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))


def test_profile_is_kept_with_the_facts_that_every_step_tells(results):
    content = read(results, "profile")
    assert content["outcome"] == "complete"
    assert content["emulated"]
    assert content["machine"]["cpu"]
    assert torch.__version__.startswith(content["versions"]["torch"])  # which may lack "+cu130"
    assert content["command"].endswith("--step profile --accelerator emulated --scale small")
    measured = [figure for figure in content["figures"]["figures"].values() if figure["n"]]
    assert measured
    assert all(one["p20"] <= one["median"] <= one["p80"] for one in measured)
    assert (results / "machine.yaml").is_file()


def test_profile_is_of_the_kernels_that_will_run(results):
    kernels = host_kernels()
    told = read(results, "profile")["figures"]["environment"]["kernels"]
    assert told == (kernels.name if kernels else "torch")


def test_outcomes_of_tests_are_counted(results, monkeypatch, tmp_path):
    cases = tmp_path / "test_cases.py"
    cases.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip('no')\ndef test_c(): pass\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(checks, "OTHER_TESTS", (str(cases),))
    assert suite(results, "tests") == 0
    figures = read(results, "tests")["figures"]
    assert figures["counts"] == {"passed": 1, "failed": 1, "errors": 0, "skipped": 1}
    assert [name.rpartition("::")[2] for name in figures["failed"]] == ["test_b"]


def test_tests_that_do_not_end_are_told(results, monkeypatch, tmp_path):
    cases = tmp_path / "test_cases.py"
    cases.write_text("import time\ndef test_a(): time.sleep(60)\n", encoding="utf-8")
    monkeypatch.setattr(checks, "OTHER_TESTS", (str(cases),))
    monkeypatch.setattr(checks, "TESTS_S", 0.1)
    assert suite(results, "tests") == 2
    assert read(results, "tests")["left_out"]["counts"] == "pytest did not end within 0 s"


def test_every_schedule_is_measured_and_what_is_missing_can_be_resumed(results):
    assert suite(results, "mixtral-16GB") == 0
    content = read(results, "mixtral-16GB")
    assert content["outcome"] == "complete", content["left_out"]
    figures = content["figures"]
    own = {f"{OWN}: cgopipe", *(f"{FEW}: {name.value}" for name in ScheduleName)}
    same = {f"{SAME}: {name.value}" for name in ScheduleName if name != "flexgen-c"}
    assert own | same <= figures.keys()
    for name in own | same:
        row, policy = figures[name]["row"], figures[name]["policy"]
        assert row["schedule"] == policy["schedule"] == name.partition(": ")[2]
        step_s = row["decode_step_s"]
        assert step_s["n"] == (3 if name in own else 2)
        assert 0 < step_s["p20"] <= step_s["median"] <= step_s["p80"]
        gpu = row["validation"]["memory"]["gpu"]
        assert 0 < gpu["peak_total_bytes"] <= gpu["planned_total_bytes"] <= 10**6
        assert row["decode_bytes_per_s"]["H2D"] > 0
        assert figures[name]["h2d_bytes_per_s"] > 0
        on_cpu = policy["attention"] == "cpu"
        assert (row["attention_bytes_per_s"] is not None) == on_cpu
        assert figures[name]["prompt_lengths"]["mean"] == pytest.approx(6, rel=0.1)
    assert figures["model"]["few_layers"] == len(figures[f"{FEW}: cgopipe"]["policy"]["resident_experts"]) == 2
    one = {**figures[f"{OWN}: cgopipe"]["policy"], "schedule": ""}
    assert all({**figures[name]["policy"], "schedule": ""} == one for name in same)

    kept = figures.pop(f"{FEW}: flexgen")
    path = results / "mixtral-16GB.json"
    path.write_text(json.dumps(replace_outcome(content, "partial")), encoding="utf-8")
    assert suite(results, "mixtral-16GB", "--resume") == 0
    again = read(results, "mixtral-16GB")
    assert again["outcome"] == "complete"
    assert again["figures"][f"{FEW}: flexgen"]["policy"] == kept["policy"]
    assert {**again["figures"], f"{FEW}: flexgen": 0, "load_s": 0} == {**figures, f"{FEW}: flexgen": 0, "load_s": 0}


def replace_outcome(content: dict, outcome: str) -> dict:
    return {**content, "outcome": outcome}


def test_without_time_everything_is_left_out_with_the_reason(results, tmp_path):
    (tmp_path / "machine.yaml").write_bytes((results / "machine.yaml").read_bytes())
    assert suite(tmp_path, "mixtral-24GB", "--budget-minutes", "0.00001") == 0
    content = read(tmp_path, "mixtral-24GB")
    assert content["outcome"] == "partial"
    assert content["left_out"].keys() == {f"{OWN}: cgopipe", *(f"{FEW}: {name.value}" for name in ScheduleName)}
    assert all("are left" in reason for reason in content["left_out"].values())


def test_other_side_is_measured(results):
    pytest.importorskip("accelerate")
    assert suite(results, "accelerate-16GB") == 0
    content = read(results, "accelerate-16GB")
    assert content["outcome"] == "complete", content["left_out"]
    sweep, best = content["figures"]["sweep"], content["figures"]["best"]
    assert [point["batch_size"] for point in sweep] == [2, 4]
    assert best["step_s"]["n"] == 2
    seconds = best["prefill_s"] + 3 * best["step_s"]["median"]
    assert best["tokens_per_s"] == pytest.approx(best["batch_size"] * 4 / seconds)


def test_other_side_keeps_its_best_if_a_batch_fails(results, monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    from tests.bench.suite.offload import OtherSide

    def point(side, batch_size, *more):
        if batch_size > 2:
            raise RuntimeError("no")
        return measured(side, batch_size, *more)

    measured = OtherSide.point
    monkeypatch.setattr(OtherSide, "point", point)
    (tmp_path / "machine.yaml").write_bytes((results / "machine.yaml").read_bytes())
    assert suite(tmp_path, "accelerate-16GB") == 0
    content = read(tmp_path, "accelerate-16GB")
    assert content["figures"]["best"]["batch_size"] == 2
    assert content["left_out"] == {"rest of the sweep": "RuntimeError: no"}


def test_other_side_copies_no_experts_when_it_decodes_on_a_gpu(results, monkeypatch):
    pytest.importorskip("accelerate")
    model = other_side(results).model
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))  # generate asks for its type
    with model._optimize_model_for_decode():
        assert model.get_experts_implementation() == {"": "eager"}


def test_other_side_keeps_no_larger_cache_on_the_host_than_that_has_room_for(results, monkeypatch):
    pytest.importorskip("accelerate")
    side = other_side(results)
    # Keys or values of 3 requests of 6 + 2 tokens, 2 heads of 16 and 2 bytes each, are 1536 bytes.
    assert side.pinned(3, 2) == 2 * (2 + 1) * [2048]
    available = "tests.bench.suite.offload.available_ram_bytes"
    monkeypatch.setattr(available, lambda: 6 * 2048)
    assert side.point(3, "offloaded", 1, 0) is None


def other_side(results):
    from tests.bench.suite.offload import OtherSide
    from tests.bench.suite.schedules import machine_of
    from tests.bench.suite.setting import SMALL, Setting

    setting = Setting(accelerator="emulated", scale=SMALL, results=results)
    machine = machine_of(setting, "16GB")
    spec = machine.spec.with_layers(machine.spec.layers[:2])
    return OtherSide(setting, spec, machine.profile, 10**6)


def test_other_side_computes_the_same_wherever_its_layers_lie(results):
    pytest.importorskip("accelerate")
    side = other_side(results)
    tokens = torch.arange(10).view(2, 5)
    seen = []
    for resident in (0, 1, 2, 0):
        side.dispatch(resident)
        on_meta = [
            parameter.device.type == "meta" for layer in side.model.model.layers for parameter in layer.parameters()
        ]
        assert sum(on_meta) == len(on_meta) * (2 - resident) // 2
        with torch.inference_mode():
            seen.append(side.model(tokens).logits)
    assert all(torch.equal(logits, seen[0]) for logits in seen)
    assert seen[0].std() > 0.1


def test_report_tells_every_goal_and_that_nothing_is_of_a_gpu(results, capsys):
    for step in ("mixtral-16GB", "accelerate-16GB"):  # which another worker may have tested
        if not (results / f"{step}.json").is_file():
            assert suite(results, step) == 0
    assert suite(results, "report") == 0
    text = (results / "report.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "no figure here is of a GPU" in text
    for word in ("bound", "our S4", "our S3", "transformers + accelerate", "planned", "parity"):
        assert f"{word}" in text.partition("## Goals")[2]
    for name in ScheduleName:
        assert f"| {name.value} |" in text


def test_steps_are_chosen_by_name_or_by_its_beginning():
    assert gpu_suite.parse_steps("") == list(gpu_suite.STEPS)
    assert gpu_suite.parse_steps("report, accelerate") == ["report", "accelerate-16GB", "accelerate-24GB"]
    with pytest.raises(HrmError, match="mixtral-16GB"):
        gpu_suite.parse_steps("profile,magic")


def test_openmp_is_told_how_to_wait_before_torch_is_asked_for_the_card(monkeypatch):
    def folder(*_):
        raise HrmError("test", os.environ.get("GOMP_SPINCOUNT"), "is told", "")

    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is put back as it was
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(gpu_suite, "results_folder", folder)
    with pytest.raises(HrmError, match=SPINS):
        gpu_suite.run(gpu_suite._options(["--step", "report"]), [])


def test_mistakes_end_in_one_line(tmp_path, capsys):
    assert suite(tmp_path, "report") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert gpu_suite.main(["--accelerator", "tpu", "--step", "profile"]) == 2
    assert "cuda:K or emulated" in capsys.readouterr().err
