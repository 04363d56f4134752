"""Rows of tables as batch lines: columns are a line's fields, or those of a body."""

from typing import Any, Final

from executor.job.fields import CHAT

ASKING: Final = ("body", "messages", "prompt")  # the columns one of which a request must have


def line_of_row(row: dict[str, Any]) -> dict[str, Any]:
    """The line of a row, whose cells are as Python has them; a `body` that is a text is left as it is.

    A table has every field in every row, so those that are null are absent, in structs too.
    """
    row = without_nulls(row)
    if "body" in row:
        return row
    outer = {key: row.pop(key) for key in ("custom_id", "url") if key in row}
    if "messages" in row:
        outer.setdefault("url", CHAT)
    return {**outer, "body": row}


def without_nulls(value: Any) -> Any:
    """A value without the fields of structs that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
