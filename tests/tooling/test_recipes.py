"""The recipes of CONTRIBUTING: each names the tests that follow it, and those are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## How to add")[2].partition("\n## ")[0]
RECIPES = {recipe.partition("**")[0]: recipe for recipe in re.split(r"\n- \*\*", TEXT)[1:]}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_tests_that_there_are(name):
    named = re.findall(r"`(tests/[^`]+)`", RECIPES[name])
    assert named, "say which test follows the recipe, or holds what is added to its neighbours"
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_test_that_follows_a_recipe_is_named_by_one():
    following = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_new_*.py")}
    assert len(following) >= 4
    assert {path for path in following if f"`{path}`" not in TEXT} == set()
