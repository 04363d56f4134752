"""A layer's steps before and after attention, of a model whose layers are alike."""

from torch import Tensor

from executor.model import Architecture, DenseWeights, Routing, Workspace


def pre_attention(
    arch: Architecture, hidden: Tensor, dense: DenseWeights, positions: Tensor, rows: Tensor, workspace: Workspace
) -> None:
    """Rows of tokens, from which attention is computed."""
    arch.layers[0].mixer.project(hidden, dense.mixer, positions, rows, hidden, workspace)


def post_attention(
    arch: Architecture, hidden: Tensor, attended: Tensor, dense: DenseWeights, workspace: Workspace
) -> tuple[Tensor, Routing]:
    """The output projection and the router: the experts' input and which ones each token goes to."""
    maths = arch.layers[0]
    maths.mixer.finish(attended, hidden, dense.mixer, hidden, workspace)
    return maths.ffn.before_experts(hidden, dense.ffn, workspace)[:2]


def route(arch: Architecture, x: Tensor, router: Tensor) -> Routing:
    """Where tokens go by a router's matrix alone."""
    from executor.model import RouterWeights

    return arch.layers[0].ffn.route(x, RouterWeights(ffn_norm=x, router=router))
