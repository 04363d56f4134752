"""`python -m executor` is the `executor` command."""

from moe_hrm import executor

executor()
