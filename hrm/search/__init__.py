"""The policy search: a space, solvers over it, and results that say how good they are.

`search` is the entrance; `space` says what is searched, `exhaustive`, `milp` and `bayesian` how,
`choose` picks by simulation, `ways` compares how several GPUs may divide the work, and `result` is
what comes back.
"""
