"""The families that the planner and the README say are run are those that the executor has."""

import re
from pathlib import Path

from executor.families import FAMILIES
from hrm.contract.families import EXECUTED_FAMILIES
from hrm.model_spec.families import FAMILY_READERS

README = Path(__file__).parents[3] / "README.md"


def test_what_is_said_to_run_is_what_the_executor_has():
    assert sorted(EXECUTED_FAMILIES) == sorted(FAMILIES)
    assert set(EXECUTED_FAMILIES) <= set(FAMILY_READERS)


def test_the_readme_names_every_family_beside_whether_it_runs():
    rows = dict(
        re.findall(r"^\| (families run|planned only) \| (.*) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    )
    said = {word: re.findall(r"`(\w+)`", families) for word, families in rows.items()}
    runs = {True: "families run", False: "planned only"}
    for is_run, word in runs.items():
        assert said[word] == [family for family in FAMILY_READERS if (family in EXECUTED_FAMILIES) is is_run]
