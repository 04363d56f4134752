"""What other libraries raise, told as a user's mistake where they are called."""

from collections.abc import Generator
from contextlib import contextmanager

from hrm.errors import HrmError


@contextmanager
def told_as(
    error_type: type[HrmError], where: str, rule: str, remedy: str
) -> Generator[None]:  # fmt: skip
    """Within it, whatever a library raises comes out as `error_type`, but for our own errors.

    A panic of a library written in Rust, such as tokenizers, is no `Exception`; it is told all the
    same. Ctrl-C and exits pass.
    """
    try:
        yield
    except (HrmError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        said = str(error) or type(error).__name__
        raise error_type(where, f"<{said}>", rule, remedy) from error
