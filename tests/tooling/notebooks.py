"""Runs the notebooks; `python -m tests.tooling.notebooks` writes their outputs in place."""

import argparse
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"


def execute(path: Path, inside: Path = ROOT) -> NotebookNode:
    """The notebook with fresh outputs, run in a folder, with the checkout's own packages.

    Raises CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(inside)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    # What differs from one Python to the next is no business of the file's.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    """Execute all notebooks, or those named, and write them back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--inside", type=Path, default=ROOT, help="the folder they run in")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        sys.stdout.write(f"{path.name}\n")
        nbformat.write(execute(path, arguments.inside), path)


if __name__ == "__main__":
    main()
