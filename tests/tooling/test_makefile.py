"""`make help` lists every target, and CONTRIBUTING names them."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def targets() -> set[str]:
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared
    return set(declared[1].split())


def test_help_lists_every_target_with_what_it_does():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(line.strip().split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    assert listed.keys() == targets()
    assert all(listed.values())


def test_contributing_names_every_target():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Make targets")[2].partition("\n## ")[0]
    assert targets() <= set(re.findall(r"`(?:make )?([a-z-]+)`", text))
