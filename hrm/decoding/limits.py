"""What bounds every text that is decoded, and the error that says which bound it breaks."""

import math
from typing import Any, Final

from hrm.units import MIB

MAX_DEPTH: Final = 64  # of lists and mappings in one another; the deepest file of ours has 12
MAX_NODES: Final = 200_000  # of a YAML document with its aliases followed; profiles have thousands
MAX_YAML_BYTES: Final = 8 * MIB
MAX_DIGITS: Final = 40  # published configs write 10^30 for "no limit"

_MARKS: Final = (
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"\xff\xfe", "is UTF-16, not UTF-8; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16, not UTF-8; save it as UTF-8"),
)


class Malformed(ValueError):  # noqa: N818 - an adjective names the text, as in the errors
    """What is wrong with a text, in one line; whoever asked for it says which text that was."""


def decode_text(data: bytes) -> str:
    """The UTF-8 text, without a byte order mark; Malformed if it is in another encoding."""
    for mark, said in _MARKS:
        if data.startswith(mark):
            raise Malformed(said)
    if (zero := data.find(b"\0", 0, 4096)) >= 0:
        raise Malformed(f"holds a zero byte at offset {zero}; it must be a text in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed(f"byte 0x{data[error.start]:02x} at offset {error.start} is no UTF-8") from error


def integer(text: str) -> int:
    """The decimal integer; Malformed if it has more digits than any count or size."""
    if len(text) > MAX_DIGITS:
        raise Malformed(f"holds a number of {len(text)} digits, more than {MAX_DIGITS}")
    return int(text)


def number(text: str) -> float:
    """The floating-point number; Malformed if it is none that is finite."""
    value = float(text)
    if not math.isfinite(value):
        raise Malformed(f"holds the number {brief(text)}, which is not finite")
    return value


def brief(text: Any) -> str:
    """A text to be named in a message, cut short."""
    shown = str(text)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
