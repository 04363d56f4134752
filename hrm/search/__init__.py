"""The policy search: a space, solvers over it, a bound on it, and results that say how good.

`solvers.solve` is the entrance; `space` says what is searched, `exhaustive`, `milp` and `bayesian`
how, `choose` and `polish` pick by simulation, `ways` compares how several GPUs may divide the work,
`bound` shows that no policy of the space can do better, and `result` is what comes back.
"""
