"""Options that name a file to write: one that cannot be written is refused before the work."""

import os
from pathlib import Path
from typing import Any, Final

import click

from hrm.files import check_writable


class _OutFile(click.Path):
    """A path to write to; HrmError if it cannot be written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        check_writable(path, remedy=f"choose another {param.opts[0] if param else 'path'}")
        return path


OUT_FILE: Final = _OutFile(path_type=Path, dir_okay=False)
