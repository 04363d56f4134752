"""A machine's own plan: it measures itself once, and solves for itself what another's policy was solved for."""

import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import astuple
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch

from executor.errors import RunError
from executor.job.machine import AcceleratorOptions
from executor.ray.plans import Plan
from hrm.contract.host_kernels import installed_kernels
from hrm.hardware import HardwareProfile
from hrm.locks import open_locked
from hrm.machines import load_profile, save_profile, with_memory
from hrm.policy_file import PolicyFile, policy_file_of
from hrm.profiling import ProfileOptions, profile_machine
from hrm.profiling.environment import available_ram_bytes, host_facts
from hrm.search import Space, search

OWN: Final = "own plan"
_SHARE: Final = 0.9  # of the memory that is available, for all engines together
_PATIENCE_S: Final = 300.0  # with another process that measures
_LOOK_S: Final = 0.5


def own_plan(given: Plan, accelerator: AcceleratorOptions, engines: int = 1) -> Plan:
    """The best plan of this machine for the model and workload of another's, where so many engines share its memory.

    The machine is measured quickly where it was not before. Raises HrmError if it cannot be, or no policy fits.
    """
    file = given.file
    profile = _machine(file, accelerator)
    if not profile.unified_memory:
        room = min(profile.host.usable_bytes, _SHARE * available_ram_bytes())
        profile = with_memory(profile, cpu_memory_bytes=room / engines)
    policy = file.policy
    space = Space(
        file.model,
        profile,
        file.workload,
        dtype=policy.dtype,
        kv_format=policy.other_kv_format,
        schedule=policy.schedule,
    )
    return Plan(OWN, policy_file_of(search(space).require(), file.model, profile, file.workload))


def _machine(file: PolicyFile, accelerator: AcceleratorOptions) -> HardwareProfile:
    """This machine's profile, from the user's cache folder if it was measured before as it is now."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kind = [
        host_facts().describe(),
        gpus,
        astuple(accelerator),
        file.policy.dtype,
        repr(file.model),
        version("moe-hrm"),
    ]
    key = blake2b(json.dumps(kind).encode(), digest_size=8).hexdigest()
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-hrm" / f"machine-{key}.yaml"
    with _alone_at(path):
        if path.exists():
            return load_profile(path)
        options = ProfileOptions(
            "cuda:all" if accelerator.name == "auto" and len(gpus) > 1 else accelerator.name,
            gpu_memory_bytes=accelerator.gpu_memory_bytes,
            link_bandwidth_bytes_per_s=accelerator.link_bytes_per_s,
            quick=True,
            model=file.model,
            dtypes=(file.policy.dtype,),
            kernels=installed_kernels(),
        )
        return profile_machine(options, save=lambda whole: save_profile(path, whole))


@contextmanager
def _alone_at(path: Path) -> Generator[None]:
    """Within it, no other process of this machine measures; RunError if one takes too long, or nothing can be kept."""
    until_s = time.monotonic() + _PATIENCE_S
    lock = path.with_suffix(".lock")
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open_locked(lock)
            break
        except BlockingIOError as error:
            if time.monotonic() > until_s:
                rule = f"is {error.strerror}, which measures this machine"
                raise RunError("--own-plans", str(lock), rule, "end it, or wait for it") from error
            time.sleep(_LOOK_S)
        except OSError as error:
            rule = "must be writable, to keep what is measured of this machine"
            raise RunError("--own-plans", str(lock), rule, "set XDG_CACHE_HOME to a folder that is") from error
    with file:
        yield
