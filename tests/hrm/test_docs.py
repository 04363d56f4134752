"""What README and docs show of modelled searches is what the commands print."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LEFT_OUT = "  …"  # a line for any number of lines
OF_A_RUN = ("validate", "--profile", "--accelerator")  # what these print is of one machine at one time
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def shown() -> list:
    """Every modelled command of the pages, with what stands below it."""
    blocks = [(page, block) for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]
    parts = [(page, part) for page, block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    split = [(page, *part.partition("\n")[::2]) for page, part in parts]
    return [
        pytest.param(shlex.split(command)[1:], printed, id=f"{page.name}: {command}")
        for page, command, printed in split
        if command.startswith("hrm ") and not any(word in command for word in OF_A_RUN)
    ]


def lines_of(text: str) -> str:
    """Without blanks at the ends of lines, and without the time that a search took."""
    return re.sub(r" in [\d.]+ s;", ";", re.sub(" +$", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize(("arguments", "printed"), shown())
def test_what_is_shown_is_what_is_printed(hrm, arguments, printed):
    code, out, err = hrm(*arguments)
    assert code == 0, err
    rest = lines_of(out)
    for lines in filter(None, (some.strip("\n") for some in lines_of(printed).split(LEFT_OUT))):
        before, found, rest = rest.partition(lines)
        assert found, f"not printed:\n{lines}\n\nin\n\n{before}"


def test_commands_are_found_in_the_pages():
    assert {"README.md", "plans.md"} == {str(case.id).partition(":")[0] for case in shown()}
