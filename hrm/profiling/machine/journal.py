"""Finished steps in a file beside the profile, so that an interrupted measurement can go on.

One JSON line says what is measured on which machine, and one follows for each step. Lines are
written as steps end, so the file is good up to its last whole line whatever ends the process. It
is never read as a profile.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, final

import msgspec

from hrm.decoding import Malformed, decode_json
from hrm.errors import ProfileError
from hrm.files import write_all
from hrm.locks import open_locked

SUFFIX: Final = ".partial"


def partial_path(out: Path) -> Path:
    """Where the steps of the profile at `out` are kept until it is whole."""
    return out.with_name(out.name + SUFFIX)


class _Head(msgspec.Struct, frozen=True):
    date: str
    measures: dict[str, str]


class _Line(msgspec.Struct, frozen=True):
    step: str
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    found: Any


@dataclass(frozen=True, slots=True)
class _Kept:
    seconds: float
    found: Any


@final
class Journal:
    """Steps of one profile, kept at `path`; `seconds` is what those from before took."""

    def __init__(self, path: Path, measures: dict[str, str], *, date: str, resume: bool = False) -> None:
        """Start the file anew with the first step, or go on with it if `resume` and there is one.

        Until then it stays what it was, for another time. It is locked until it is closed or removed. `measures` says
        what is measured: options and machine. Raises ProfileError if another process writes to the file, if that to go
        on with was measured otherwise, or if it cannot be read or written.
        """
        self.path, self.date = path, date
        self._kept: dict[str, _Kept] = {}
        self._steps = 0
        try:
            self._file = open_locked(path)
        except BlockingIOError as error:
            raise ProfileError(
                str(path),
                f"<{error.strerror}>",
                "must be written by one hrm profile at a time",
                "wait for that one, or choose another --out",
            ) from error
        except OSError as error:
            raise _not_written(path, error) from error
        try:
            good = self._load(measures) if resume else 0
            self._steps = len(self._kept)
            self._head = None if good else _Head(date, measures)
            self._is_empty = not self._file.seek(0, os.SEEK_END)
            if good:
                self._cut(good)
        except OSError as error:
            self.close()
            raise _not_written(path, error) from error
        except BaseException:
            self._file.close()
            raise

    @property
    def seconds(self) -> float:
        """What the steps that are known from before took."""
        return sum(kept.seconds for kept in self._kept.values())

    def recall(self, name: str, kind: Any) -> tuple[bool, Any]:
        """Whether the step is known from before, and what it found."""
        kept = self._kept.get(name)
        if kept is None:
            return False, None
        try:
            return True, msgspec.convert(kept.found, kind, str_keys=True)
        except ValueError:  # of another version: measured again
            del self._kept[name]
            return False, None

    def keep(self, name: str, seconds: float, found: Any) -> None:
        """Write a step down; it is on the disk when this returns.

        Raises ProfileError if it cannot be written; the steps before it are kept.
        """
        try:
            if self._head is not None:
                self._cut(0)
                self._write(self._head)
                self._head = None
            self._steps += 1
            self._write(_Line(name, seconds, found))
        except OSError as error:
            raise _not_written(self.path, error) from error

    def close(self) -> None:
        """End writing; the file stays for another time, unless there is nothing in it."""
        if self._file.closed:
            return
        if self._steps or not self._is_empty:
            self._file.close()
        else:
            self.remove()

    def remove(self) -> None:
        """Remove the file, before another process can have its lock."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _cut(self, length: int) -> None:
        self._file.truncate(length)
        self._file.seek(length)

    def _write(self, line: msgspec.Struct) -> None:
        write_all(self._file.fileno(), msgspec.json.encode(line) + b"\n")
        os.fsync(self._file.fileno())

    def _load(self, measures: dict[str, str]) -> int:
        """Read what is kept; returns the length of the good lines, 0 if there are none."""
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        good = 0
        for index, line in enumerate(whole.splitlines(keepends=True)):
            try:
                if index == 0:
                    head = msgspec.convert(decode_json(line), _Head)
                    self._check(head, measures)
                    self.date = head.date
                else:
                    kept = msgspec.convert(decode_json(line), _Line)
                    self._kept[kept.step] = _Kept(kept.seconds, kept.found)
            except (Malformed, msgspec.ValidationError) as error:
                if index == 0:
                    raise ProfileError(
                        str(self.path),
                        "<unreadable>",
                        "must be what hrm profile has left there",
                        "remove it, or measure afresh without --resume",
                    ) from error
                break
            good += len(line)
        return good

    def _check(self, head: _Head, measures: dict[str, str]) -> None:
        for name in {**head.measures, **measures}:
            before, now = head.measures.get(name, "not given"), measures.get(name, "not given")
            if before != now:
                raise ProfileError(
                    f"{self.path}: {name}",
                    before,
                    f"differs from {now}, which is measured now",
                    "give the same options on the same machine, or measure afresh without --resume",
                )


def _not_written(path: Path, error: OSError) -> ProfileError:
    return ProfileError(str(path), f"<{error.strerror}>", "must be writable", "make room, or choose another --out")
