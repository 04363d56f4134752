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


def test_the_readme_has_a_row_for_every_family_with_whether_it_runs():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (run|planned) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    said = {family: (models, word) for family, models, word in rows}
    assert said == {
        family: (reader.models, "run" if family in EXECUTED_FAMILIES else "planned")
        for family, reader in FAMILY_READERS.items()
    }
