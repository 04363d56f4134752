"""The GPUs, hosts and machines that come with hrm: where their files are and what people call them.

A file that a user names has one of three kinds as well: a whole machine, a GPU or a host.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final, cast

from hrm.errors import ProfileError
from hrm.files import is_file
from hrm.hardware import GpuCard, HardwareProfile, Host

CatalogPart = HardwareProfile | GpuCard | Host

KINDS: Final = ("gpus", "hosts", "machines")  # folders of the catalog, in the order of a search

_ALL_NAMES: Final = "hrm profiles alone lists all names"

# Words that people leave out of a name, or add to it.
_BRANDS: Final = frozenset({"nvidia", "geforce", "rtx", "tesla", "quadro", "amd", "instinct", "ryzen", "apple"})
_ALIASES: Final = {
    "3060-12G": "RTX-3060",
    "3080-10G": "RTX-3080",
    "H100-SXM": "H100",
    "H100-80G": "H100",
    "H100-SXM-80G": "H100",
    "H100-PCIe-80G": "H100-PCIe",
    "PRO-6000-Blackwell": "RTX-PRO-6000",
    "DGX-Spark": "GB10",
    "AI-Max+-395": "Strix-Halo",
}

# Keys by which a file tells what it describes: no other kind has them.
_KEYS_OF_KIND: Final[dict[type[CatalogPart], set[str]]] = {
    HardwareProfile: {"levels", "accelerator", "links"},
    GpuCard: {"h2d", "d2h", "peer", "default_host"},
    Host: {"staging", "root_port_bytes_per_s", "max_gpus"},
}


@dataclass(frozen=True, slots=True)
class Files:
    """Names of the files that come with hrm."""

    gpus: tuple[str, ...]
    hosts: tuple[str, ...]
    machines: tuple[str, ...]


def profile_folder() -> Path:
    """Folder of the YAML files: inside the installed package, else at the top of the checkout."""
    installed = Path(__file__).parent / "hardware_profiles"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "hardware_profiles"


def list_files() -> Files:
    """Names of all GPUs, hosts and whole machines that come with hrm, sorted."""
    return Files(*(tuple(_names(kind)) for kind in KINDS))


def is_path(text: str) -> bool:
    """Whether the text names a file rather than something of the catalog."""
    return text.lower().endswith((".yaml", ".yml")) or os.sep in text


def find_file(flag: str, name: str, kinds: Sequence[str] = KINDS) -> Path:
    """The file of a GPU, host or machine of the catalog, by any usual spelling of its name.

    Raises ProfileError naming `flag`, with the nearest names, if none of these `kinds` has it.
    """
    known = {known: profile_folder() / kind / f"{known}.yaml" for kind in kinds for known in _names(kind)}
    asked = spelled(name)
    for other, path in known.items():
        if spelled(other) == asked:
            return path
    for alias, other in _ALIASES.items():
        if spelled(alias) == asked and other in known:
            return known[other]
    if near := _near(name, known):
        raise ProfileError(
            flag, name, "is nothing that comes with hrm, and no YAML file", f"did you mean {' or '.join(near)}?"
        )
    remedy = f"for the file, write {os.curdir}{os.sep}{name}" if is_file(Path(name)) else _ALL_NAMES
    raise ProfileError(flag, name, f"must be one of {', '.join(known)}, or a YAML file", remedy)


def spelled(name: str) -> str:
    """The letters and digits by which a name is known: `RTX 4090` and `4090` are the same.

    Brands are left out, and the unit of a size of memory: `A100-80GB`, `a100_80g` and `A100-80`.
    """
    plain = re.sub(r"[\s_-]+", "-", name.strip().lower())
    plain = re.sub(r"(\d)gb$", r"\1", plain)
    plain = re.sub(r"(-\d+)g$", r"\1", plain)
    words = re.findall(r"[a-z]+|\d+", plain)
    return "".join([word for word in words if word not in _BRANDS] or words)


def kind_of(plain: object) -> type[CatalogPart] | None:
    """What a file describes, by its keys; None if it has none that tells."""
    if not isinstance(plain, dict):
        return None
    keys = set(cast("dict[object, object]", plain))
    return next((kind for kind, own in _KEYS_OF_KIND.items() if keys & own), None)


def kind_words(kind: type[CatalogPart]) -> str:
    """What a file of that kind is, and the option that takes it."""
    if kind is HardwareProfile:
        return "a whole machine, which goes with --profile"
    return "a GPU, which goes with --gpus" if kind is GpuCard else "a host, which goes with --host"


def _near(name: str, known: Iterable[str]) -> list[str]:
    """Names that go on from this one, or else the one that is, or begins, most like it."""
    asked, whole = spelled(name), re.sub(r"[^a-z0-9]", "", name.lower())
    if not whole:
        return []
    keys = {spelled(alias): other for alias, other in _ALIASES.items()}
    keys = {key: other for key, other in keys.items() if other in known}
    keys |= {spelled(other): other for other in known}
    longer = [
        other
        for key, other in keys.items()
        if key.startswith(asked) or re.sub(r"[^a-z0-9]", "", other.lower()).startswith(whole)
    ]
    if longer:
        return list(dict.fromkeys(longer))
    beginnings = {key[: len(asked) + 1]: key for key in keys}
    close = get_close_matches(asked, keys, 1) or [
        beginnings[beginning] for beginning in get_close_matches(asked, beginnings, 1)
    ]
    return [keys[key] for key in close]


def _names(kind: str) -> list[str]:
    return sorted((path.stem for path in (profile_folder() / kind).glob("*.yaml")), key=_sort_key)


def _sort_key(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]
