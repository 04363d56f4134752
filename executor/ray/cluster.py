"""Ray started or joined, and left again; every mistake that can be made with it in one line."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Final
from urllib.parse import urlsplit

from executor.errors import RunError
from executor.guard import in_a_line
from executor.ray.options import LOCAL

OBJECT_STORE_BYTES: Final = 80 * 1024 * 1024  # Ray's least; requests and tokens need little
_CONNECT_S: Final = 5.0


@contextmanager
def ray_at(address: str, workers: int) -> Iterator[ModuleType]:
    """The module ray, with Ray started here for so many workers, or joined at an address."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise RunError("--ray", "<not installed>", "needs the package ray", "pip install 'moe-hrm[ray]'") from error
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without GPUs, it leaves CUDA_VISIBLE_DEVICES be
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with TemporaryDirectory(prefix="ray-") as folder:
        try:
            if address == LOCAL:
                ray.init(
                    address=LOCAL,
                    num_cpus=max(os.cpu_count() or 1, workers),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                    **quiet,
                )
            else:
                _reach(address)
                ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            rule = "must be the address of a Ray cluster that answers"
            raise RunError("--ray", address, f"{rule} ({in_a_line(error)})", "check it with: ray status") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError at once where nothing listens; Ray itself would try for a long time."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=_CONNECT_S).close()
