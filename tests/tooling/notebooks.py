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
HASTY = Path(__file__).with_name("hasty")
FEWER = {  # what is asked for in haste: fewer tokens of fewer requests, fewer machines, and a faster link
    '"--gen-len", 32, "--requests", 64': '"--gen-len", 6, "--requests", 16',
    '"--max-requests", 64': '"--max-requests", 16',
    "(0.25, 0.5, 1, 2, 4)": "(0.5, 2)",
    "2xA100-80G": "1xA100-80G",
    '"--link-bandwidth", "25MB/s"': '"--link-bandwidth", "200MB/s"',
}


def execute(path: Path, inside: Path = ROOT, *, hasty: bool = False) -> NotebookNode:
    """The notebook with fresh outputs, run in a folder, with the checkout's own packages.

    In haste, the machine is profiled with arrays so small that the figures mean nothing, and less is asked for.
    Raises CellExecutionError where a cell fails.
    """
    folders = [HASTY, ROOT] if hasty else [ROOT]
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells if hasty else ():
        for asked, fewer in FEWER.items():
            cell.source = cell.source.replace(asked, fewer)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(inside)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))})
    # What differs from one Python to the next is no business of the file's.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    """Execute all notebooks, or those named, and write them back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--inside", type=Path, default=ROOT, help="the folder they run in")
    parser.add_argument("--hasty", action="store_true", help="profile without care: the outputs are thrown away")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        sys.stdout.write(f"{path.name}\n")
        nbformat.write(execute(path, arguments.inside, hasty=arguments.hasty), path)


if __name__ == "__main__":
    main()
