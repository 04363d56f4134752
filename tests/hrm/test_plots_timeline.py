"""Timelines: every bar is a span, and what is written beside them is what they add up to."""

from collections import defaultdict
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from hrm.acts import NAMES
from hrm.acts.decode import LOAD_PAGE
from hrm.cli.timelines import fitting_all, in_order, of_run, of_schedules
from hrm.costs import Costs
from hrm.errors import PolicyError, TraceError
from hrm.formats import Formats
from hrm.memory import plan_memory
from hrm.phases import decode_work, prefill_work, simulate_work
from hrm.plots import plot_timeline, style, window
from hrm.plots.timeline import LOOKS, layer_ends, step_ends
from hrm.policy import Parallelism, Policy, ScheduleName, kv_tokens_for
from hrm.policy_file import PolicyFile, profile_hash
from hrm.run_record import AcceleratorRecord, BatchRecord, RunRecord, TotalsRecord, WorkloadRecord
from hrm.schedules import iter_tasks
from hrm.simulate import simulate
from hrm.tasks import Device, Lane, Phase, TaskId
from hrm.trace import Span, Trace, write_chrome_trace
from hrm.units import GB
from hrm.workload import Workload
from tests.hrm.pictures import MAGIC, assert_texts_apart, lightness, named, texts, words
from tests.hrm.support import machine, random_pipeline, tiny_spec

SPEC = tiny_spec()
WORKLOAD = Workload(name="test", prompt_len=32, max_prompt_len=64, gen_len=8, num_requests=64)


def policy(**changes) -> Policy:
    plain = Policy(
        batch_size=64,
        micro_batch_size=16,
        resident_experts=(1,) * SPEC.num_layers,
        kv_tokens_per_micro_batch=kv_tokens_for(16, 40, 72),
        prefill_chunk_tokens=512,
    )
    return replace(plain, **changes)


def slow_machine():
    """A machine on which the tiny model's bars are wide enough to be seen."""
    return machine(gpu_flops=1e9, gpu_read=1e9, cpu_read=2e8, cpu_flops=1e9, link=1e7)


def decode(steps: int = 2, **changes) -> Trace:
    costs = Costs(SPEC, slow_machine(), Formats.of("bfloat16"))
    return simulate_work(decode_work(costs, policy(**changes), 36, num_steps=steps))


def prefill() -> Trace:
    return simulate_work(prefill_work(Costs(SPEC, slow_machine(), Formats.of("bfloat16")), policy(), WORKLOAD))


def bars(axes) -> dict[str, list[tuple[float, float]]]:
    """Left and right ends of the bars by lane and kind, in the axis' unit."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for collection in axes.collections:
        for path in collection.get_paths():
            xs = path.vertices[:, 0]
            found[collection.get_gid()].append((xs.min(), xs.max()))
    return found


def test_tasks_too_short_to_see_leave_as_much_ink_as_their_lane_is_busy():
    loads = [
        Span(TaskId(LOAD_PAGE, 0, i), i * 1e-3, (i + share) * 1e-3)
        for i, share in enumerate(Random(0).uniform(0.05, 0.35) for _ in range(3000))
    ]
    trace = Trace(tuple(loads))
    figure = plot_timeline({"short tasks": trace})
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255  # pyright: ignore[reportAttributeAccessIssue]
    box = figure.axes[0].bbox
    row = pixels[round(len(pixels) - (box.y0 + box.y1) / 2), round(box.x0) + 5 : round(box.x1) - 5]
    blank = 1 - np.array(to_rgb(LOOKS["LOAD_PAGE"].colour))
    ink = (1 - row) @ blank / (blank @ blank)
    assert ink.mean() == pytest.approx(trace.utilisation()[Lane.H2D], rel=0.1)


@pytest.mark.parametrize("trace", [decode(), prefill()], ids=["decode", "prefill"])
def test_every_span_is_a_bar_and_the_shares_are_the_lanes(trace):
    (axes,) = plot_timeline({"predicted": trace}).axes
    drawn = bars(axes)
    factor = 1.0 if axes.get_xlabel() == "s" else 1e3
    assert sum(map(len, drawn.values())) == len(trace.spans)
    expected: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for span in trace.spans:
        ends = (span.start_s * factor, span.end_s * factor)
        expected[f"{span.lane} {span.id.act.name}"].append(ends)
    assert drawn.keys() == expected.keys()
    for name, ends in expected.items():
        for one, other in zip(sorted(drawn[name]), sorted(ends), strict=True):
            assert one == pytest.approx(other, abs=1e-9)
    busy = {text.get_gid(): text.get_text() for text in axes.texts if text.get_gid()}
    total_s = max(span.end_s for span in trace.spans)
    for lane in {span.lane for span in trace.spans}:
        busy_s = sum(span.end_s - span.start_s for span in trace.spans if span.lane is lane)
        assert busy[f"busy {lane}"] == f"{busy_s / total_s:.0%}"


def test_boundaries_are_where_the_last_task_of_a_layer_or_step_ends():
    trace = decode(ffn=Device.CPU)
    (axes,) = plot_timeline({"": trace}).axes
    factor = 1.0 if axes.get_xlabel() == "s" else 1e3
    for gid, kind, key in (
        ("layer end", "LOAD_EXPERT_OUTPUT", lambda task: (task.step, task.layer)),
        ("step end", "SAMPLE", lambda task: task.step),
    ):
        ends: dict[object, float] = defaultdict(float)
        for span in trace.spans:
            if span.id.act.name == kind:
                ends[key(span.id)] = max(ends[key(span.id)], span.end_s * factor)
        lines = sorted(line.get_xdata()[0] for line in named(axes, gid))
        assert lines == pytest.approx(sorted(ends.values()))
    assert len(layer_ends(trace)) == 2 * SPEC.num_layers
    assert len(step_ends(trace)) == 2


def test_traces_stand_under_one_another_on_one_axis_with_the_same_lanes_and_looks():
    fast, slow = decode(1), decode(1, schedule=ScheduleName.FLEXGEN)
    late = Trace(tuple(s._replace(start_s=s.start_s + 9, end_s=s.end_s + 9) for s in fast.spans))
    upper, lower, third = plot_timeline({"fast": fast, "slow": slow, "late": late}).axes
    assert upper.get_xlim() == lower.get_xlim() == third.get_xlim()
    assert upper.get_xlim()[1] == pytest.approx(slow.makespan_s * 1e3)
    lanes = [[label.get_text() for label in axes.get_yticklabels()] for axes in (upper, lower)]
    assert lanes == [["GPU", "CPU", "H2D", "D2H"]] * 2
    assert bars(third).keys() == bars(upper).keys()
    for name, ends in bars(upper).items():
        for one, other in zip(sorted(bars(third)[name]), sorted(ends), strict=True):
            assert one == pytest.approx(other), "each begins at 0"
    looks = [
        {c.get_gid(): (np.asarray(c.get_facecolor()).tolist(), c.get_hatch()) for c in axes.collections}
        for axes in (upper, lower)
    ]
    for name in looks[0].keys() & looks[1].keys():
        assert looks[0][name][0] == looks[1][name][0]


def test_kinds_that_share_a_lane_can_be_told_apart_without_colour():
    """Over all schedules, phases, devices and staging: lightness or hatch differ in a lane."""
    together: dict[tuple[Lane, Phase], set[str]] = defaultdict(set)
    for seed in range(150):
        rng = Random(seed)
        pipeline = random_pipeline(rng, most_ranks=2, most_parts=2)
        trace = simulate(iter_tasks(pipeline, rng.choice(list(ScheduleName))), lambda _: 1.0)
        for span in trace.spans:
            together[span.lane, pipeline.phase].add(span.id.act.name)
    assert {kind for kinds in together.values() for kind in kinds} == set(LOOKS) == set(NAMES)
    for kinds in together.values():
        for one, other in combinations(kinds, 2):
            light = abs(lightness(LOOKS[one].colour) - lightness(LOOKS[other].colour))
            assert light > 12 or LOOKS[one].hatch != LOOKS[other].hatch, (one, other)
    pages, hidden = LOOKS["LOAD_PAGE"], LOOKS["LOAD_HIDDEN"]
    assert lightness(pages.colour) - lightness(hidden.colour) > 50


@pytest.mark.parametrize(
    "traces",
    [
        {"cgopipe": decode(), "flexgen": decode(schedule=ScheduleName.FLEXGEN)},
        {"prefill": prefill()},
        {"long": decode(12)},
        {"two layers": window(decode(), first=1, last=2)},
    ],
    ids=["two", "prefill", "long", "window"],
)
def test_no_two_texts_touch(traces):
    assert_texts_apart(plot_timeline(traces, title="tiny on a slow machine"))


def test_names_stand_inside_the_bars_that_they_name():
    picture = plot_timeline({"": window(decode(), first=1, last=1)})
    (axes,) = picture.axes
    drawn = bars(axes)
    letters = [text for text in texts(picture) if text.get_gid() == "task"]
    assert len(letters) > 5
    lanes = [label.get_text() for label in axes.get_yticklabels()]
    kinds = {letter: name for name, letter in NAMES.items()}
    for text in letters:
        x, row = text.get_position()
        name = f"{lanes[round(row)]} {kinds[text.get_text()[0]]}"
        box = text.get_window_extent().transformed(axes.transData.inverted())
        assert any(a <= box.x0 and box.x1 <= b and a < x < b for a, b in drawn[name]), text


# ---------------------------------------------------------------------------------------- window


def test_windows_of_layers_side_by_side_hold_all_the_work_between_them():
    trace = decode(3)
    whole = window(trace, first=1, last=3, step=1)
    parts = [window(trace, first=layer, last=layer, step=1) for layer in (1, 2, 3)]
    for lane in Lane:
        together = sum(part.busy_s().get(lane, 0.0) for part in parts)
        assert whole.busy_s().get(lane, 0.0) == pytest.approx(together)
    ends = layer_ends(trace)
    for layer, part in enumerate(parts, start=1):
        assert min(s.start_s for s in part.spans) == pytest.approx(ends[1, layer - 1])
        assert max(s.end_s for s in part.spans) == pytest.approx(ends[1, layer])
    assert window(trace) == trace


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"last": 9}, "--layers is 10: must be at least 1 and at most 4, as many as there are from layer 0 on"),
        ({"first": 4}, "--from-layer is 4: must be one of the 4 layers"),
        ({"first": 3, "last": 4}, "--layers is 2: must be at least 1 and at most 1, as many as there are from layer 3"),
        ({"first": 2, "last": 1}, "--layers is 0: must be at least 1"),
        ({"step": 5, "last": 0}, "the 0 layers"),
    ],
)
def test_layers_that_are_not_there_are_refused(options, told):
    with pytest.raises(TraceError, match=told):
        window(decode(), **options)


def test_an_empty_trace_is_refused():
    with pytest.raises(TraceError, match="must hold tasks"):
        plot_timeline({"nothing": Trace(())})


@pytest.mark.parametrize("ending", MAGIC)
def test_files_of_every_format(ending, tmp_path):
    path = tmp_path / f"lanes{ending}"
    picture = plot_timeline({"": decode(1)}, path)
    assert path.read_bytes().startswith(MAGIC[ending])
    assert picture.get_figwidth() == style.PAGE_INCHES


# ----------------------------------------------------------------------------- plans and runs


def plan(gpu_bytes: float = 1 * GB, **changes) -> PolicyFile:
    profile = replace(machine(gpu_bytes=gpu_bytes, gpu_flops=1e9, gpu_read=1e9, link=1e7), accelerator="emulated")
    return PolicyFile(
        policy=policy(**changes),
        memory_budget_bytes={"gpu": int(gpu_bytes), "cpu": 10**9},
        model=SPEC,
        workload=WORKLOAD,
        profile=profile,
        profile_hash=profile_hash(profile),
        predicted={},
    )


def test_schedules_are_compared_on_one_policy_with_attention_where_each_has_it():
    names = (ScheduleName.CGOPIPE, ScheduleName.FLEXGEN, ScheduleName.FLEXGEN_C)
    title, traces = of_schedules(plan(), names, Phase.DECODE, 2, searched=False)
    assert "tiny on test machine: 4 micro-batches of 16" in title
    assert [name.partition(",")[0] for name in traces] == list(names)
    on_cpu = {
        name.partition(",")[0]: any(s.id.act.name == "ATTENTION" and s.lane is Lane.CPU for s in trace.spans)
        for name, trace in traces.items()
    }
    assert on_cpu == {"cgopipe": True, "flexgen": False, "flexgen-c": True}
    assert all("predicted" in name for name in traces)


def test_a_searched_policy_gives_up_residents_until_every_schedule_fits():
    needs = {
        (name, resident): plan_memory(
            SPEC, in_order(policy(resident_experts=(resident,) * 4), name), slow_machine()
        ).gpu.planned_bytes
        for name, resident in product((ScheduleName.CGOPIPE, ScheduleName.FLEXGEN), (1, 2))
    }
    flexgen, cgopipe = needs[ScheduleName.FLEXGEN, 1], needs[ScheduleName.CGOPIPE, 2]
    tight = plan(max(flexgen, cgopipe), resident_experts=(2,) * 4)
    chosen = fitting_all(tight, [ScheduleName.CGOPIPE, ScheduleName.FLEXGEN])
    assert sum(chosen.resident_experts) < 8
    for name in (ScheduleName.CGOPIPE, ScheduleName.FLEXGEN):
        plan_memory(SPEC, in_order(chosen, name), tight.profile).check_fits()
    assert fitting_all(tight, [ScheduleName.CGOPIPE]) == tight.policy


def test_a_policy_of_a_pipeline_stage_gives_up_residents_of_its_own_layers():
    two = machine(gpu_bytes=1e5, num_gpus=2)
    stage = replace(plan(resident_experts=(2, 2)), profile=two)
    stage = replace(stage, policy=replace(stage.policy, parallelism=Parallelism.PIPELINE))
    chosen = fitting_all(stage, [ScheduleName.CGOPIPE, ScheduleName.FLEXGEN])
    assert chosen.resident_experts == (0, 0)  # nothing fits so little memory, whatever is given up
    roomy = replace(stage, profile=machine(num_gpus=2))
    _, traces = of_schedules(roomy, (ScheduleName.CGOPIPE, ScheduleName.FLEXGEN), Phase.DECODE, 1, searched=True)
    for trace in traces.values():
        assert {span.id.layer for span in trace.spans} == {0, 1}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory whose measured trace is a simulation of twice the time, seconds later."""
    plain = plan()
    costs = Costs(SPEC, plain.profile, Formats.of("bfloat16"))
    spans: list[Span] = []
    start_s = 3.0
    for work in (prefill_work(costs, plain.policy, WORKLOAD), decode_work(costs, plain.policy, 33, num_steps=4)):
        trace = simulate_work(work)
        spans += [s._replace(start_s=start_s + 2 * s.start_s, end_s=start_s + 2 * s.end_s) for s in trace.spans]
        start_s = max(span.end_s for span in spans)
    write_chrome_trace(tmp_path / "trace.json", measured=Trace(tuple(spans)))
    record = RunRecord(
        outcome="completed",
        schedule="cgopipe",
        accelerator=AcceleratorRecord(name="emulated", emulated=True, description="emulated on the CPU"),
        totals=TotalsRecord(
            requests=64, prompt_tokens=2048, generated_tokens=320, prefill_s=1, decode_s=1, tokens_per_s=160
        ),
        workload=WorkloadRecord(prompt_len=32, max_prompt_len=64, gen_len=5, max_gen_len=5),
        phases={},
        memory={},
        batches=[BatchRecord(requests=64, decode_steps=4)],
        policy_file=plain,
    )
    (tmp_path / "run.json").write_bytes(msgspec.json.encode(record))
    return tmp_path


def test_no_more_steps_of_a_run_are_drawn_than_it_had(run):
    for asked, drawn in ((None, 2), (3, 3)):
        traces = of_run(run, Phase.DECODE, asked)[1]
        assert [trace.num_steps for trace in traces.values()] == [drawn, drawn]
    with pytest.raises(PolicyError, match="--steps is 4: must be at most 3, as many as there are"):
        of_run(run, Phase.DECODE, 4)


@pytest.mark.parametrize("phase", Phase)
def test_a_run_stands_over_its_prediction(run, phase):
    title, traces = of_run(run, phase, 2)
    measured, predicted = traces.values()
    assert title == "tiny, cgopipe, emulated on the CPU"
    assert list(traces) == ["measured, emulated accelerator", "predicted"]
    assert {s.id.step for s in measured.spans} == {s.id.step for s in predicted.spans}
    # The steps drawn are not the first ones, so both begin with weights that are already there.
    assert measured.makespan_s / predicted.makespan_s == pytest.approx(2, rel=0.02)
    picture = plot_timeline(traces, title=title)
    assert_texts_apart(picture)
    assert any("measured, emulated accelerator" in text for text in words(picture))
