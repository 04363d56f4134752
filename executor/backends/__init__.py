"""Accelerators behind one interface: `emulated`, `cpu`, `null`; CUDA is refused with a reason."""

from executor.backends.base import AbstractBackend, EmulatedMachine, in_thread_of_its_own
from executor.errors import RunError

__all__ = ["AbstractBackend", "EmulatedMachine", "in_thread_of_its_own", "make_backend"]

ACCELERATORS = ("auto", "emulated", "cpu", "cuda:K", "null")


def make_backend(accelerator: str, machine: EmulatedMachine | None) -> AbstractBackend:
    """The backend of that name; `auto` is `emulated` if there is a machine to emulate, else `cpu`.

    Raises RunError for an unknown name, for CUDA, and for `emulated` without a machine.
    """
    match "cuda" if accelerator.startswith("cuda:") else accelerator:
        case "emulated" | "auto" if machine is not None:
            from executor.backends.cpu import EmulatedBackend

            return EmulatedBackend(machine)
        case "emulated":
            raise RunError(
                "--accelerator", accelerator,
                "needs to know the memory and the link, and the policy was solved for one level",
                "give --gpu-memory and --link-bandwidth, or use --accelerator cpu",
            )  # fmt: skip
        case "cpu" | "auto":
            from executor.backends.cpu import CpuBackend

            return CpuBackend()
        case "null":
            from executor.backends.null import NullBackend

            return NullBackend()
        case "cuda":
            import torch

            reason = (
                "needs the CUDA backend, which this version does not have"
                if torch.cuda.is_available()
                else "needs a CUDA device and torch finds none"
            )
            raise RunError(
                "--accelerator", accelerator, reason, "use --accelerator emulated or cpu"
            )
        case _:
            raise RunError(
                "--accelerator", accelerator, f"must be one of {', '.join(ACCELERATORS)}",
                "correct it",
            )  # fmt: skip
