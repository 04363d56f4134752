"""Every package that an install brings in has exactly one version in constraints.txt."""

import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
CUDA_BUILD = ("nvidia-", "cuda-", "triton")  # torch's own pins, on its CUDA build alone


def declared() -> list[Requirement]:
    """Dependencies in pyproject.toml, extras included."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [found for line in lines if (found := Requirement(line)).name != PROJECT["name"]]


def brought_in() -> set[str]:
    """Names of `declared` packages and, where installed, of all that they need here."""
    todo = [(canonicalize_name(need.name), frozenset(need.extras)) for need in declared()]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of an extra that is not installed
            continue
        for need in map(Requirement, lines):
            wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras})
            item = (canonicalize_name(need.name), frozenset(need.extras))
            if wanted and item not in seen and not need.name.startswith(CUDA_BUILD):
                seen.add(item)
                todo.append(item)
    return {str(name) for name, _ in seen}


def test_each_pin_is_one_exact_version():
    for pin in PINS:
        assert [clause.operator for clause in pin.specifier] == ["=="], pin
        assert "*" not in str(pin.specifier), pin


def test_no_package_is_pinned_twice():
    repeated = [n for n, k in Counter(canonicalize_name(p.name) for p in PINS).items() if k > 1]
    assert repeated == []


def test_everything_brought_in_is_pinned():
    assert brought_in() - {canonicalize_name(pin.name) for pin in PINS} == set()


def test_pins_satisfy_pyproject():
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in PINS}
    for need in declared():
        assert versions[canonicalize_name(need.name)] in need.specifier, need


def test_makefile_installs_the_pinned_torch():
    torch = next(pin for pin in PINS if pin.name == "torch")
    assert f"$(PIP) {torch}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
