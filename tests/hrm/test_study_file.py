"""Studies that are kept: what a crash, a full disk, a damaged line or a lock leaves of them."""

import errno
import fcntl
import json
import os

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hrm.errors import PolicyError
from hrm.search import study_file
from hrm.search.bayesian import Optuna
from hrm.search.study_file import StudyFile
from tests.hrm.test_solvers import a_space

optuna.logging.set_verbosity(optuna.logging.ERROR)


def study(path) -> optuna.Study:
    storage = JournalStorage(StudyFile(str(path)))
    return optuna.create_study(study_name="s", storage=storage, load_if_exists=True)


def with_trials(path, count) -> None:
    kept = study(path)
    for number in range(count):
        trial = kept.ask()
        trial.suggest_float("x", 0, 1)
        kept.tell(trial, number)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "trials.log"
    with_trials(path, 3)
    return path


def test_optuna_reads_what_is_written(path):
    theirs = JournalStorage(JournalFileBackend(str(path)))
    values = [x.value for x in optuna.load_study(study_name="s", storage=theirs).trials]
    assert values == [0, 1, 2] == [x.value for x in study(path).trials]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_cut_short_costs_that_line(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # the last value is lost, or only the end of its line
    with_trials(path, 2)
    values = [x.value for x in study(path).trials]
    assert values == ([0, 1, 2, 0, 1] if cut == 1 else [0, 1, None, 0, 1])
    assert path.read_bytes().startswith(whole[:-cut])


@pytest.mark.parametrize("damage", [b"\xff\0\xff\n", b"{}\n", b"[1]\n", b'{"op_code": NaN}\n'])
def test_a_damaged_line_costs_that_line(path, damage):
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    with_trials(path, 1)
    assert [x.value for x in study(path).trials] == [0, 1, 2, 0]


def test_a_full_disk_costs_what_is_not_written(path, monkeypatch):
    real = study_file._write

    def half(file, data):
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = study(path)
    whole = path.read_bytes()
    monkeypatch.setattr(study_file, "_write", half)
    with pytest.raises(PolicyError, match=r"No space left on device.*make room"):
        kept.ask()
    assert path.read_bytes() == whole
    monkeypatch.setattr(study_file, "_write", real)
    with_trials(path, 1)
    assert [x.value for x in study(path).trials] == [0, 1, 2, 0]


def test_the_lock_of_a_process_that_is_no_more_holds_nobody_up(path):
    path.with_name("trials.log.lock").symlink_to(path)  # as Optuna's own lock leaves one
    with_trials(path, 1)
    assert len(study(path).trials) == 4


def test_a_lock_that_is_held_is_told(path, monkeypatch):
    monkeypatch.setattr(study_file, "LOCK_S", 0.05)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PolicyError, match="must not be locked by another process"):
            study(path).ask()


@pytest.mark.parametrize("content", [b"{}", b"a: 1\n", b'{"model": 1}\n'])
def test_a_file_of_something_else_is_never_written_to(tmp_path, content):
    path = tmp_path / "policy.json"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match="holds something else"):
        StudyFile(str(path))
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [{"op_code": 99}, {"op_code": 0}, {"op_code": 4, "study_id": []}])
def test_a_line_that_contradicts_the_others_names_the_storage(path, line):
    path.write_bytes(path.read_bytes() + json.dumps(line).encode() + b"\n")
    with pytest.raises(PolicyError, match=r"--storage is .*trials\.log'.*may be damaged"):
        Optuna(trials=1, storage=str(path)).find(a_space(1))


def test_trials_with_parameters_of_another_kind_are_left_out(tmp_path):
    path, space = tmp_path / "trials.log", a_space(1)
    Optuna(trials=3, storage=str(path)).find(space)
    path.write_bytes(path.read_bytes().replace(b'"param_name":"size"', b'"param_name":"sise"'))
    assert Optuna(trials=1, storage=str(path)).find(space).ranked
