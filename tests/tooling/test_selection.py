"""Selections of cases: what they have, and that `--full` has all."""

import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

from tests.contracts.selection import chosen, covering, pairs

AXES = {"a": (0, 1, 2), "b": ("x", "y", "z"), "c": (None, True), "d": (1, 2)}
CASES = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


def test_any_two_values_that_meet_do_so_in_few_cases():
    few = [CASES[place] for place in covering(CASES, lambda case: pairs(case.items()))]
    assert 9 <= len(few) <= 12 < len(CASES)
    for one, other in combinations(AXES, 2):
        assert {(case[one], case[other]) for case in few} == set(product(AXES[one], AXES[other]))


def test_the_same_cases_are_chosen_each_time_and_a_new_value_is_among_them():
    facts = [set(case.items()) for case in CASES]
    places = covering(facts, lambda each: each)
    assert places == covering(facts, lambda each: sorted(each, key=repr)) == sorted(places)
    assert len(facts) in covering([*facts, {("a", 3)}], lambda each: each)


def test_cases_elsewhere_are_marked():
    made = chosen([(1, "one"), (2, "two"), (3, "three")], at=(0, 2))
    assert [each.values for each in made] == [(1, "one"), (2, "two"), (3, "three")]
    assert [[mark.name for mark in each.marks] for each in made] == [[], ["full"], []]
    assert [each.values for each in chosen("ab", at=(1,))] == [("a",), ("b",)]
    with pytest.raises(AssertionError, match="no case has"):
        chosen("ab", at=(2,))


CONFTEST = "from tests.conftest import pytest_addoption, pytest_collection_modifyitems"
SOME = """
import pytest
from tests.contracts.selection import chosen

@pytest.mark.parametrize("number", chosen(range(3), at=(0, 2)))
def test_of_many(number): pass
"""


@pytest.mark.parametrize(("asked", "numbers"), [((), "02"), (("--full",), "012")])
def test_marked_cases_are_left_out_unless_asked_for(tmp_path, asked, numbers):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(SOME)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow: x\n  full: x\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *asked, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert re.findall(r"test_of_many\[(.)\]", done.stdout) == list(numbers), done.stdout + done.stderr
