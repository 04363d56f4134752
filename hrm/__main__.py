"""`python -m hrm` is the `hrm` command."""

from moe_hrm import hrm

hrm()
