"""Files of requests in parquet: a row a request, read some rows at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

from executor.errors import JobError
from executor.guard import in_a_line
from executor.job.remote import INSTALL
from executor.job.rows import ASKING, line_of_row

MAGIC: Final = b"PAR1"
_ROWS: Final = 256  # in memory at once


def check_parquet(file: BinaryIO, where: str) -> None:
    """Raise JobError, which says `where`, unless the file holds rows whose columns can be those of requests."""
    with _opened(file, where) as table:
        schema, rows = table.schema_arrow, table.metadata.num_rows
        if not set(ASKING) & set(schema.names):
            rule = f"must have a column {', '.join(ASKING[:-1])} or {ASKING[-1]}"
            raise JobError(where, f"<columns {', '.join(schema.names)}>", rule, "rename the column that asks")
        for column in schema:
            wanted, holds = _WANTED.get(column.name, _OTHER)
            if not holds(column.type):
                raise JobError(
                    f"{where}: column {column.name!r}", f"<{column.type}>", f"must be {wanted}", "convert the column"
                )
    if not rows:
        raise JobError(where, "<no rows>", "must hold a request at least", "check what wrote it")


def lines_of_parquet(file: BinaryIO, where: str) -> Iterator[dict[str, Any]]:
    """The rows as lines; where there is no column of names, they are called by their numbers, from `row-1` on."""
    with _opened(file, where) as table:
        is_named = "custom_id" in table.schema_arrow.names
        number = 0
        for batch in table.iter_batches(_ROWS, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield line_of_row(row if is_named else {"custom_id": f"row-{number}", **row})


@contextmanager
def _opened(file: BinaryIO, where: str) -> Iterator[Any]:
    """The file as pyarrow has it; what it raises comes out as JobError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise JobError(where, "<parquet>", "needs the package pyarrow", INSTALL) from error
    try:
        yield ParquetFile(file, pre_buffer=False)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise JobError(where, f"<{in_a_line(error)}>", "must be parquet that can be read", "write it again") from error


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def _items(kind: Any) -> Any:
    """What a list holds; None if the type is no list."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _is_json(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    inner = _items(kind)
    if inner is not None:
        return _is_json(inner)
    return _is_text(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)


def _is_prompt(kind: Any) -> bool:
    from pyarrow import types

    return _is_text(kind) or (_items(kind) is not None and types.is_integer(_items(kind)))


def _is_body(kind: Any) -> bool:
    from pyarrow import types

    return _is_text(kind) or (types.is_struct(kind) and _is_json(kind))


def _is_messages(kind: Any) -> bool:
    from pyarrow import types

    inner = _items(kind)
    return types.is_null(kind) or (inner is not None and types.is_struct(inner) and _is_json(inner))


_TEXT: Final = ("a text", _is_text)
_OTHER: Final = ("what JSON has: text, number, truth value, list or struct of these", _is_json)
_WANTED: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "custom_id": _TEXT,
    "method": _TEXT,
    "url": _TEXT,
    "body": ("a struct, or a text in JSON", _is_body),
    "prompt": ("a text, or a list of token ids", _is_prompt),
    "messages": ("a list of structs", _is_messages),
}
