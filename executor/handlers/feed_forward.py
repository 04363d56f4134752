"""What comes after attention in a layer, in both phases and on either processor.

T tokens, D hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from executor.backends import AbstractBackend
from executor.handlers.memory import Routed, RunMemory
from executor.handlers.state import BatchState
from executor.model import Architecture, run_experts
from executor.weight_pages import LayerWeights


@dataclass(frozen=True, slots=True)
class FeedForwards:
    """The FFNs of all layers, which count where tokens are routed to."""

    backend: AbstractBackend
    arch: Architecture
    memory: RunMemory
    state: BatchState

    def on_gpu(self, layer: int, hidden_TD: Tensor, weights: LayerWeights, to_cpu: Routed | None) -> None:
        """The whole, or where the CPU computes experts all before these and the ones that the GPU has.

        What it takes to go on goes `to_cpu` then.
        """
        ffn, of_ffn, workspace = self.arch.layers[layer].ffn, weights.dense.ffn, self.memory.workspace
        if not weights.has_experts:
            ffn.whole(hidden_TD, of_ffn, workspace)
            return
        x_TD, routing, pending_2TD = ffn.before_experts(hidden_TD, of_ffn, workspace)
        experts = weights.experts if to_cpu is None else weights.on_gpu
        if experts.each:
            counts = self.backend.gpu_kernels.run_experts(
                x_TD,
                routing,
                experts,
                ffn.sum_of(pending_2TD, hidden_TD),
                workspace,
                rows_at_once=self.memory.tokens_at_once,
                num_experts=self.arch.spec.num_experts,
                glu=ffn.glu,
            )
            if to_cpu is None:
                self.state.count_routed(layer, counts)
        if to_cpu is None:
            ffn.finish(pending_2TD, hidden_TD, of_ffn, workspace)
        else:
            to_cpu.keep(x_TD, routing, pending_2TD)

    def on_cpu(self, layer: int, routed: Routed, out_TD: Tensor) -> None:
        """Add to `out_TD` what comes of the experts that stay on the host, and of all that is pending."""
        memory, ffn, workspace = self.memory, self.arch.layers[layer].ffn, self.memory.host_workspace
        experts, weights = memory.weights.host_experts[layer], memory.weights.host_ffns[layer]
        pending_2TD = routed.pending_2TD if weights.has_pending else None
        workspace.reset()
        sum_TD = ffn.sum_of(pending_2TD, out_TD)
        counts = run_experts(routed.tokens_TD, routed.routing, experts, sum_TD, workspace, glu=ffn.glu)
        ffn.finish(pending_2TD, out_TD, weights, workspace)
        self.state.count_routed(layer, counts)
