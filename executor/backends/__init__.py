"""Accelerators behind one interface: `cuda`, `emulated`, `cpu` and `null`."""

from executor.backends.base import AbstractBackend, EmulatedMachine, in_thread_of_its_own
from executor.errors import RunError

__all__ = ["AbstractBackend", "EmulatedMachine", "cuda_index_of", "in_thread_of_its_own", "make_backend"]

ACCELERATORS = ("auto", "emulated", "cpu", "cuda:K", "null")


def cuda_index_of(gpu_name: str) -> int | None:
    """The first CUDA device of that name; None if torch finds none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    return names.index(gpu_name) if gpu_name in names else None


def make_backend(
    accelerator: str, machine: EmulatedMachine | None, *, gpu_memory_bytes: int | None = None
) -> AbstractBackend:
    """The backend of that name; `auto` is `emulated` if there is a machine to emulate, else `cpu`.

    `gpu_memory_bytes` caps what is used of a CUDA device. Raises RunError for an unknown name, for
    a device that is not there, and for `emulated` without a machine.
    """
    match "cuda" if accelerator.startswith("cuda:") else accelerator:
        case "emulated" | "auto" if machine is not None:
            from executor.backends.cpu import EmulatedBackend

            return EmulatedBackend(machine)
        case "emulated":
            raise RunError(
                "--accelerator",
                accelerator,
                "needs to know the memory and the link, and the policy was solved for one level",
                "give --gpu-memory and --link-bandwidth, or use --accelerator cpu",
            )
        case "cpu" | "auto":
            from executor.backends.cpu import CpuBackend

            return CpuBackend()
        case "null":
            from executor.backends.null import NullBackend

            return NullBackend()
        case "cuda":
            index = accelerator.partition(":")[2] or "0"
            if not index.isdecimal():
                raise RunError("--accelerator", accelerator, "must name one device, as in cuda:0", "correct it")
            from executor.backends.cuda import CudaBackend

            return CudaBackend(int(index), gpu_memory_bytes)
        case _:
            raise RunError("--accelerator", accelerator, f"must be one of {', '.join(ACCELERATORS)}", "correct it")
