"""What transformers gives to chat templates, and as little to break out by."""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from executor.job.template_sandbox import LimitedEnvironment, bounded

MAX_BETWEEN: Final = 100  # characters between the values of what `tojson` writes


def environment() -> LimitedEnvironment:
    """A sandbox with the filters, functions and tags that templates know."""
    made = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = bounded("tojson", _to_json)  # jinja2's own writes < as \u003c
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dictionary(),
        "namespace": _PublicNamespace,
    }
    return made


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; it says its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 asks for an attribute of the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dictionary:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PublicNamespace(Namespace):
    """`namespace` that refuses names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _PublicNamespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _PublicNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"no namespace may hold {name!r}")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - a filter's
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    # Written many times over, what is between the values must be short.
    indentation = indent if isinstance(indent, int) else len(indent or "")
    if max(indentation, *map(len, separators or ("",))) > MAX_BETWEEN:
        raise ValueError(f"tojson writes at most {MAX_BETWEEN} characters between values")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - the user's own time, as in transformers
