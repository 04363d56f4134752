"""Pictures of tables: sweeps, fronts, regions and what-ifs draw their rows and nothing else."""

from itertools import product
from random import Random

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

from hrm.errors import HrmError
from hrm.plots import plot_map, plot_pareto, plot_sweep, plot_what_if, style
from hrm.plots.columns import axis_of
from hrm.plots.labels import Spot, overlaps, quad
from hrm.plots.pareto import on_front
from tests.hrm.pictures import MAGIC, assert_texts_apart, lightness, named, texts, words

# ----------------------------------------------------------------------------------------- sweep


def swept() -> pd.DataFrame:
    """Three schedules over five memories, the smallest too small for any of them."""
    rows = [
        {
            "schedule": name,
            "cpu_memory_bytes": memory * 1e9,
            "tokens_per_s": None if memory == 64 else rate * memory / (memory + 100),
            "bound_tokens_per_s": None if memory == 64 else 1.2 * rate * memory / (memory + 100),
            "batch_size": None if memory == 64 else memory * 10,
            "bottleneck": None if memory == 64 else ("H2D link" if memory < 300 else "CPU compute"),
        }
        for name, rate in (("cgopipe", 400), ("fastdecode", 395), ("flexgen", 200))
        for memory in (512, 64, 128, 256, 384)
    ]
    return pd.DataFrame(rows).astype({"batch_size": "Int64"})


def test_a_sweeps_points_bounds_and_misfits_are_the_tables():
    frame = swept()
    picture = plot_sweep(frame, x="cpu_memory_bytes", here=200e9, title="test")
    upper, lower = picture.axes
    for index, name in enumerate(("cgopipe", "fastdecode", "flexgen")):
        part = frame[frame.schedule == name].sort_values("cpu_memory_bytes").dropna()
        (line,) = named(upper, f"line {index}")
        assert list(line.get_xdata()) == pytest.approx([128, 256, 384, 512])
        assert list(line.get_ydata()) == pytest.approx(list(part.tokens_per_s))
        (bound,) = named(upper, f"bound {index}")
        assert list(bound.get_ydata()) == pytest.approx(list(part.bound_tokens_per_s))
        (misfit,) = named(upper, f"misfit {index}")
        assert (list(misfit.get_xdata()), list(misfit.get_ydata())) == ([64], [0])
        (sizes,) = named(lower, f"sizes {index}")
        assert list(sizes.get_ydata()) == [1280, 2560, 3840, 5120]
        markers = [point.get_marker() for point in named(upper, f"point {index}")]
        assert markers == ["^", "^", "s", "s"]
    lines = [named(upper, f"line {index}")[0] for index in range(3)]
    assert len({line.get_linestyle() for line in lines}) == 3
    assert named(upper, "here")[0].get_xdata()[0] == 200
    assert upper.get_ylim()[0] == 0
    assert lower.get_xlabel() == "CPU memory (GB)"
    shown = {"cgopipe", "fastdecode", "flexgen", "as it is", "no policy fits"}
    shown |= {"mostly limited by: CPU compute", "H2D link"}
    assert shown <= set(words(picture))


def test_a_sweep_of_one_schedule_over_decades_is_logarithmic_and_unnamed():
    frame = swept().query("schedule == 'flexgen'").drop(columns=["batch_size", "bottleneck"])
    frame["h2d_bandwidth_bytes_per_s"] = [4e9, 2e9, 20e9, 100e9, 8e9]
    picture = plot_sweep(frame, x="h2d_bandwidth_bytes_per_s")
    (axes,) = picture.axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "host-to-device bandwidth (GB/s)"
    assert "flexgen" not in words(picture)


# ---------------------------------------------------------------------------------------- pareto


def test_the_front_is_what_no_other_point_dominates():
    for seed in range(50):
        rng = Random(seed)
        # Few values, so that many are equal in one or both.
        points = [(rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(1, 25))]
        expected = [
            not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points) for cost, gain in points
        ]
        costs, gains = zip(*points, strict=True)
        assert list(on_front(costs, gains)) == expected, points
    assert list(on_front([1, np.nan, 2], [3, 9, np.nan])) == [True, False, False]


def test_fronts_are_marked_and_dominated_points_greyed():
    frame = pd.DataFrame(
        {
            "cpu_memory_bytes": [1e11, 2e11, 3e11, 1e11, 2e11, 3e11],
            "tokens_per_s": [5, 9, 8, 4, 6, 7],
            "system": ["ours"] * 3 + ["theirs"] * 3,
        }
    )
    picture = plot_pareto(frame, x="cpu_memory_bytes", group="system")
    (axes,) = picture.axes
    (dominated,) = named(axes, "dominated 0")
    assert dominated.get_xydata().tolist() == [[300, 8]]
    (chosen,) = named(axes, "chosen 0")
    assert chosen.get_xydata().tolist() == [[100, 5], [200, 9]]
    (front,) = named(axes, "front 0")
    assert front.get_xydata().tolist() == [[100, 5], [200, 9], [300, 9]]
    assert len(named(axes, "dominated 1")[0].get_xydata()) == 0
    assert dominated.get_markerfacecolor() == "white"
    assert lightness(dominated.get_markeredgecolor()) > lightness(chosen.get_color())
    shown = set(words(picture))
    assert {"ours", "theirs"} <= shown
    assert "c" not in shown, "only points on a front are named"
    assert_texts_apart(picture)


# ------------------------------------------------------------------------------------------- map


def grid(columns: int = 12, rows: int = 9) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "h2d_bandwidth_bytes_per_s": x,
                "times_cpu": y,
                "kind": None
                if x < 120e9 and y < 1.5
                else "attention on the CPU, experts on the GPU"
                if x < 60e9 * y
                else "all on the GPU",
                "weight_share_on_gpu": x / 5e11 * y,
            }
            for x, y in product(np.geomspace(1e11, 5e11, columns), np.linspace(1, 9, rows))
        ]
    ).sample(frac=1, random_state=3)


def region_at(axes, x: float, y: float) -> list[str]:
    """Names of the regions that cover a point."""
    return [
        collection.get_gid().removeprefix("region ")
        for collection in axes.collections
        if str(collection.get_gid()).startswith("region")
        and any(path.contains_point((x, y)) for path in collection.get_paths())
    ]


def test_every_cell_of_a_map_is_covered_by_its_region_and_no_other():
    frame = grid()
    picture = plot_map(frame, x="h2d_bandwidth_bytes_per_s", y="times_cpu", region="kind", value="weight_share_on_gpu")
    axes = picture.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    for _, row in frame.iterrows():
        expected = row.kind if isinstance(row.kind, str) else "no policy fits"
        assert region_at(axes, row.h2d_bandwidth_bytes_per_s / 1e9, row.times_cpu) == [expected]


def test_a_coarse_map_has_no_part_below_nothing():
    frame = pd.DataFrame(
        [{"times_cpu": x, "times_gpu": y, "kind": "one"} for x in (1.0, 5.5, 10.0) for y in (1.0, 2.0)]
    )
    axes = plot_map(frame, x="times_cpu", y="times_gpu", region="kind").axes[0]
    assert axes.get_xlim() == (0, 12.25)
    assert axes.get_ylim() == (0.5, 2.5)


def test_outlines_run_between_cells_of_different_regions_only():
    frame = grid()
    axes = plot_map(frame, x="h2d_bandwidth_bytes_per_s", y="times_cpu", region="kind").axes[0]
    kinds = (
        frame.pivot_table(
            index="times_cpu", columns="h2d_bandwidth_bytes_per_s", values="kind", aggfunc="first", dropna=False
        )
        .fillna("-")
        .to_numpy()
    )
    borders = (kinds[1:] != kinds[:-1]).sum() + (kinds[:, 1:] != kinds[:, :-1]).sum()
    (outline,) = (c for c in axes.collections if isinstance(c, LineCollection))
    segments = outline.get_segments()
    assert len(segments) == borders > 5
    for segment in segments:
        (x0, y0), (x1, y1) = segment
        x, y = np.sqrt(x0 * x1), (y0 + y1) / 2
        step = (1.01, 0.0) if x0 == x1 else (1.0, 0.05)
        sides = [region_at(axes, x * step[0] ** sign, y + sign * step[1]) for sign in (-1, 1)]
        assert sides[0] != sides[1]


def test_names_of_regions_lie_inside_them():
    picture = plot_map(grid(40, 30), x="h2d_bandwidth_bytes_per_s", y="times_cpu", region="kind")
    axes = picture.axes[0]
    names = {
        text.get_text().replace("\n", " "): text for text in texts(picture) if text.axes is axes and text in axes.texts
    }
    assert set(names) == {"attention on the CPU, experts on the GPU", "all on the GPU", "no policy fits"}
    for name, text in names.items():
        box = text.get_window_extent().transformed(axes.transData.inverted())
        for x, y in product(np.linspace(box.x0, box.x1, 9), np.linspace(box.y0, box.y1, 3)):
            assert region_at(axes, x, y) == [name]


def test_regions_differ_without_their_colour_and_a_hole_in_the_grid_is_refused():
    frame = grid()
    axes = plot_map(frame, x="h2d_bandwidth_bytes_per_s", y="times_cpu", region="kind").axes[0]
    hatches = [c.get_hatch() for c in axes.collections if str(c.get_gid()).startswith("region")]
    assert len(set(hatches)) == len(hatches) == 3
    for bad in (frame[1:], pd.concat([frame[1:], frame[1:2]])):
        with pytest.raises(HrmError, match="must be a grid of 12 x 9 cells"):
            plot_map(bad, x="h2d_bandwidth_bytes_per_s", y="times_cpu", region="kind")


def test_many_regions_with_long_names_leave_the_legend_on_the_paper():
    frame = grid()
    frame["kind"] = [f"experts on the CPU, part {i % 6} of attention on the CPU" for i in range(108)]
    picture = plot_map(frame, x="h2d_bandwidth_bytes_per_s", y="times_cpu", region="kind", value="weight_share_on_gpu")
    assert_texts_apart(picture)
    assert set(frame.kind) <= {text.replace("\n", " ") for text in words(picture)}


# --------------------------------------------------------------------------------------- what if


def test_what_ifs_are_bars_of_percent_with_the_greatest_on_top():
    frame = pd.DataFrame(
        {
            "resource": ["gpu-memory", "h2d-bandwidth", "cpu-flops", "cpu-memory"],
            "factor": 1.1,
            "change": [0.031, 0.082, -0.004, None],
            "same_policy_change": [0.0, 0.06, 0.0, 0.0],
        }
    )
    picture = plot_what_if(frame, title="what if")
    (axes,) = picture.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "h2d-bandwidth",
        "gpu-memory",
        "cpu-flops",
        "cpu-memory",
    ]
    best, kept = axes.containers
    assert [bar.get_width() for bar in best] == pytest.approx([8.2, 3.1, -0.4, 0])
    assert [bar.get_width() for bar in kept] == pytest.approx([6, 0, 0, 0])
    tops = axes.transData.transform([(0, bar.get_y()) for bar in best])[:, 1]
    assert list(tops) == sorted(tops, reverse=True)
    assert best[0].get_hatch() != kept[0].get_hatch()
    assert {"+8.2", "-0.4", "no policy fits"} <= set(words(picture))
    assert "+10%" in axes.get_xlabel()


def test_different_factors_are_told_with_each_resource():
    frame = pd.DataFrame({"resource": ["a", "b"], "factor": [1.1, 2], "change": [0.1, 0.2]})
    assert {"a × 1.1", "b × 2"} <= set(words(plot_what_if(frame)))


def test_less_of_a_latency_is_said_beside_more_of_the_others():
    frame = pd.DataFrame(
        {
            "resource": ["gpu-flops", "gpu-launch-latency", "gpu-memory"],
            "factor": [1.1, 1 / 1.1, 1.1],
            "change": [0.1, 0.2, 0.0],
        }
    )
    picture = plot_what_if(frame)
    assert {"gpu-flops", "less gpu-launch-latency"} <= set(words(picture))
    assert "+10%" in picture.axes[0].get_xlabel()


# ------------------------------------------------------------------------------------- all of them

PICTURES = {
    "sweep": lambda path=None, frame=None: plot_sweep(
        swept() if frame is None else frame, path, x="cpu_memory_bytes", here=4e11
    ),
    "pareto": lambda path=None, frame=None: plot_pareto(
        swept() if frame is None else frame, path, x="cpu_memory_bytes", group="schedule"
    ),
    "map": lambda path=None, frame=None: plot_map(
        grid() if frame is None else frame,
        path,
        x="h2d_bandwidth_bytes_per_s",
        y="times_cpu",
        region="kind",
        value="weight_share_on_gpu",
    ),
    "what if": lambda path=None, frame=None: plot_what_if(
        pd.DataFrame({"resource": ["gpu-memory", "cpu-flops"], "factor": 1.1, "change": [0.3, 0]})
        if frame is None
        else frame,
        path,
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_no_two_texts_touch_and_all_are_legible(name):
    picture = PICTURES[name]()
    assert_texts_apart(picture)
    assert min(text.get_fontsize() for text in texts(picture)) >= 8
    assert picture.get_figwidth() <= 7.3, "as wide as a page, so that 8 points are printed as 8"


@pytest.mark.parametrize(("name", "ending"), list(product(PICTURES, MAGIC)))
def test_files_of_every_format(name, ending, tmp_path):
    path = tmp_path / f"picture{ending}"
    assert type(PICTURES[name](path)).__name__ == "Figure"
    assert path.read_bytes().startswith(MAGIC[ending])
    with pytest.raises(HrmError, match="must end in"):
        PICTURES[name](tmp_path / "picture.jpg")


@pytest.mark.parametrize("name", PICTURES)
def test_tables_without_their_columns_or_rows_are_refused(name):
    with pytest.raises(HrmError, match="must be columns of the table, which has colour"):
        PICTURES[name](None, pd.DataFrame({"colour": [1]}))


def test_a_table_without_rows_is_refused():
    with pytest.raises(HrmError, match="needs at least one row"):
        plot_pareto(swept()[:0], x="cpu_memory_bytes")


# ------------------------------------------------------------------------------ the shared look


def test_colours_are_told_apart_in_greyscale_with_their_line_marker_or_hatch():
    assert len(set(style.LINES)) == len(set(style.MARKERS)) == len(set(style.HATCHES)) == 7
    assert len(style.SERIES) == 7
    for colour in style.SERIES:
        assert lightness(style.ink(colour)) < 50, "text on white is dark"


@pytest.mark.parametrize(
    ("name", "values", "label", "unit"),
    [
        ("cpu_memory_bytes", [64e9, 512e9], "CPU memory (GB)", 1e9),
        ("gpu_memory_bytes", [5e6], "GPU memory (MB)", 1e6),
        ("h2d_bandwidth_bytes_per_s", [25e6, None], "host-to-device bandwidth (MB/s)", 1e6),
        ("gpu_flops_per_s", [65e12, 1e15, 66e12], "GPU compute (TFLOP/s)", 1e12),
        ("tokens_per_s", [5], "tokens generated a second", 1),
        ("prompt_len", [5], "prompt length (tokens)", 1),
        ("decode_s", [0.005], "decode (ms)", 1e-3),
        ("cost", [0.005], "cost", 1),
    ],
)
def test_columns_name_their_axes(name, values, label, unit):
    axis = axis_of(name, values)
    assert (axis.label, axis.unit_size) == (label, unit)


def test_boxes_overlap_where_a_fine_raster_of_points_says_so():
    rng = np.random.default_rng(5)
    checked = 0
    for _ in range(150):
        one, other = (
            quad((0.0, -1.0), (float(w), float(h)), Spot(*map(float, at), rotation=float(turn)))
            for w, h, at, turn in zip(
                rng.uniform(2, 8, 2),
                rng.uniform(1, 3, 2),
                rng.uniform(0, 9, (2, 2)),
                rng.uniform(-90, 90, 2),
                strict=True,
            )
        )
        steps = np.linspace(0.01, 0.99, 25)
        inside = [one[0] + u * (one[1] - one[0]) + v * (one[3] - one[0]) for u in steps for v in steps]
        across, up = other[1] - other[0], other[3] - other[0]
        relative = (np.array(inside) - other[0]) @ np.linalg.inv(np.array([across, up]))
        touching = bool(((relative > 0) & (relative < 1)).all(axis=1).any())
        found = bool(overlaps(one, np.array([other]))[0])
        if touching:
            assert found
        if not found:
            assert not touching
        checked += touching
    assert 30 < checked < 140
    line = np.array([[0.0, 0], [9, 9], [9, 9], [0, 0]])
    box = quad((0.0, 0.0), (2.0, 1.0), Spot(4, 4.5))
    beside = line + np.array([3.0, 0.0])
    assert overlaps(box, np.array([line, beside])).tolist() == [True, False]
