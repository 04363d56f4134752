"""`python -m hrm.cli` is the `hrm` command."""

from hrm.cli import main

main()
