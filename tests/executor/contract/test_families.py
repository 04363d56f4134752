"""The families that the planner says are run are those that the executor has."""

from executor.families import FAMILIES
from hrm.contract.families import EXECUTED_FAMILIES
from hrm.model_spec.families import FAMILY_READERS


def test_what_is_said_to_run_is_what_the_executor_has():
    assert sorted(EXECUTED_FAMILIES) == sorted(FAMILIES)
    assert set(EXECUTED_FAMILIES) <= set(FAMILY_READERS)
