"""Runs the notebooks; `python -m tests.tooling.notebooks` writes their outputs in place."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
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


def execute(notebook: NotebookNode, inside: Path, path: Sequence[Path] = (ROOT,)) -> None:
    """Give the notebook fresh outputs, run in a folder, with the packages on that path.

    Raises CellExecutionError where a cell fails.
    """
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(inside)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))})
    # What differs from one Python to the next is no business of the file's.
    notebook.metadata.language_info = {"name": "python"}


def execute_in_haste(notebooks: Mapping[str, NotebookNode], inside: Path) -> None:
    """Give notebooks outputs that mean nothing: of less than they ask for, on a machine that is hardly measured.

    All run in one process, which imports what they have in common once; each begins without names, in a folder of its
    own name. Raises CellExecutionError where a cell fails.
    """
    together = nbformat.v4.new_notebook()
    for name, notebook in notebooks.items():
        (inside / name).mkdir()
        together.cells += [nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {inside / name}"), *notebook.cells]
        for cell in notebook.cells:
            for asked, fewer in FEWER.items():
                cell.source = cell.source.replace(asked, fewer)
    execute(together, inside, (HASTY, ROOT))


def main() -> None:
    """Execute all notebooks, or those named, and write them back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--in-haste-inside", type=Path, help="the folder they run in, their outputs to be thrown away")
    arguments = parser.parse_args()
    notebooks = {path: nbformat.read(path, as_version=4) for path in arguments.notebooks}
    if arguments.in_haste_inside:
        execute_in_haste({path.stem: notebook for path, notebook in notebooks.items()}, arguments.in_haste_inside)
    for path, notebook in notebooks.items():
        if not arguments.in_haste_inside:
            sys.stdout.write(f"{path.name}\n")
            execute(notebook, ROOT)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
