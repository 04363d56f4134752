"""The one decoder of what users hand over: JSON documents, JSON lines and YAML, within limits.

Everything that comes back is plain (dicts, lists, texts, numbers, truth values, None), finite and
of bounded depth, so that whatever walks over it ends. `decode_json` and `decode_yaml` say with
`Malformed` what is wrong with a text; `read_json` and `read_yaml` say it of a file, in the error
type of their caller.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hrm.decoding.json_text import decode_json
from hrm.decoding.limits import MAX_DEPTH, MAX_YAML_BYTES, Malformed, decode_text
from hrm.decoding.yaml_text import decode_yaml, reads_as_text
from hrm.errors import HrmError
from hrm.files import MAX_TEXT_BYTES, read_regular

__all__ = [
    "MAX_DEPTH",
    "Malformed",
    "decode_json",
    "decode_text",
    "decode_yaml",
    "read_json",
    "read_json_object",
    "read_text",
    "read_yaml",
    "reads_as_text",
]


def read_json(
    path: str | Path,
    what: str,
    error_type: type[HrmError],
    *,
    where: str = "",
    remedy: str,
    max_bytes: int = MAX_TEXT_BYTES,
) -> Any:
    """The value of the JSON document in the file; `error_type` if there is none.

    Errors say that the file "must be" `what`; `where` stands in them for the path.
    """
    data = read_regular(path, what, error_type, max_bytes, where=where, remedy=remedy)
    return _decoded(decode_json, data, where or str(path), what, error_type, remedy)


def read_json_object(
    path: str | Path, what: str, error_type: type[HrmError], *, remedy: str, max_bytes: int = MAX_TEXT_BYTES
) -> dict[str, Any]:
    """As `read_json`, of a document that is one object; `error_type` if it is something else."""
    value = read_json(path, what, error_type, remedy=remedy, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise error_type(str(path), f"<{type(value).__name__}>", f"must be {what}: one JSON object", remedy)
    return cast("dict[str, Any]", value)


def read_yaml(path: str | Path, what: str, error_type: type[HrmError]) -> Any:
    """The value of the only YAML document in the file; `error_type` if there is none."""
    data = read_regular(path, what, error_type, MAX_YAML_BYTES)
    return _decoded(decode_yaml, data, str(path), what, error_type, "correct it at that place")


def read_text(path: str | Path, what: str, error_type: type[HrmError], *, remedy: str) -> str:
    """The text of the file, which must be UTF-8; `error_type` if it cannot be read or is not."""
    data = read_regular(path, what, error_type, remedy=remedy)
    return _decoded(decode_text, data, str(path), what, error_type, remedy)


def _decoded(
    decode: Callable[[bytes], Any], data: bytes, where: str, what: str, error_type: type[HrmError], remedy: str
) -> Any:
    try:
        return decode(data)
    except Malformed as error:
        raise error_type(where, f"<{error}>", f"must be {what}", remedy) from error
