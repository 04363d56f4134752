"""The policy search: a space, solvers over it, a bound on it, and results that say how good.

`search` is the entrance: it searches a `Space` with a `Solver`. `solver` says what a solver is and
lists them; `exhaustive`, `milp` and `bayesian` have one each. `choose` and `polish` pick by
simulation, `ways` compares how several GPUs may divide the work, `bound` shows that no policy of
the space can do better, and `result` is what comes back.
"""

from hrm.search.result import Outcome, SearchResult
from hrm.search.solver import SOLVERS, Solver, solver_named
from hrm.search.space import Space
from hrm.search.ways import search

__all__ = ["SOLVERS", "Outcome", "SearchResult", "Solver", "Space", "search", "solver_named"]
