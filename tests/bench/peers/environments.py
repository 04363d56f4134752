"""An environment for each peer: made once from its pinned requirements, and never part of the product's."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from hrm.errors import one_line
from tests.bench.peers.setting import OURS, ROOFS, peers_folder

REQUIREMENTS: Final = Path(__file__).with_name("requirements")
INSTALL_MINUTES: Final = 60.0
READY: Final = "ready"  # in the environment: what it was made from
REASON_CHARACTERS: Final = 240


class PeerFailedError(Exception):
    """Why a peer is left out, in one line; the rest go on."""


def python_of(engine: str, *, requirements: Path = REQUIREMENTS, kept: Path | None = None) -> Path:
    """The interpreter that runs an engine: this one for ours and the roofs, else that of the engine's environment.

    It is made if it is not there, or anew if it is of other requirements.
    """
    if engine in {OURS, ROOFS}:
        return Path(sys.executable)
    folder = (kept or peers_folder()) / engine
    wanted = requirements / f"{engine}.txt"
    made_from = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()
    ready, python = folder / READY, folder / "bin" / "python"
    if ready.is_file() and ready.read_text(encoding="utf-8") == made_from:
        return python
    print(f"setting up {engine} in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    run_logged([sys.executable, "-m", "venv", "--clear", str(folder)], folder.with_suffix(".log"), INSTALL_MINUTES)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(wanted)]
    run_logged(install, folder.with_suffix(".log"), INSTALL_MINUTES)
    ready.write_text(made_from, encoding="utf-8")
    return python


def run_logged(
    command: list[str], log: Path, minutes: float, *, cwd: Path | None = None, usual: Mapping[str, str] = {}
) -> None:
    """Run a command, all it says going to `log`; PeerFailedError with its last words if it fails or takes longer.

    `usual` are variables of its environment that ours does not set.
    """
    # The Makefile exports the product's pins, which are not for the peers.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or "INDEX" in name}
    environment = {**usual, **kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, cwd=cwd, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            raise PeerFailedError(f"took over {minutes:g} minutes") from None
        finally:
            _end(process)
    if code:
        raise PeerFailedError(last_words(log.read_text(encoding="utf-8", errors="replace")) or f"ended with {code}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """By force, with the processes that it has started, some of which may outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(said: str) -> str:
    """The line that tells most of why a program failed: the last error in it, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.lower().startswith("error")]
    return one_line((errors or lines or [""])[-1], REASON_CHARACTERS)
