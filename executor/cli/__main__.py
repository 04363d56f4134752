"""`python -m executor.cli` is the `executor` command."""

from executor.cli import main

main()
