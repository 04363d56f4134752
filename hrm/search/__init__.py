"""The policy search: a space, solvers over it, and results that say how good they are."""
