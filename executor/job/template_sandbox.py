"""Jinja's sandbox with limits: a template is code of others, and must end soon and in little room.

Jinja keeps a template from reaching into the process, but not from running for ever: it computes
`9 ** 9 ** 9`, even while compiling, and doubles a text in a loop until memory ends.
"""

import re
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE: Final = 1_000_000  # characters of a template; published ones have thousands
MAX_TEXT: Final = 16_000_000  # characters written while rendering, or of any text or list
MAX_STEPS: Final = 300_000  # turns of loops, calls and texts written
MAX_BITS: Final = 1024  # of an integer
MAX_SECONDS: Final = 5.0

_WIDTH: Final = re.compile(r"[0-9]{6}|%[-+ #0]*\*|%[^%]*\.\*")  # of a format that pads too far


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates raise SecurityError once they take too long or too much room.

    Takes jinja's arguments, `finalize` apart. For one thread; `begin` starts the account anew, so
    call it before each render.
    """

    # Binary operators go through `call_binop`, which also keeps the compiler from folding them.
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=self.write)
        self.filters = {name: bounded(name, function) for name, function in self.filters.items()}
        self.globals.pop("lipsum", None)
        self.globals["range"] = self.count
        self.begin()

    def from_string(self, source: Any, *args: Any, **options: Any) -> Template:
        """The template of a text; SecurityError if it is longer than any that is meant to be one."""
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"a template has at most {MAX_SOURCE:,} characters, not {len(source):,}")
        return super().from_string(source, *args, **options)

    def begin(self) -> None:
        """Forget what was counted so far."""
        self._steps, self._written = 0, 0
        self._end_s = time.perf_counter() + MAX_SECONDS

    def step(self, written: int = 0) -> None:
        """Count a turn of a loop or a call of a macro that writes so many fixed characters."""
        self._steps += 1
        self._written += written
        if self._steps > MAX_STEPS or time.perf_counter() > self._end_s:
            raise SecurityError("the template takes too many steps")
        if self._written > MAX_TEXT:
            raise SecurityError("the template writes too long a text")

    def write(self, value: Any) -> Any:
        """Count a value that is written out; jinja calls it for each."""
        self.step(len(value) if isinstance(value, str) else 0)
        return value

    def count(self, *bounds: int) -> range:
        """What `range` is in templates."""
        numbers = range(*bounds)
        if len(numbers) > MAX_STEPS:
            raise SecurityError(f"the template counts further than {MAX_STEPS:,}")
        return numbers

    def joined(self, *parts: Any) -> str:
        """What `~` does."""
        self.step()
        return _checked("".join(str(part) for part in parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation, refused if its result were too large."""
        self.step()
        _check_operands(operator, left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **options: Any) -> Any:
        """A call of a function or method, refused if its result is or were too large."""
        self.step()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `str.format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_text_made(method.__name__, owner, *args, *options.values())
        return _checked(super().call(context, obj, *args, **options))

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        """The Python code of a template, which counts as it goes."""
        return super()._generate(_Counting().visit(source), *args, **options)


class _Counting(NodeTransformer):
    """Lets every loop and macro count its steps, and `~` go through `joined`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja's name
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802 - jinja's name
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802 - jinja's name
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - jinja's name
        self.generic_visit(node)
        return _own_call("joined", node.nodes, node.lineno)

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        fixed = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        count = _own_call("step", [nodes.Const(fixed)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node


def _own_call(method: str, arguments: list[Any], lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method, lineno=lineno)
    return nodes.Call(function, arguments, [], None, None, lineno=lineno)


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is refused if its result is or were too large."""

    @wraps(function)  # it keeps jinja's mark of filters that take the context first
    def call(*args: Any, **options: Any) -> Any:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0
        _check_text_made(name, *args[first:], *options.values())
        return _checked(function(*args, **options))

    return call


def _check_text_made(name: str, subject: Any = None, *arguments: Any) -> None:
    """Refuse what a text's method or a filter of that name would make too long a text of."""
    match name, subject, arguments:
        case "replace", str(), (str(old), str(new), *_):
            most = len(subject) + subject.count(old) * max(0, len(new) - len(old))
        case "join", str(), (list() | tuple() as items, *_):
            most = _joined_length(subject, items)
        case "join", list() | tuple(), _:
            between = next((text for text in arguments if isinstance(text, str)), "")
            most = _joined_length(between, subject)
        case (("format" | "format_map"), str(), _):
            most = MAX_TEXT + 1 if _WIDTH.search(subject) else 0
        case _:
            lines = 1 + subject.count("\n") if isinstance(subject, str) else 1
            most = lines * max((abs(x) for x in arguments if isinstance(x, int)), default=0)
    if most > MAX_TEXT:
        raise SecurityError("the template makes too long a text or list")


def _joined_length(between: str, items: Any) -> int:
    return sum(len(between) + (len(item) if isinstance(item, str) else 0) for item in items)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    integers = isinstance(left, int) and isinstance(right, int)
    if integers and operator == "**" and left.bit_length() * abs(right) > MAX_BITS:
        raise SecurityError("the template computes too large a number")
    if integers and operator == "*" and left.bit_length() + right.bit_length() > MAX_BITS:
        raise SecurityError("the template computes too large a number")
    if operator == "*" and not integers:
        for some, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(some, str | list | tuple) and len(some) * times > MAX_TEXT:
                raise SecurityError("the template makes too long a text or list")
    if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
        raise SecurityError("the template makes too long a text or list")


def _checked(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_TEXT:
        raise SecurityError("the template makes too long a text or list")
    return value
