"""Random tests are seeded: a failure on one machine is a failure on all."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
