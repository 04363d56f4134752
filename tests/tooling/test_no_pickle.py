"""Nothing that users hand over is unpickled: a pickle runs whatever code its author liked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for top in ("moe_hrm", "hrm", "executor") for path in sorted((ROOT / top).rglob("*.py"))]
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"pandas.read_pickle", "pd.read_pickle"} | {
    f"torch.{module}load" for module in ("", "serialization.", "jit.", "package.")
}


def pickle_uses(source: str) -> list[str]:
    """`line: what` for each import or call in `source` that can load a pickle."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = [] if ast.unparse(node.value) == "False" else ["allow_pickle"]
        found += [
            (getattr(node, "lineno", 0), name)
            for name in names
            if name in CALLS | {"allow_pickle"} or name.split(".")[0] in UNPICKLERS
        ]
    return [f"{line}: {name}" for line, name in sorted(found)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_loads_no_pickle(path: Path):
    assert pickle_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "def f(p):\n    import torch\n    return torch.load(p)",
        "from torch import load",
        "torch.serialization.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_scan_sees_each_way_in(source: str):
    assert pickle_uses(source)


def test_the_scan_lets_safetensors_and_plain_arrays_pass():
    assert pickle_uses("from safetensors.torch import load_file\nnp.load(p, allow_pickle=False)") == []
