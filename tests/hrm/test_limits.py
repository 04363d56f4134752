"""Every command answers or refuses at once, however much it is asked for."""

import time

import pytest

pytestmark = pytest.mark.usefixtures("rough_bounds")

MODEL = ("--model", "mixtral-8x7b", "--gpus", "1xT4")
VAST = ("--cpu-memory", "1000000TB", "--gpu-memory", "200GB")
BLANKS = "1" + 120_000 * " " + "!"
DIGITS = 5_000 * "9"
LONG = 100_000 * "a"


@pytest.fixture
def hrm(hrm):
    """Run a command, which fails if it took over 10 s of the processor's time."""

    def run(*words: object) -> tuple[int, str, str]:
        began_s = time.process_time()
        answer = hrm(*words)
        assert time.process_time() - began_s < 10
        return answer

    return run


TOO_MUCH = [
    ("search", *MODEL, "--gpu-memory", BLANKS),
    ("search", *MODEL, "--set", f"h2d-bandwidth={BLANKS}"),
    ("search", *MODEL, "--set", f"gpu-flops={BLANKS}"),
    ("search", *MODEL, "--set", f"{LONG}={DIGITS}"),
    ("search", *MODEL, "--gpu-memory", f"{DIGITS}GB"),
    ("search", *MODEL, "--requests", DIGITS),
    ("search", *MODEL, "--prompt-len", DIGITS, "--gen-len", "5"),
    ("search", *MODEL, "--workload", LONG),
    ("search", *MODEL, "--host", LONG),
    ("search", "--model", LONG, "--gpus", "1xT4"),
    ("search", "--model", "dbrx", "--gpus", LONG),
    ("search", "--model", "dbrx", "--gpus", BLANKS),
    ("search", "--model", "dbrx", "--gpus", f"{DIGITS}xT4"),
    ("search", "--model", "dbrx", "--gpus", 1_000_000 * ","),
    ("search", "--model", "dbrx", "--gpus", ",".join(10_000 * ["1xT4"])),
    ("search", "--model", "dbrx", "--profile", LONG),
    ("estimate", *MODEL, "-u", DIGITS, "-n", "1"),
    ("estimate", *MODEL, "-u", "1", "-n", "3000000"),
    ("estimate", *MODEL, "-u", "1", "-n", "1", "--resident-experts", 100_000 * ","),
    ("estimate", *MODEL, "-u", "1", "-n", "1", "--resident-experts", DIGITS),
    ("estimate", *MODEL, "-u", "1", "-n", "1", "--kv-on-gpu", DIGITS),
    ("map", *MODEL, "--x", "cpu=1:10:100000000", "--y", "gpu=1:10:2"),
    ("map", *MODEL, "--x", f"cpu=1:10:{DIGITS}", "--y", "gpu=1:10:2"),
    ("map", *MODEL, "--x", "cpu=1:10:²", "--y", "gpu=1:10:2"),
    ("plot", "sweep", *MODEL, "--vary", "prompt-len", "--from", "1", "--to", DIGITS, "--out", "a.png"),
    ("plot", "sweep", *MODEL, "--vary", "cpu-memory", "--from", BLANKS, "--to", "1TB", "--out", "a.png"),
    ("models", LONG),
    ("profiles", LONG),
]


@pytest.mark.parametrize("number", range(len(TOO_MUCH)))
def test_far_too_much_is_refused_at_once(hrm, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = TOO_MUCH[number]
    code, out, err = hrm(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_millions_of_micro_batches_are_estimated_and_not_drawn(hrm, tmp_path):
    policy = tmp_path / "policy.json"
    code, out, _ = hrm("estimate", *MODEL, *VAST, "-u", 1, "-n", 3_000_000, "--out", policy)
    assert code == 0
    assert "tokens/s" in out
    for words in (
        ("simulate",),
        ("simulate", "--phase", "prefill"),
        ("simulate", "--layers", 1),
        ("plot", "timeline", "--out", tmp_path / "a.png"),
    ):
        code, out, err = hrm(*words, "--policy", policy)
        assert (code, out) == (2, "")
        assert "must be at most 30,000 to be drawn" in err
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
