"""Random tests are seeded: a failure on one machine is a failure on all. Slow tests are known by their mark."""

import gc
import os
import signal

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the Hub itself
os.environ["EXECUTOR_NATIVE_UP_TO"] = "1024"  # who computes what is the same on every machine

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# What shells put in the background ignores Ctrl-C, and under nohup the end of the terminal; tests of both inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# `slow` is what takes over five seconds; one processor's may be half of another's.
SURELY_SLOW_S = 10.0

# Collections look at all that is alive, which is much here: by Python's defaults they are a tenth of the suite's time.
ALLOCATED_BEFORE_COLLECTION = 50_000


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """Collect no garbage among modules and tests: all of them stay to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(ALLOCATED_BEFORE_COLLECTION, *gc.get_threshold()[1:])
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Keep them from collections again, and what came since: an engine that ends lets these look at everything."""
    gc.collect(1)
    gc.freeze()


def processor_s() -> float:
    """Time that processors have spent on this process and on its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    began_s = processor_s()
    result = yield
    item.user_properties.append(("processor_s", processor_s() - began_s))
    return result


def pytest_terminal_summary(terminalreporter):
    """Name tests that take long and are not marked so, whatever else the machine was doing."""
    for report in terminalreporter.getreports("passed"):
        taken_s = dict(report.user_properties).get("processor_s", 0.0)
        if report.when == "call" and taken_s > SURELY_SLOW_S and "slow" not in report.keywords:
            terminalreporter.write_line(
                f"{report.nodeid} took {taken_s:.0f} s of the processor: make it cheaper, or mark it slow", yellow=True
            )


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="every case of products and random problems of which a selection is run"
    )


def pytest_collection_modifyitems(config, items):
    """Slow tests come first, so that at the end all workers have something short to do; of products a selection."""
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
