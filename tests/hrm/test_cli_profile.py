"""`hrm profile` as users see it: what it writes, prints and keeps; `hrm profiles` for one file."""

import fcntl
import os
import re

import pytest

from executor.group.measure import seconds_a_task
from hrm.locks import open_locked
from hrm.machines import load_profile
from tests.hrm.profiling.fakes import small_sizes


@pytest.fixture(autouse=True)
def small():
    with small_sizes() as patch:
        yield patch


@pytest.fixture
def hrm(hrm, monkeypatch, tmp_path):
    """The command line in a folder of the test's own; what it was told is kept in profiles."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hrm", *map(str, args)])
        return hrm(*args)

    return run


QUICK = ("profile", "--accelerator", "cpu", "--quick", "--dtype", "float32")


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def test_it_writes_a_profile_prints_it_and_leaves_nothing_else(hrm, tmp_path, small):
    small.setattr("executor.model.host_kernels.seconds_a_task", seconds_a_task)  # with its process, as users have it
    code, out, err = hrm(*QUICK)
    assert code == 0, err
    profile = load_profile(tmp_path / "machine.yaml")
    assert profile.accelerator == "cpu"
    assert profile.disk is not None
    assert profile.environment["command"] == "hrm " + " ".join(QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["machine.yaml"]
    for line in ("decode attention", "launch latency", "L1 read", "disk", "running a task", "spread: from the 20th"):
        assert line in out
    assert "1 to 256 tokens" in out
    assert out.rstrip().endswith("written to machine.yaml")


def test_interrupted_it_keeps_what_it_has_and_says_how_to_go_on(hrm, tmp_path, small):
    with small_sizes() as stop:
        stop.setattr("hrm.profiling.memory.measure_memory", interrupt)
        code, out, err = hrm(*QUICK)
    assert (code, out) == (130, "")
    last = err.rstrip().splitlines()[-1]
    told = re.fullmatch(
        r"interrupted; (3 of \d+) measurements kept in machine\.yaml\.partial, no profile written;"
        f" go on with: hrm {' '.join(QUICK)} --resume",
        last,
    )
    assert told is not None
    assert [path.name for path in tmp_path.iterdir()] == ["machine.yaml.partial"]

    code, out, err = hrm(*QUICK, "--resume")
    assert code == 0
    assert err.startswith("going on with machine.yaml.partial\n")
    assert f"resumed: {told[1]} measurements are of " in out
    assert [path.name for path in tmp_path.iterdir()] == ["machine.yaml"]


def test_without_resume_it_starts_afresh_and_says_so(hrm, tmp_path):
    with small_sizes() as stop:
        stop.setattr("hrm.profiling.memory.measure_memory", interrupt)
        hrm(*QUICK)
    left = (tmp_path / "machine.yaml.partial").read_bytes()
    code, _, err = hrm(*("emulatd" if argument == "cpu" else argument for argument in QUICK))
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith("; did you mean emulated?\n")
    assert (tmp_path / "machine.yaml.partial").read_bytes() == left
    code, out, err = hrm(*QUICK)
    assert code == 0
    assert "measuring afresh; --resume would have gone on with machine.yaml.partial" in err
    assert "resumed" not in out


def test_what_is_left_stays_until_something_is_measured(hrm, tmp_path):
    with small_sizes() as stop:
        stop.setattr("hrm.profiling.memory.measure_memory", interrupt)
        hrm(*QUICK)
        left = (tmp_path / "machine.yaml.partial").read_bytes()
        stop.setattr("hrm.profiling.launch.launch_latency", interrupt)
        code, _, err = hrm(*QUICK)
    assert code == 130
    assert "interrupted; nothing was measured or written" in err
    assert (tmp_path / "machine.yaml.partial").read_bytes() == left


def test_interrupted_at_once_there_is_nothing_to_keep(hrm, tmp_path):
    with small_sizes() as stop:
        stop.setattr("hrm.profiling.launch.launch_latency", interrupt)
        code, _, err = hrm(*QUICK)
    assert code == 130
    assert "interrupted; nothing was measured or written" in err
    assert list(tmp_path.iterdir()) == []


def test_resume_without_anything_to_resume_measures_from_the_start(hrm):
    code, _, err = hrm(*QUICK, "--resume")
    assert code == 0
    assert "there is no machine.yaml.partial: measuring from the start" in err


def test_resume_with_other_options_is_a_mistake(hrm, tmp_path):
    with small_sizes() as stop:
        stop.setattr("hrm.profiling.memory.measure_memory", interrupt)
        hrm(*QUICK)
    code, out, err = hrm(*QUICK, "--dtype", "bfloat16", "--resume")
    assert (code, out) == (2, "")
    assert "error: machine.yaml.partial: --dtype is 'float32': differs from float32, bfloat16" in err
    assert (tmp_path / "machine.yaml.partial").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--disk", "nowhere"], "--disk is 'nowhere': must be an existing folder"),
        (["--out", "nowhere/machine.yaml"], "nowhere/machine.yaml is <No such file or directory>: must be writable"),
        (["--accelerator", "cuda:0,0"], "--accelerator is 'cuda:0,0': names a device twice"),
    ],
)
def test_mistakes_cost_no_time_and_leave_no_file(hrm, tmp_path, args, message):
    code, out, err = hrm("profile", *args)
    assert (code, out) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_profile_that_another_process_measures_is_left_to_it(hrm, tmp_path, small, resume):
    with small_sizes() as stop:
        stop.setattr("hrm.profiling.memory.measure_memory", interrupt)
        hrm(*QUICK)
    partial = tmp_path / "machine.yaml.partial"
    kept = partial.read_bytes()
    with open_locked(partial):
        code, out, err = hrm(*QUICK, *["--resume"] * resume)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: machine.yaml.partial is <in use by ")
    assert last.endswith("wait for that one, or choose another --out")
    assert partial.read_bytes() == kept
    assert hrm(*QUICK, "--resume")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["machine.yaml"]


def test_the_profile_is_locked_until_it_is_written(hrm, tmp_path, small):
    tried = []

    def save(path, profile):
        with pytest.raises(BlockingIOError):
            open_locked(tmp_path / "machine.yaml.partial")
        tried.append(path)

    small.setattr("hrm.cli.profile.save_profile", save)
    assert hrm(*QUICK)[0] == 0
    assert [path.name for path in tried] == ["machine.yaml"]
    assert list(tmp_path.iterdir()) == []


def test_a_profile_goes_down_a_pipe_and_nothing_lies_beside_it(hrm, tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2**20)
    code, _, err = hrm(*QUICK, "--out", f"/dev/fd/{writer}")
    os.close(writer)
    assert code == 0, err
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read().startswith(b"schema: ")
    assert list(tmp_path.iterdir()) == []


def test_another_disk_is_measured_if_named(hrm, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    hrm(*QUICK, "--disk", folder)
    disk = load_profile(tmp_path / "machine.yaml").disk
    assert disk is not None
    assert disk.path == str(folder)
    assert list(folder.iterdir()) == []


def test_an_emulated_machine_shows_its_links_and_what_lanes_take_from_one_another(hrm):
    code, out, _ = hrm(
        "profile",
        "--accelerator",
        "emulated",
        "--gpu-memory",
        "4MB",
        "--link-bandwidth",
        "1GB/s",
        "--quick",
        "--dtype",
        "float32",
    )
    assert code == 0
    assert "cpu → gpu  pinned" in out
    assert "cpu → cpu  staging" in out
    code, again, _ = hrm("profiles", "machine.yaml", "--table")
    assert code == 0
    assert again.strip() in out


def test_cards_and_hosts_are_shown_whole(hrm):
    _, card, _ = hrm("profiles", "L4", "--table")
    assert "gpu → gpu  peer" in card
    _, host, _ = hrm("profiles", "gcp-g2-standard-48", "--table")
    assert "root ports of all GPUs" in host
    assert "cpu → cpu  staging" in host


def test_help_explains_every_option(hrm):
    code, out, _ = hrm("profile", "--help")
    assert code == 0
    for option in (
        "--accelerator",
        "--gpu-memory",
        "--link-bandwidth",
        "--model",
        "--dtype",
        "--disk",
        "--quick",
        "--resume",
        "--out",
    ):
        assert option in out
    assert "cuda:all" in out
