"""The notebooks run as they are, hold their pictures, and use what everybody may use."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.tooling.notebooks import FOLDER, ROOT

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PACKAGES = ("hrm", "executor")


def code_cells(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def pictures(path: Path) -> int:
    return sum("image/png" in output.get("data", {}) for c in code_cells(path) for output in c.outputs)


def test_there_are_five_of_them():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_as_they_ran_with_their_pictures(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(path) >= 1
    for cell in cells:
        assert not any(output.output_type == "error" for output in cell.outputs)
        told = [output.get("name") for output in cell.outputs if output.output_type == "stream"]
        assert "stderr" not in told, "warnings are for readers to wonder at"
    assert path.stat().st_size < 2_000_000
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text, "a path of the machine it ran on"
    nbformat.validate(nbformat.from_dict(nbformat.read(path, as_version=4)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_public_names_only(path):
    source = "\n".join(
        "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))
        for cell in code_cells(path)
    )
    tree = ast.parse(source)
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hrm"
    }
    assert attributes <= set(importlib.import_module("hrm").__all__)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGES):
            module = importlib.import_module(node.module or "")
            assert not any(part.startswith("_") for part in (node.module or "").split("."))
            for alias in node.names:
                public = getattr(module, "__all__", None)
                assert hasattr(module, alias.name)
                assert public is None or alias.name in public
                assert not alias.name.startswith("_")


@pytest.mark.slow
def test_notebooks_run(tmp_path):
    copies = {path: tmp_path / path.name for path in NOTEBOOKS}
    for path, copy in copies.items():
        for cell in (notebook := nbformat.read(path, as_version=4)).cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, copy)
    # A process of its own: kernels have threads, and event loops with opinions on warnings.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.tooling.notebooks",
            *map(str, copies.values()),
            "--in-haste-inside",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name: pictures(copy) for path, copy in copies.items()} == {p.name: pictures(p) for p in NOTEBOOKS}
