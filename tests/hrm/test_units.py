"""Sizes and rates as people write them; workloads."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.errors import UnitError, WorkloadError
from hrm.units import (
    format_bandwidth,
    format_bytes,
    format_flops,
    format_number,
    format_seconds,
    is_whole_number,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_seconds,
)
from hrm.workload import WORKLOADS, Workload, named_workload


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("16GB", 16_000_000_000),
        ("15.5GiB", 16_642_998_272),
        ("1 kib", 1024),
        ("512B", 512),
        ("1e9 B", 10**9),
        (" 2 TB ", 2 * 10**12),
        ("3.b", 3),
    ],
)
def test_sizes_read_in_decimal_and_binary_units(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "flops_per_s"),
    [
        ("65TFLOP/s", 65e12),
        ("65 T", 65e12),
        ("1.5 pflops", 1.5e15),
        ("353GFLOP/s ", 353e9),
        ("2e12 FLOP/s", 2e12),
        ("800MFLOP", 8e8),
    ],
)
def test_compute_rates_read_with_or_without_their_whole_unit(text, flops_per_s):
    assert parse_flops(text) == pytest.approx(flops_per_s, rel=1e-12)


@pytest.mark.parametrize("text", ["", "TFLOP/s", "0T", "-1T", "65 TB/s", "nan", "1e40T", "1 flip"])
def test_what_is_no_compute_rate_is_refused(text):
    with pytest.raises(UnitError, match=r"--to is .*: must be a positive rate in FLOP/s"):
        parse_flops(text, "--to")


@pytest.mark.parametrize(
    ("text", "seconds"), [("5us", 5e-6), ("5 µs", 5e-6), ("0.2ms", 2e-4), ("1s", 1.0), ("0ns", 0.0), ("3e2 ns", 3e-7)]
)
def test_durations_read_with_their_unit(text, seconds):
    assert parse_seconds(text, is_latency=True) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "16 gigs", "16Gb/s", "nan", "inf", "1e40GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UnitError, match=r"--gpu-memory is .*: must be a positive size"):
        parse_bytes(text, "--gpu-memory")


BARE = [
    (parse_bytes, "16", "16GB", 16e9),
    (parse_bytes, "64.5", "64.5GB", 64.5e9),
    (parse_bytes, "16000000000", "16000000000B", 16e9),
    (parse_bytes, "1e9", "1e9B", 1e9),
    (parse_bandwidth, "24", "24GB/s", 24e9),
    (parse_bandwidth, "24/s", "24GB/s", 24e9),
    (parse_flops, "65", "65TFLOP/s", 65e12),
    (parse_flops, "6.5e13", "6.5e13FLOP/s", 65e12),
    (parse_seconds, "30", "30s", 30.0),
    (partial(parse_seconds, is_latency=True), "5", "5us", 5e-6),
    (partial(parse_seconds, is_latency=True), "0.00002", "0.00002s", 2e-5),
]


@pytest.mark.parametrize(("parse", "text", "meant", "value"), BARE)
def test_a_bare_number_is_refused_with_the_likely_unit_which_then_reads(parse, text, meant, value):
    with pytest.raises(UnitError, match=rf"--x is '{text}': needs a unit; did you mean {meant}\?"):
        parse(text, "--x")
    assert parse(meant, "--x") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["16Gb/s", "16 Gbit/s", "16Gbits"])
def test_bits_are_not_read_as_bytes(text):
    with pytest.raises(UnitError, match="must be in bytes a second, not bits; write it like 2GB/s"):
        parse_bandwidth(text, "--link-bandwidth")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("200ms", 0.2), ("1.5 min", 90), ("2h", 7200), (" 5 µs ", 5e-6), ("5us", 5e-6)]
)
def test_durations_read_from_microseconds_to_hours(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("text", ["", "s", "0s", "-1s", "1e999s", "3 days", "nan", "us", "1 hour", "5us5"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UnitError, match=r"--max-ttft is .*: must be a positive duration"):
        parse_seconds(text, "--max-ttft")


def test_a_whole_number_has_digits_alone_and_no_thousands_of_them():
    whole = ["0", "007", "9" * 18]
    assert [text for text in (*whole, "", "-1", "1.0", "²", " 1", "x", "9" * 5000) if is_whole_number(text)] == whole


def test_a_size_with_endless_blanks_is_refused_at_once():
    blanks = " " * 120_000
    for parse in (parse_bytes, parse_bandwidth, parse_flops, parse_seconds):
        with pytest.raises(UnitError):
            parse(f"1{blanks}!", "--x")


@settings(derandomize=True, max_examples=300)
@given(st.integers(1, 2**50))
def test_what_is_printed_reads_back_within_its_digits(num_bytes):
    # Three significant digits, and whole numbers below a thousand.
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.006, abs=0)
    assert parse_bandwidth(format_bandwidth(num_bytes)) == pytest.approx(num_bytes, rel=0.006)


@settings(derandomize=True, max_examples=300)
@given(st.integers(1, 10**18), st.sampled_from(["b", "B"]))
def test_bytes_are_exact_up_to_what_a_float_holds(num_bytes, unit):
    assert parse_bytes(f"{num_bytes}{unit}") == pytest.approx(num_bytes, rel=2**-52, abs=0)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (format_bytes(16e9), "16.0 GB"),
        (format_bytes(999), "999 B"),
        (format_bandwidth(12e9), "12.0 GB/s"),
        (format_flops(65e12), "65.0 TFLOP/s"),
        (format_flops(2.5e9), "2.50 GFLOP/s"),
        (format_seconds(0.00125), "1.25 ms"),
        (format_seconds(7500), "2 h 05 min"),
        (format_seconds(83), "1 min 23 s"),
        (format_seconds(2e-6), "2.00 µs"),
        (format_seconds(1e-9), "1.00 ns"),
        (format_seconds(0.0), "0.00 µs"),
    ],
)
def test_quantities_print_with_three_digits(shown, text):
    assert shown == text


def test_named_workloads_are_those_of_the_paper():
    lengths = {n: (w.prompt_len, w.max_prompt_len, w.gen_len) for n, w in WORKLOADS.items()}
    assert lengths == {
        "mtbench": (77, 418, 128),
        "synthetic-reasoning": (242, 256, 50),
        "summarization": (1693, 1984, 64),
    }
    assert named_workload("mtbench").max_context_len == 546
    assert named_workload("mtbench").decode_steps == 127


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_len": 0}, "prompt_len is 0"),
        ({"gen_len": 0}, "gen_len is 0"),
        ({"max_prompt_len": 9}, "max_prompt_len is 9: must be at least the mean prompt_len 10"),
        ({"num_requests": 0}, "num_requests is 0"),
        ({"num_requests": 10**16}, "num_requests is 10+: must lie between 1 and 1,000,000,000"),
        ({"gen_len": 10**30}, "gen_len is 10+: must be at most 10,000,000"),
        ({"max_prompt_len": 10**8}, "max_prompt_len is 10+: must be at most 10,000,000"),
        ({"prompt_len": float("nan")}, "prompt_len is nan"),
    ],
)
def test_impossible_lengths_are_refused(changes, message):
    with pytest.raises(WorkloadError, match=message):
        Workload(**{"name": "w", "prompt_len": 10, "max_prompt_len": 10, "gen_len": 1, **changes})


def test_an_unknown_workload_lists_the_known_ones():
    with pytest.raises(WorkloadError, match="--workload is 'mt': must be one of mtbench, synth"):
        named_workload("mt")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (0.000012346, "0.00001235"),
        (0.00001, "0.00001"),
        (0.5, "0.5"),
        (335.0, "335"),
        (335.46, "335.5"),
        (4393.4, "4393"),
        (9999.6, "10,000"),
        (101_990.0, "101,990"),
        (-12345.6, "-12,346"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_printed_without_exponents(number, text):
    assert format_number(number) == text


@given(st.floats(1e-12, 1e15))
def test_a_printed_number_is_the_number_to_four_digits(number):
    text = format_number(number)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(number, rel=0.5e-3)


def test_rates_are_printed_without_exponents():
    assert [format_flops(rate) for rate in (2e12, 3e9, 1.5e8, 2e5)] == [
        "2.00 TFLOP/s",
        "3.00 GFLOP/s",
        "150 MFLOP/s",
        "200000 FLOP/s",
    ]
