"""The command line of hrm, as tests call it."""

import json
import sys

import pytest

from hrm.cli import main
from hrm.search import SearchResult, Solver, Space, bound, choose, exhaustive, polish, ways

REGIONS = 6000


@pytest.fixture
def quick_bounds(monkeypatch):
    """Bounds of fewer regions, for tests of many searches: any number of regions gives a bound."""
    monkeypatch.setattr(bound, "BUDGET", REGIONS)
    monkeypatch.setattr(bound, "LARGEST_BUDGET", REGIONS)


@pytest.fixture
def rough_bounds(monkeypatch):
    """Bounds of the fewest regions, for tests of what searches find, which is the same whatever the bound."""
    monkeypatch.setattr(bound, "BUDGET", 0)
    monkeypatch.setattr(bound, "LARGEST_BUDGET", 0)


@pytest.fixture
def coarse_searches(monkeypatch, rough_bounds):
    """Searches of the coarse grid alone, whose best is simulated: for tests of whether anything fits, and of reports.

    What fits at all is decided there: integers are refined around what does.
    """
    monkeypatch.setattr(exhaustive, "REACHES", ())
    monkeypatch.setattr(choose, "MAX_SIMULATED", 1)
    monkeypatch.setattr(polish, "ROUNDS", 0)


@pytest.fixture(scope="module")
def searches_kept():
    """A module's searches, each done once: by several tests, or for one that lays many of them beside each by itself.

    A search of another space, by another solver, one that goes as far as another or has other bounds is another one;
    one without bounds is as good with them.
    """
    found: dict[tuple[object, ...], SearchResult] = {}
    search = ways.search

    def kept(
        space: Space, solver: Solver = ways._EXHAUSTIVE, *, runner_ups: int = ways.RUNNER_UPS, bounded: bool = True
    ) -> SearchResult:
        how_far = exhaustive.REACHES, choose.MAX_SIMULATED, polish.ROUNDS, bound.BUDGET, bound.LARGEST_BUDGET
        asked = repr(space), repr(solver), runner_ups, how_far
        if asked not in found:
            found[asked] = search(space, solver, runner_ups=runner_ups, bounded=True)
        return found[asked]

    with pytest.MonkeyPatch.context() as patch:
        for module in [module for module in sys.modules.values() if vars(module).get("search") is search]:
            patch.setattr(module, "search", kept)
        yield


@pytest.fixture
def hrm(capsys):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        try:
            main([str(arg) for arg in args])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def hrm_json(hrm):
    def run(*args: object) -> dict:
        code, out, err = hrm(*args, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


@pytest.fixture
def refused(hrm):
    """Run a command line that must fail as a mistake in the input does; returns the message."""

    def run(*args: object) -> str:
        code, out, err = hrm(*args)
        assert code == 2, (out, err)
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        return err

    return run
