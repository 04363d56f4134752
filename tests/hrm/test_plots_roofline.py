"""Rooflines: what is drawn is what the figures and the paper's equations say, and can be read."""

from dataclasses import replace

import pytest

from hrm.errors import HrmError, ProfileError
from hrm.hardware import Cache, Disk, HardwareProfile, Rate
from hrm.machines import compose
from hrm.model_spec import BUILT_IN_MODELS
from hrm.plots import plot_roofline, style
from tests.contracts.selection import chosen
from tests.hrm.pictures import MAGIC, assert_texts_apart, named, words
from tests.hrm.support import figure, machine, rate, tiny_spec

MIXTRAL, DBRX = BUILT_IN_MODELS["mixtral-8x7b"], BUILT_IN_MODELS["dbrx"]


def everything() -> HardwareProfile:
    """A measured machine with caches, a pageable link and a disk."""
    t4 = compose("1xT4")
    caches = {"gpu": (("L2", 1.2e12),), "cpu": (("L1", 3e12), ("L2", 1.5e12), ("L3", 4e11))}
    levels = tuple(
        replace(
            level,
            caches=tuple(
                Cache(name=name, capacity_bytes=figure(1e7), read_bytes_per_s=rate(bandwidth))
                for name, bandwidth in caches[level.name]
            ),
        )
        for level in t4.levels
    )
    pageable = replace(t4.h2d, kind="pageable", bandwidth_bytes_per_s=rate(4e9))
    disk = Disk(path="/", capacity_bytes=figure(1e12), read_bytes_per_s=rate(2.1e9))
    return replace(t4, accelerator="cuda", levels=levels, links=(*t4.links, pageable), disk=disk)


def host_alone() -> HardwareProfile:
    t4 = compose("1xT4")
    return replace(t4, name="host", accelerator="cpu", levels=t4.levels[1:], links=())


def same_processor() -> HardwareProfile:
    """As an emulated accelerator is: GPU and CPU are alike, and the link is slow."""
    return machine(gpu_flops=77e9, cpu_flops=77e9, gpu_read=16e9, cpu_read=16e9, link=25e6)


PICTURES = {
    "T4": (compose("1xT4"), {"spec": MIXTRAL, "dtypes": ["float16"]}),
    "4xT4": (compose("4xT4"), {"spec": DBRX, "dtypes": ["float16", "float32"], "contexts": [512, 9]}),
    "H100": (compose("1xH100"), {}),
    "H100 Mixtral": (compose("1xH100"), {"spec": MIXTRAL, "batch_sizes": [2**n for n in range(4, 15)]}),
    "host": (host_alone(), {"spec": MIXTRAL, "dtypes": ["bfloat16", "float32"]}),
    "emulated": (same_processor(), {"spec": tiny_spec(), "batch_sizes": [8, 32, 128, 512]}),
    "full": (everything(), {"dtypes": ["float16", "float32"]}),
    "full Mixtral": (everything(), {"spec": MIXTRAL, "dtypes": ["float16"]}),
}


@pytest.mark.parametrize(("profile", "options"), chosen(PICTURES.values(), at=(1, 3, 4, 5, 7)), ids=list(PICTURES))
def test_no_two_texts_touch(profile, options):
    assert_texts_apart(plot_roofline(profile, **options))


def test_roofs_have_the_slopes_and_heights_of_their_figures():
    (axes,) = plot_roofline(compose("1xT4"), dtypes=["float16", "float32"]).axes
    known = {
        "slope GPU memory achieved": 272e9,
        "slope GPU memory datasheet": 320e9,
        "slope H2D pinned achieved": 12e9,
        "slope H2D pinned ceiling": 13.8405e9,
        "slope H2D pinned datasheet": 15.75e9,
    }
    for name, bandwidth in known.items():
        (line,) = named(axes, name)
        xs, ys = line.get_data()
        assert ys / xs == pytest.approx([bandwidth] * 2)
        assert ys[1] == pytest.approx(65e12 if name.endswith("datasheet") else 21.2e12)
    for name, flops in (("float16 achieved", 21.2e12), ("float16 datasheet", 65e12), ("float32 achieved", 5.67e12)):
        (line,) = named(axes, f"compute GPU {name}")
        assert list(line.get_ydata()) == pytest.approx([flops] * 2)
        assert line.get_xdata()[1] >= axes.get_xlim()[1]
    assert not named(axes, "slope D2H")


def test_how_a_figure_is_known_is_told_by_its_line_and_the_planned_one_is_thick():
    (axes,) = plot_roofline(compose("1xT4"), dtypes=["float16"]).axes
    achieved, ceiling, datasheet = (
        named(axes, f"slope H2D pinned {kind}")[0] for kind in ("achieved", "ceiling", "datasheet")
    )
    assert [line.get_linestyle() for line in (achieved, ceiling, datasheet)] == ["-", "--", ":"]
    assert achieved.get_linewidth() > 1.5 * ceiling.get_linewidth() == 1.5 * datasheet.get_linewidth()
    only_ceiling = replace(
        machine(), levels=(replace(machine().top, read_bytes_per_s=Rate(ceiling=figure(3e11))), machine().host)
    )
    (axes,) = plot_roofline(only_ceiling).axes
    (line,) = named(axes, "slope GPU memory")
    assert line.get_linestyle() == "--"
    assert line.get_linewidth() == 2.6


def test_operators_stand_at_their_intensities():
    """Mixtral: 4 query heads share a KV head; an expert sees a quarter of a batch."""
    picture = plot_roofline(compose("1xT4"), spec=MIXTRAL, dtypes=["float16", "float32"], batch_sizes=[1, 4096])
    attention, ffn = picture.axes
    for dtype, size in (("float16", 2), ("float32", 4)):
        (line,) = named(attention, f"mark {dtype}")
        assert line.get_xdata() == pytest.approx([8 / size] * 2)
        one, many = named(ffn, f"mark {dtype}")
        assert one.get_xdata() == pytest.approx([2 / size] * 2)  # 2 experts, each with one token
        assert many.get_xdata() == pytest.approx([2 * 4096 * 2 / 8 / size] * 2)
    assert {"KV in float16", "KV in float32", "float16: N =", "4k"} <= set(words(picture))


def test_attained_and_turning_points_follow_the_papers_equations():
    p_i, p_j, b_i, b_j, b_ji = 50e12, 1e12, 300e9, 100e9, 12e9
    profile = machine(gpu_flops=p_i, cpu_flops=p_j, gpu_read=b_i, cpu_read=b_j, link=b_ji)
    attention, ffn = plot_roofline(profile, spec=MIXTRAL, batch_sizes=[32, 8192]).axes

    def point(axes, name, index=0):
        (x,), (y,) = named(axes, name)[index].get_data()
        return x, y

    kv = 4.0  # FLOPs a byte, on either level
    on_host, on_gpu = min(p_j, b_j * kv), min(p_i, b_i * kv)
    assert point(attention, "in place") == pytest.approx((kv, on_host))
    assert point(attention, "fetched") == pytest.approx((kv, min(on_gpu, b_ji * kv)))
    # P1 and P2 lie on the link's roof, at the heights of host and GPU.
    assert point(attention, "P1 bfloat16") == pytest.approx((on_host / b_ji, on_host))
    assert point(attention, "P2 bfloat16") == pytest.approx((on_gpu / b_ji, on_gpu))
    assert kv < on_host / b_ji, "attention is left of P1: that is why it runs on the CPU"

    many = 8192 * 2 / 8  # every expert is hit
    assert point(ffn, "in place", 1) == pytest.approx((many, min(p_j, b_j * many)))
    assert point(ffn, "P1 bfloat16") == pytest.approx((p_j / b_ji, p_j))
    (x, y), (_, fetched) = point(ffn, "P2 bfloat16"), point(ffn, "fetched", 1)
    assert y == pytest.approx(b_ji * x)
    assert fetched == pytest.approx(min(y, b_ji * many))
    assert b_i * 128 * 2 / 8 * 0.9 < y < b_i * 128 * 2 / 8  # activations are read besides


def test_decode_attention_is_drawn_under_its_kernels_rate_of_reading():
    host = compose("1xT4")
    attention, ffn = plot_roofline(host, spec=MIXTRAL, dtypes=["float16"]).axes
    (kernel,) = named(attention, "slope CPU attention achieved")
    (memory,) = named(attention, "slope CPU attention ceiling")
    (read,) = named(ffn, "slope CPU memory achieved")
    for line, bandwidth in (
        (kernel, host.host.attention_bytes_per_s),
        (memory, host.host.read_bytes_per_s.at()),
        (read, host.host.read_bytes_per_s.at()),
    ):
        assert line.get_ydata()[0] / line.get_xdata()[0] == pytest.approx(bandwidth)


def test_contexts_that_matter_are_told_and_others_are_not():
    assert any(
        "context 512 or 2048" in text
        for text in words(plot_roofline(compose("1xT4"), spec=MIXTRAL, dtypes=["float16"], contexts=[2048, 512]))
    )


def test_a_machine_without_a_gpu_shows_micro_batches_under_its_own_roof():
    picture = plot_roofline(host_alone(), spec=MIXTRAL, dtypes=["float32"], batch_sizes=[32])
    for axes in picture.axes:
        assert named(axes, "in place")
        assert not named(axes, "fetched") + named(axes, "P1") + named(axes, "slope H2D")
    assert "μ =" in words(picture)
    (axes,) = (axes for axes in picture.axes if named(axes, "mark float32 32"))
    (x,), (y,) = named(axes, "in place")[0].get_data()
    assert y <= host_alone().host.read_bytes_per_s.at() * x * (1 + 1e-9)


def test_curves_that_are_only_assumed_are_not_shown():
    def curves(source: str) -> int:
        (axes,) = plot_roofline(compose(source), dtypes=["float16"]).axes
        return len(named(axes, "curve"))

    assert curves("1xT4") == 1, "fitted"
    assert curves("1xH100") == 0, "assumed"


def test_caches_disk_and_pageable_links_are_roofs_too():
    (axes,) = plot_roofline(everything(), dtypes=["float16"]).axes
    for name in ("CPU L1", "CPU L2", "CPU L3", "GPU L2", "H2D pageable", "staging to pinned", "disk"):
        assert named(axes, f"slope {name} "), name
    lines = {name: named(axes, f"slope {name}")[0] for name in ("CPU L1", "GPU memory")}
    assert style.luminance(lines["CPU L1"].get_color()) > 2 * style.luminance(lines["GPU memory"].get_color())


@pytest.mark.parametrize("ending", MAGIC)
def test_the_same_picture_is_the_same_file_in_every_format(ending, tmp_path):
    paths = [tmp_path / f"{name}{ending}" for name in ("one", "two")]
    pictures = [plot_roofline(machine(), path) for path in paths]
    assert all(path.read_bytes().startswith(MAGIC[ending]) for path in paths)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert all(type(picture).__name__ == "Figure" for picture in pictures)


def test_what_cannot_be_written_is_refused_in_one_line(tmp_path):
    for path, rule in (
        (tmp_path / "a.gif", "must end in .png, .svg, .pdf"),
        (tmp_path / "none" / "a.png", "No such file or directory"),
    ):
        with pytest.raises(HrmError, match=rule):
            plot_roofline(machine(), path)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(HrmError, match=r"a folder.*must be writable"):
        plot_roofline(machine(), tmp_path / "b.png")
    with pytest.raises(ProfileError, match="no rate for dtype float32"):
        plot_roofline(machine(), dtypes=["float32"])
