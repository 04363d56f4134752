import pytest


@pytest.fixture(autouse=True)
def lanes_take_turns(one_core):
    """Engines run in most of these tests."""
