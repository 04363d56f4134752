"""The experts on the GPU's level, by the kernels of whatever it is.

T tokens, D hidden.
"""

from collections.abc import Sequence

from torch import Tensor

from executor.backends import AbstractBackend
from executor.handlers.memory import RunMemory
from executor.model import ExpertStack, Routing, run_experts
from executor.weight_pages import NumberedExperts


def experts_on_gpu(
    backend: AbstractBackend,
    memory: RunMemory,
    x_TD: Tensor,
    routing: Routing,
    experts: NumberedExperts,
    stacks: Sequence[ExpertStack],
    out_TD: Tensor,
) -> Sequence[int] | Tensor:
    """Add the weighted output of the experts, which are also those in the stacks, to `out_TD`.

    Returns the tokens routed to each expert; on a device, where no one need wait for them.
    """
    if backend.gpu_kernels is None:
        return run_experts(x_TD, routing, experts, out_TD, memory.workspace)
    return backend.gpu_kernels.run_experts(
        x_TD, routing, stacks, out_TD, rows_at_once=memory.tokens_at_once, num_experts=memory.weights.num_experts
    )
