"""Published measurements as a test bench: what the model says beside what others measured.

`data` holds the runs, `systems` how each system runs, read in its code; `compare` predicts runs on
the machines that they ran on, `fit` reproduces the figures of those machines that are fitted, and
`scaling` looks at two and four GPUs. `command` is `hrm paper`, which prints (`report`) and draws
(`picture`) all of it. Nothing else imports this package: who plans a machine of their own does not
need it.
"""
