"""Both programs as the shell sees them: exit codes, closed pipes, closed outputs, signals."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from hrm.cli.program import parameter_name

PROGRAMS = ("hrm", "executor")
ESTIMATE = ["estimate", "--model", "mixtral-8x7b", "--gpus", "1xT4", "-u", "8", "-n", "8"]


def started(program, *args, **options):
    command = [sys.executable, "-m", program, *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def ended(process) -> tuple[int, str]:
    """Exit code and standard error of a process."""
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize(
    ("program", "args"),
    [
        ("hrm", ["models"]),
        ("hrm", ["--help"]),
        ("hrm", ["paper", "--csv"]),
        ("hrm", ["models", "--json"]),
        ("hrm", ESTIMATE),
        ("executor", ["--help"]),
        ("executor", ["run", "--help"]),
    ],
)
def test_a_reader_that_has_gone_is_no_mistake(program, args):
    reader, writer = os.pipe()
    os.close(reader)
    process = started(program, *args, stdout=writer)
    os.close(writer)
    assert ended(process) == (0, "")


@pytest.mark.parametrize(
    ("program", "args"),
    [("hrm", ["models"]), ("hrm", ["models", "dbrx"]), ("hrm", ["search", "-h"]), ("executor", ["-h"])],
)
def test_a_closed_output_is_no_mistake(program, args):
    command = 'exec "$@" >&-'
    process = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", program, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_with_its_output_closed_nothing_is_printed_into_a_file(tmp_path):
    policy = tmp_path / "policy.json"
    process = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-m", "hrm", *ESTIMATE, "--out", policy],
        check=False,
        timeout=60,
    )
    assert process.returncode == 0
    text = policy.read_text()
    assert text.startswith("{")
    assert text.endswith("}\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_full_disk_under_the_output_is_told_in_one_line(program):
    with Path("/dev/full").open("w") as full:
        code, err = ended(started(program, "--help", stdout=full))
    assert code == 2
    assert err == ("error: the output is <No space left on device>: must be usable; make room or check the path\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_both_programs_tell_a_mistake_in_the_arguments_alike(program):
    command = "search" if program == "hrm" else "run"
    code, err = ended(started(program, command, "--foo", stdout=subprocess.DEVNULL))
    assert code == 2
    assert (
        err == f"error: --foo is <unknown>: must be an option of {program} {command}; see {program} {command} --help\n"
    )
    assert err.count("\n") == 1


def commands_under(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command of a program with the words that call it."""
    yield path, group
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands_under(command, *path, name)
        else:
            yield (*path, name), command


COMMANDS = {
    " ".join(path): command
    for program in PROGRAMS
    for path, command in commands_under(import_module(f"{program}.cli").cli, program)
}
MISTAKE = re.compile(r"error: (?P<where>.+?) is (?P<value>'.*?'|<.+?>): (?P<rule>.+); (?P<remedy>.+)\n")


def mistakes_in(command: click.Command, path: str) -> Iterator[tuple[list[str], str, str, str]]:
    """Arguments, then what must be said of them: where, which value, and a part of the rule."""
    yield ["--nothing-like-it"], "--nothing-like-it", "<unknown>", "must be an option of"
    if isinstance(command, click.Group):
        yield ["zzz"], f"COMMAND of {path}", "'zzz'", "must be one of "
    elif required := [each for each in command.params if each.required]:
        yield [], parameter_name(required[0]), "<missing>", "must be given"
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        flag = parameter_name(option)
        if option.is_flag:
            yield [f"{flag}=x"], flag, "<given a value>", "must stand alone"
            continue
        if option.type.name != "text" or option.required:  # --kv-on-gpu may stand alone
            yield [flag], flag, "<incomplete>", "must have a value"
        if not option.multiple:
            yield [flag, "1", f"{flag}=2"], flag, "<given twice>", "may be given once only"
        match option.type:
            case click.Choice():
                yield [flag, "zzz"], flag, "'zzz'", "must be one of "
            case click.IntRange(min=int(least)):
                yield [flag, str(least - 1)], flag, f"'{least - 1}'", f"must be a whole number of at least {least}"
            case click.types.IntParamType():
                yield [flag, "1.5"], flag, "'1.5'", "must be a whole number"
            case click.types.FloatParamType():
                yield [flag, "zzz"], flag, "'zzz'", "must be a number"
            case click.Path(dir_okay=False):
                yield [flag, "/"], flag, "'/'", "must be a file, not a folder"
            case click.Path(file_okay=False):
                yield [flag, __file__], flag, f"'{__file__}'", "must be a folder, not a file"


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_of_both_programs_tells_each_mistake_in_one_line(capsys, path):
    program, *words = path.split()
    for args, where, value, rule in mistakes_in(COMMANDS[path], path):
        with pytest.raises(SystemExit) as stop:
            import_module(f"{program}.cli").main([*words, *args])
        out, err = capsys.readouterr()
        said = MISTAKE.fullmatch(err)
        assert (stop.value.code, out) == (2, ""), args
        assert said is not None, err
        assert (said["where"], said["value"]) == (where, value), err
        assert rule in said["rule"], err
        remedies = ("did you mean ", "name a file", "name a folder", "leave one out")
        assert said["remedy"] == f"see {path} --help" or said["remedy"].startswith(remedies), err


@pytest.mark.parametrize("path", COMMANDS)
def test_lines_of_help_fit_a_narrow_terminal_and_end_between_words(capsys, monkeypatch, path):
    monkeypatch.setenv("COLUMNS", "80")
    program, *words = path.split()
    import_module(f"{program}.cli").main([*words, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line) > 80 or line.endswith("-") or "\N{NON-BREAKING HYPHEN}" in line]


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("hrm serch", "search"),
        ("executor bnech", "bench"),
        ("hrm plot rofline", "roofline"),
        ("hrm search --modle x", "--model"),
        ("executor run --polcy x", "--policy"),
        ("hrm estimate --schedule fastdecod", "fastdecode"),
        ("executor run --schedule fastdecod", "fastdecode"),
        ("executor bench --model dbrx --schedules cgopipe,fastdecod", "fastdecode"),
        ("executor bench --model mixtral-8x7", "mixtral-8x7b"),
        ("hrm search --gpus 1xL4 --model dbrx --workload mtbnch", "mtbench"),
        ("hrm search --gpus 1xL4 --model dbrx --set h2d-bandwith=24GB/s", "h2d-bandwidth"),
        ("hrm search --gpus 1xL4 --model dbrx --weight-format int4-32", "int4-g32"),
        ("hrm map --gpus 1xL4 --model dbrx --x cpu-memry=1GB:2GB:2 --y gpu=1:2:2", "cpu-memory"),
        ("hrm plot sweep --gpus 1xL4 --model dbrx --vary cpu-memry --from 1GB --to 2GB --out x.png", "cpu-memory"),
    ],
)
def test_what_is_nearest_to_a_wrong_word_is_named(capsys, words, near):
    program, *args = words.split()
    with pytest.raises(SystemExit):
        import_module(f"{program}.cli").main(args)
    assert capsys.readouterr().err.endswith(f"; did you mean {near}?\n")


def is_waiting(pid) -> bool:
    """Whether a process sleeps, as Linux tells, and has done so for a while."""
    times = []
    for _ in range(2):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        times.append((fields[0], fields[11]))
        time.sleep(0.3)
    return times[0] == times[1] and times[0][0] == "S"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_a_command_in_good_order(tmp_path, number, code):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody reads it: the command waits to write
    process = started("hrm", *ESTIMATE, "--out", pipe, stdout=subprocess.DEVNULL)
    time.sleep(0.2)
    while not is_waiting(process.pid) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    status, err = ended(process)
    assert (status, err.strip()) == (code, "interrupted")
