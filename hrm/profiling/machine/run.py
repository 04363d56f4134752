"""What the steps of one profile share, whatever kind of machine it is of."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hrm.formats import USUAL_FORMATS
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

    @property
    def packed(self) -> Mapping[str, str]:
        """Formats of packed weights whose products on the CPU are measured, by their codes.

        Those of the model; a full measurement has one of every code.
        """
        if self.options.kernels is None or self.options.kernels.pack is None:
            return {}
        model = self.options.model
        tensors = (tensor for kind in model.layer_kinds() for tensor in kind.tensors) if model is not None else ()
        asked = {tensor.packed.code: tensor.packed.name for tensor in tensors if tensor.packed is not None}
        return asked if self.options.quick else {**USUAL_FORMATS, **asked}


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
