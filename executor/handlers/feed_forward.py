"""What the handlers of both phases work with, and what comes after attention in a layer on either processor.

T tokens, D hidden.
"""

from dataclasses import dataclass, field

from torch import Tensor

from executor.backends import AbstractBackend
from executor.group import Group
from executor.handlers.memory import Routed, RunMemory
from executor.handlers.state import BatchState
from executor.model import Architecture, Experts, Mixer, Routing, run_experts
from executor.weight_pages import LayerWeights
from hrm.acts.pages import WEIGHTS
from hrm.acts.parts import PARTS
from hrm.policy import Policy
from hrm.schedules import Pipeline
from hrm.tasks import Task


@dataclass(frozen=True, slots=True)
class TokensUnderWay:
    """Tokens some of whose experts are still to come, in the workspace of the GPU's level until then."""

    weights: LayerWeights
    hidden_TD: Tensor  # noqa: N815
    x_TD: Tensor  # noqa: N815
    routing: Routing
    pending_2TD: Tensor | None  # noqa: N815


@dataclass(frozen=True, slots=True)
class PhaseHandlers:
    """What tasks of one phase of a batch work with, and the FFNs of all layers, which count where tokens are routed to.

    Where a layer's experts stream in parts, the tokens under way wait for the last one.
    """

    backend: AbstractBackend
    arch: Architecture
    policy: Policy
    pipeline: Pipeline
    memory: RunMemory
    state: BatchState
    group: Group
    under_way: list[TokensUnderWay] = field(default_factory=list[TokensUnderWay], kw_only=True)

    def _mixer(self, x: Task) -> Mixer:
        return self.arch.layers[x.id.layer].mixer

    def _weights(self, x: Task) -> LayerWeights:
        return self.memory.weights.layer(x.id.layer, x.slot(WEIGHTS))

    def ffn_on_gpu(self, layer: int, hidden_TD: Tensor, weights: LayerWeights, to_cpu: Routed | None) -> None:
        """The whole, or where the CPU computes experts all before these and the ones that the GPU has.

        What it takes to go on goes `to_cpu` then, or waits here where experts come in parts.
        """
        assert not self.under_way, "parts of experts come right after what is before them"
        ffn, of_ffn, workspace = self.arch.layers[layer].ffn, weights.dense.ffn, self.memory.workspace
        if not weights.has_experts:
            ffn.whole(hidden_TD, of_ffn, workspace)
            return
        x_TD, routing, pending_2TD = ffn.before_experts(hidden_TD, of_ffn, workspace)
        tokens, in_parts = (
            TokensUnderWay(weights, hidden_TD, x_TD, routing, pending_2TD),
            self.pipeline.parts_of(layer) > 0,
        )
        whole = to_cpu is None and not in_parts
        self._run(layer, tokens, weights.experts if whole else weights.on_gpu, counts=whole)
        if to_cpu is not None:
            to_cpu.keep(x_TD, routing, pending_2TD)
        elif in_parts:
            self.under_way.append(tokens)
        else:
            self._finish(layer, tokens)

    def part_experts(self, x: Task) -> int:
        """PART_EXPERTS: a part of the experts for the tokens under way, if any are, and what comes after the last."""
        layer, count = x.id.layer, self.pipeline.parts_of(x.id.layer)
        number = x.id.index % count
        for tokens in self.under_way:
            part = self.memory.weights.part(layer, number)
            self._run(layer, tokens, part.experts[x.slot(PARTS)], counts=number == 0)
            if number == count - 1:
                self._finish(layer, tokens)
        if number == count - 1:
            self.under_way.clear()
        return 0

    def _finish(self, layer: int, tokens: TokensUnderWay) -> None:
        """What comes after the last of the experts."""
        ffn, weights = self.arch.layers[layer].ffn, tokens.weights.dense.ffn
        ffn.finish(tokens.pending_2TD, tokens.hidden_TD, weights, self.memory.workspace)

    def _run(self, layer: int, tokens: TokensUnderWay, experts: Experts, *, counts: bool) -> None:
        """Add the output of experts on the GPU; whoever `counts` counts for all of the layer's experts."""
        if not experts.each:
            return
        ffn = self.arch.layers[layer].ffn
        counted = self.backend.gpu_kernels.run_experts(
            tokens.x_TD,
            tokens.routing,
            experts,
            ffn.sum_of(tokens.pending_2TD, tokens.hidden_TD),
            self.memory.workspace,
            rows_at_once=self.memory.tokens_at_once,
            num_experts=self.arch.spec.experts.all_experts,
            glu=ffn.glu,
        )
        if counts:
            self.state.count_routed(layer, counted)

    def ffn_on_cpu(self, layer: int, routed: Routed, out_TD: Tensor) -> None:
        """Add to `out_TD` what comes of the experts that stay on the host, and of all that is pending."""
        memory, ffn, workspace = self.memory, self.arch.layers[layer].ffn, self.memory.host_workspace
        pages = memory.weights.of_layer(layer)
        pending_2TD = routed.pending_2TD if pages.host_ffn.has_pending else None
        workspace.reset()
        sum_TD = ffn.sum_of(pending_2TD, out_TD)
        counts = run_experts(routed.tokens_TD, routed.routing, pages.host_experts, sum_TD, workspace, glu=ffn.glu)
        ffn.finish(pending_2TD, out_TD, pages.host_ffn, workspace)
        self.state.count_routed(layer, counts)
