"""What the user can get wrong when running a model; see hrm.errors for the rules."""

from hrm.errors import HrmError


class CheckpointError(HrmError):
    """A checkpoint folder, one of its files or one of its tensors that cannot be used."""


class JobError(HrmError):
    """A request or an output directory that cannot be used."""


class RunError(HrmError):
    """A run that cannot start or go on."""


def is_of_one_request(error: BaseException) -> bool:
    """Whether what a library raised over one request's text costs that request alone.

    Panics of libraries in Rust are no Exceptions, so they must be told from those that end a run.
    """
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError))


def in_a_line(error: BaseException, *, max_chars: int = 300) -> str:
    """The kind of an exception and what it says, without line ends and not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= max_chars else f"{text[:max_chars]}…"
