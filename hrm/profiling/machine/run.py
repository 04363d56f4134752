"""What the steps of one profile share, whatever kind of machine it is of."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hrm.contract.host_kernels import HostKernels
from hrm.model_spec import ModelSpec
from hrm.profiling.environment import HostFacts
from hrm.profiling.machine.steps import Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The host, what is asked for, and the steps; `threads` is how many torch computes with.

    `kernels` compute on the host; torch does if there are none.
    """

    host: HostFacts
    threads: int
    quick: bool
    model: ModelSpec | None
    dtypes: tuple[str, ...]
    disk: Path | None
    steps: Steps
    kernels: HostKernels | None = None


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Let torch use so many threads within."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
