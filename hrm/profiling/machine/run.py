"""What the steps of one profile share, whatever kind of machine it is of."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from hrm.profiling.environment import HostFacts
from hrm.profiling.machine.options import ProfileOptions
from hrm.profiling.machine.steps import Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The host, what is asked for, and the steps; `threads` is how many torch computes with."""

    host: HostFacts
    threads: int
    options: ProfileOptions
    steps: Steps

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that are measured, each once."""
        return tuple(dict.fromkeys(self.options.dtypes))


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
