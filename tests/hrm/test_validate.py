"""A run beside its prediction: whatever was predicted or run has its row."""

import json
from dataclasses import replace

import pytest

from hrm.acts import decode
from hrm.hardware import Figure, LaneThreads, Source
from hrm.machines import of_parts
from hrm.policy_file import profile_hash
from hrm.run_record import KindTotal, LaneRecord, read_run
from hrm.tasks import Device, Lane, Phase
from hrm.validate import predict_ranks, validate
from tests.fuzz.targets_hrm import a_fleet, a_run


@pytest.fixture
def folder(tmp_path):
    """A run that recorded no H2D lane, LOAD_PAGE, and a kind and a lane that its policy has not."""
    run = a_run()
    for phase in run["phases"].values():
        phase["lanes"].pop("H2D", None)
        phase["kinds"]["CPU_EXPERTS"] = {"count": 2, "seconds": 0.25, "num_bytes": 0}
        phase["lanes"]["STAGE"] = {"busy_s": 0.5, "num_bytes": 0}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


def test_every_kind_and_lane_that_was_predicted_or_run_has_a_row(folder):
    record = read_run(folder)
    prediction, validation = predict_ranks(record)[0], validate(record)
    for phase in Phase:
        of_phase = record.phase(phase)
        kinds = {kind for p, kind in prediction.kind_s if p is phase} | set(of_phase.kinds)
        assert "CPU_EXPERTS" in kinds, "run, and not predicted"
        assert "SAMPLE" in kinds, "predicted, and not run"
        assert {kind for p, kind in validation.kind_s if p is phase} == kinds
        for kind in kinds:
            both = validation.kind_s[phase, kind]
            assert both.measured == (of_phase.kinds[kind].seconds if kind in of_phase.kinds else 0)
            assert both.predicted == prediction.kind_s.get((phase, kind), 0.0)
            assert (both.error is None) == (kind not in of_phase.kinds)
        lanes = {lane for p, lane in prediction.lane_s if p is phase} | {Lane(name) for name in of_phase.lanes}
        assert {lane for p, lane in validation.lane_s if p is phase} == lanes
        assert {Lane.STAGE, Lane.H2D} <= lanes


def test_rows_of_one_side_are_printed_and_written(folder, hrm):
    _, out, _ = hrm("validate", str(folder), "--json")
    content = json.loads(out)
    for of_phase in content["kind_s"].values():
        assert of_phase["CPU_EXPERTS"] == {"measured": 0.25, "predicted": 0, "error": -1}
        assert of_phase["SAMPLE"]["measured"] == 0
        assert of_phase["SAMPLE"]["predicted"] > 0
        assert of_phase["SAMPLE"]["error"] is None
    for of_phase in content["lane_s"].values():
        assert of_phase["STAGE"] == {"measured": 0.5, "predicted": 0, "error": -1}
        assert of_phase["H2D"]["measured"] == 0
    _, out, _ = hrm("validate", str(folder))
    rows = [line.split() for line in out.splitlines()]
    for begin in (["F", "cpu", "experts", "250"], ["L", "sample", "–"], ["lane", "STAGE", "500"], ["lane", "H2D", "–"]):
        found = [row for row in rows if row[: len(begin)] == begin]
        assert len(found) == 2, begin
        assert {row[-1] for row in found} == ({"–"} if begin[-1] == "–" else {"-100.0%"})


def test_what_the_profile_warns_of_is_repeated_once(folder, hrm):
    for warnings in ("", "8 figures noisy, levels[0].read among them"):
        run = json.loads((folder / "run.json").read_text())
        profile = replace(read_run(folder).policy_file.profile, environment={"warnings": warnings})
        run["policy_file"]["profile"]["environment"] = profile.environment
        run["policy_file"]["profile_hash"] = profile_hash(profile)
        (folder / "run.json").write_text(json.dumps(run))
        _, out, _ = hrm("validate", str(folder))
        assert out.count("the profile warns:") == (1 if warnings else 0)
        assert warnings in out


def test_the_workers_of_a_fleet_have_a_line_each_and_one_is_shown_in_full(folder, tmp_path, hrm):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "run.json").write_text(json.dumps(a_run()))
    (tmp_path / "run.json").write_text(json.dumps(a_fleet()))
    _, out, _ = hrm("validate", str(tmp_path), "--json")
    content = json.loads(out)
    _, whole, _ = hrm("validate", str(alone), "--json")
    assert content["workers"] == {"1": json.loads(whole)}
    assert content["tokens_per_s"] == content["workers"]["1"]["tokens_per_s"]
    _, out, _ = hrm("validate", str(tmp_path))
    rows = [line.split() for line in out.splitlines()]
    assert [row[:4] for row in rows if row[2:3] == ["a.json"]] == [
        ["1", "a", "a.json", "4"],
        ["2", "b", "a.json", "0,"],
    ]
    assert hrm("validate", str(tmp_path), "--worker", "1") == hrm("validate", str(alone))
    for words, told in (
        (("validate", str(tmp_path), "--worker", "2"), "--worker is 2: must be a worker of which"),
        (("validate", str(alone), "--worker", "1"), "--worker is 1: is of a fleet's run"),
        (("plot", "timeline", "--run", str(tmp_path), "--out", str(tmp_path / "a.png")), "run.json: workers is <1>"),
    ):
        code, _, err = hrm(*words)
        assert code == 2
        assert told in err


def test_what_a_record_lacks_was_not_done(folder):
    record = read_run(folder)
    bare = replace(record, phases={})
    assert bare.phase(Phase.DECODE).seconds == 0
    assert record.phase(Phase.DECODE).kind(decode.EMBED) == KindTotal()
    assert record.phase(Phase.DECODE).lane(Lane.CPU) == LaneRecord(busy_s=0)
    predicted = {row for row, both in validate(bare).kind_s.items() if both.predicted}
    assert predicted == {row for row, seconds in predict_ranks(bare)[0].kind_s.items() if seconds}


def test_every_ranks_link_has_the_pace_that_its_run_tells(folder):
    record = read_run(folder)
    plan = record.policy_file
    one = plan.profile
    peer = replace(one.h2d, source=one.top.name, target=one.top.name, kind="peer")
    ranks = replace(plan, profile=of_parts(one, 2, peer), policy=replace(plan.policy, attention=Device.GPU))
    pace = one.h2d.bandwidth_bytes_per_s.at()
    told = replace(record.accelerator, h2d_bytes_per_s=pace, d2h_bytes_per_s=one.d2h.bandwidth_bytes_per_s.at())
    planned, paced = (
        predict_ranks(replace(record, policy_file=ranks, accelerator=accelerator))[0]
        for accelerator in (replace(told, h2d_bytes_per_s=None, d2h_bytes_per_s=None), told)
    )
    assert paced.kind_s == pytest.approx(planned.kind_s)


def test_batches_that_are_counted_together_are_predicted_each(folder):
    record = read_run(folder)
    (batch,) = record.batches[:1]
    other = replace(batch, decode_steps=batch.decode_steps + 1)
    one_by_one = predict_ranks(replace(record, batches=[batch, other, batch, batch]))[0]
    together = predict_ranks(replace(record, batches=[replace(batch, count=3), other]))[0]
    assert together.phase_s == pytest.approx(one_by_one.phase_s)
    assert together.kind_s == pytest.approx(one_by_one.kind_s)
    assert together.phase_s[Phase.PREFILL] == pytest.approx(
        4 * predict_ranks(replace(record, batches=[batch]))[0].phase_s[Phase.PREFILL]
    )


@pytest.mark.parametrize("gen_len", [0.0, 0.004])
def test_a_run_most_of_whose_requests_failed_is_predicted_with_none_that_decode(folder, gen_len):
    """Fewer than a token each on average: none is active in decode, rather than fewer than none."""
    record = read_run(folder)

    def predicted(mean: float) -> dict[Phase, float]:
        return predict_ranks(replace(record, workload=replace(record.workload, gen_len=mean)))[0].phase_s

    assert predicted(gen_len)[Phase.DECODE] == pytest.approx(predicted(1.0)[Phase.DECODE], rel=0.01)


def test_prefill_takes_as_long_as_its_work_on_cores_that_lanes_share(folder):
    """However little that is for each lane, whose threads would need a hundred times the cores that there are."""
    record = read_run(folder)
    plan = record.policy_file
    shared = LaneThreads(cores=1, task_s=Figure(value=0.0, source=Source.ASSUMED))
    levels = tuple(replace(each, processor=replace(each.processor, cores=100)) for each in plan.profile.levels)
    profile = replace(plan.profile, levels=levels, lane_threads=shared)
    apart = predict_ranks(record)[0]
    computing_s = sum(s for (phase, lane), s in apart.lane_s.items() if phase is Phase.PREFILL and lane.computes)
    together = predict_ranks(replace(record, policy_file=replace(plan, profile=profile)))[0]
    assert together.phase_s[Phase.PREFILL] >= 100 * computing_s > apart.phase_s[Phase.PREFILL]
    lanes_s = sum(s for (phase, lane), s in together.lane_s.items() if phase is Phase.PREFILL and lane.computes)
    assert lanes_s >= (1 - 1e-9) * 100 * computing_s, "as a run's tasks take longer while others compute"
