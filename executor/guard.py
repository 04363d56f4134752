"""What other libraries raise, told as a user's mistake where they are called."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from hrm.errors import HrmError

MAX_SAID: Final = 300  # characters of what a library says


@contextmanager
def told_as(error_type: type[HrmError], where: str, rule: str, remedy: str) -> Generator[None]:
    """Within it, what a library raises comes out as `error_type`, but for our own errors.

    What is not of the one call, see `is_of_one_request`, passes.
    """
    try:
        yield
    except HrmError:
        raise
    except BaseException as error:
        if not is_of_one_request(error):
            raise
        raise error_type(where, f"<{in_a_line(error)}>", rule, remedy) from error


def is_of_one_request(error: BaseException) -> bool:
    """Whether what a library raised over one request's text costs that request alone.

    Panics of libraries in Rust are no Exceptions, so they must be told from those that end a run.
    """
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError))


def in_a_line(error: BaseException) -> str:
    """The kind of an exception and what it says, without line ends and not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MAX_SAID else f"{text[:MAX_SAID]}…"
