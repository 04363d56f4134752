"""Random tests are seeded: a failure on one machine is a failure on all."""

import signal

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Shells start what they put in the background with Ctrl-C ignored, which the tests of it inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
