"""What the user can get wrong, told in one line: where, which value, the rule, the remedy.

A broken invariant of ours is an `assert`, never one of these.
"""

import re
from collections.abc import Iterable, Mapping
from reprlib import Repr
from typing import Any, Final

MAX_SHOWN: Final = 200  # characters of a value, or of where it stands, in a message
MAX_RULE: Final = 2000  # a rule may list all GPUs that are known

_FIELD: Final = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")
_BRIEF: Final = Repr()
_BRIEF.maxlevel = 3
_BRIEF.maxstring = 150  # most paths
_BRIEF.maxlong = _BRIEF.maxother = 60


def one_line(text: str, at_most: int = MAX_RULE) -> str:
    """The text as a terminal can show it: one line, no control characters, cut in the middle."""
    if len(text) > 2 * at_most:
        text = f"{text[:at_most]}…{text[-at_most:]}"
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) > at_most:
        line = f"{line[: at_most // 2]}…{line[len(line) + 1 + at_most // 2 - at_most :]}"
    return line


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like one that is not known; None if none is."""
    from difflib import get_close_matches

    close = get_close_matches(word[:100], list(known), 1)  # it takes its time with long ones
    return close[0] if close else None


def meant(word: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for a word that is not known: the one that was perhaps meant, or `otherwise`."""
    near = closest(word, known)
    return f"did you mean {near}?" if near else otherwise


def brief_value(value: object) -> str:
    """The value as messages show it, cut short; texts in `<>` are descriptions of ours."""
    if isinstance(value, str) and value.startswith("<"):
        return one_line(value, MAX_SHOWN)
    try:
        return one_line(_BRIEF.repr(value), MAX_SHOWN)
    except ValueError:  # an integer of more digits than Python prints
        return f"<{type(value).__name__}>"


class HrmError(ValueError):
    """A mistake in the user's input; command lines print it and exit with code 2.

    `where` names the file and field (`policy.json: micro_batch_size`), `rule` what must hold and
    `remedy` what to do about it. `field` is that of ours if it is in a value, of which is not known yet
    whether a file or an option gave it.
    """

    def __init__(self, where: str, value: object, rule: str, remedy: str, *, field: str = "") -> None:
        """Compose the one-line message `where is value: rule; remedy`.

        What users gave is cut short in it, and its control characters are escaped.
        """
        self.where, self.value, self.rule, self.remedy, self.field = where, value, rule, remedy, field
        shown = f"{one_line(where, MAX_SHOWN)} is {brief_value(value)}"
        super().__init__(f"{shown}: {one_line(rule)}; {one_line(remedy)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """How it comes from another process as it was, whatever a subclass is made of."""
        return _restored, (type(self), self.args, self.__dict__)

    def of_options(self, options: Mapping[str, str]) -> "HrmError":
        """The same of what was typed (`--gen-len`), where `options` tell which option gives the field (`gen_len`).

        Other fields that the rule names are told so, too, where they are no words of everyday language.
        """
        if self.field not in options:
            return self
        rule = _FIELD.sub(lambda name: options.get(name[0], name[0]), self.rule)
        return type(self)(options[self.field], self.value, rule, self.remedy)


def _restored(kind: type[HrmError], args: tuple[Any, ...], attributes: dict[str, Any]) -> HrmError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class UnitError(HrmError):
    """A size, rate or duration that cannot be read."""


class ProfileError(HrmError):
    """A hardware profile, GPU or host file that cannot be used."""


class ModelError(HrmError):
    """A model name or `config.json` that cannot be used."""


class WorkloadError(HrmError):
    """Impossible prompt or generation lengths, or an unknown workload."""


class PolicyError(HrmError):
    """A policy that is malformed, inconsistent or does not fit the machine."""


class TraceError(HrmError):
    """A trace or run directory that cannot be read."""
