"""The native kernels as `hrm.profiling` measures them, so that plans are made with their rates."""

from executor import native
from executor.backends.base import stage
from executor.group.measure import seconds_a_task, sums_between
from executor.model.choices import choices_of
from executor.model.linear import project
from executor.random_weights import random_packed
from hrm.contract.host_kernels import HostKernels
from hrm.contract.launches import HOST_FUSES_OPERATORS


def host_kernels() -> HostKernels | None:
    """What computes on the CPU here; None if that is torch alone, as a profile then assumes."""
    kernels = native.kernels()
    if kernels is None:
        return None
    return HostKernels(
        name=native.description(),
        multiply=project,
        attend=kernels.decode_attention,
        stage=stage,
        pack=random_packed,
        fuses_operators=HOST_FUSES_OPERATORS,
        native_up_to=choices_of,
        sums_between=sums_between,
        seconds_a_task=seconds_a_task,
    )
