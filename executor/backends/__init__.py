"""Accelerators behind one interface, each with its row in BACKENDS."""

from collections.abc import Callable
from typing import Final, NamedTuple

from executor.backends.base import AbstractBackend, EmulatedMachine, in_thread_of_its_own
from executor.errors import RunError
from hrm.errors import meant
from hrm.units import is_whole_number

__all__ = [
    "BACKENDS",
    "AbstractBackend",
    "BackendKind",
    "EmulatedMachine",
    "computes",
    "cuda_index_of",
    "in_thread_of_its_own",
    "make_backend",
    "may_have_gpu",
]

# Given the accelerator as it was asked for, the machine to emulate, and a cap on the GPU's memory.
Make = Callable[[str, EmulatedMachine | None, int | None], AbstractBackend]


def cuda_index_of(gpu_name: str) -> int | None:
    """The first CUDA device of that name; None if torch finds none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    return names.index(gpu_name) if gpu_name in names else None


def _emulated(accelerator: str, machine: EmulatedMachine | None, _: int | None) -> AbstractBackend:
    from executor.backends.cpu import EmulatedBackend

    if machine is None:
        raise RunError(
            "--accelerator",
            accelerator,
            "needs to know the memory and the link, and the policy was solved for one level",
            "give --gpu-memory and --link-bandwidth, or use --accelerator cpu",
        )
    return EmulatedBackend(machine)


def _cpu(*_: object) -> AbstractBackend:
    from executor.backends.cpu import CpuBackend

    return CpuBackend()


def _cuda(accelerator: str, _: EmulatedMachine | None, gpu_memory_bytes: int | None) -> AbstractBackend:
    from executor.backends.cuda import CudaBackend

    index = accelerator.partition(":")[2] or "0"
    if not is_whole_number(index):
        raise RunError("--accelerator", accelerator, "must name one device, as in cuda:0", "correct it")
    return CudaBackend(int(index), gpu_memory_bytes)


def _null(*_: object) -> AbstractBackend:
    from executor.backends.null import NullBackend

    return NullBackend()


class BackendKind(NamedTuple):
    """What makes a backend, and what has to be known of it before: whether it computes, and on GPUs of the machine."""

    make: Make
    computes: bool = True
    has_gpu: bool = False


# By the name that is asked for; `name:K` is asked for with any number, or with none.
BACKENDS: Final[dict[str, BackendKind]] = {
    "emulated": BackendKind(_emulated),
    "cpu": BackendKind(_cpu),
    "cuda:K": BackendKind(_cuda, has_gpu=True),
    "null": BackendKind(_null, computes=False),
}


def kind_of_backend(accelerator: str) -> BackendKind | None:
    """That of the accelerator, as it is asked for or as its backend is called; None of `auto` and of unknown ones."""
    return BACKENDS.get(accelerator) or BACKENDS.get(f"{accelerator.partition(':')[0]}:K")


def computes(accelerator: str) -> bool:
    """Whether tokens are computed on it: on all but what sleeps through its tasks."""
    kind = kind_of_backend(accelerator)
    return kind is None or kind.computes


def may_have_gpu(accelerator: str) -> bool:
    """Whether it may need GPUs of the machine, as `auto` does."""
    kind = kind_of_backend(accelerator)
    return kind is None or kind.has_gpu


def make_backend(
    accelerator: str, machine: EmulatedMachine | None, *, gpu_memory_bytes: int | None = None
) -> AbstractBackend:
    """The backend of that name; `auto` is `emulated` if there is a machine to emulate, else `cpu`.

    `gpu_memory_bytes` caps what is used of a CUDA device. Raises RunError for an unknown name, for
    a device that is not there, and for `emulated` without a machine.
    """
    automatic = "cpu" if machine is None else "emulated"
    name = automatic if accelerator == "auto" else accelerator
    kind = kind_of_backend(name)
    if kind is None:
        known = ("auto", *BACKENDS)
        rule = f"must be one of {', '.join(known)}"
        raise RunError("--accelerator", accelerator, rule, meant(accelerator, known, "correct it"))
    return kind.make(accelerator, machine, gpu_memory_bytes)
