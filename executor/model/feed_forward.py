"""What comes after attention in every token by itself: the norm, the router, and FFNs that all go through.

T tokens, D hidden, E experts, K experts per token, I intermediate.

What is `pending` of tokens, (2, T, D), is what shared experts add and the sum of the routed ones, of
which each place where experts are computed adds its own. Once it is complete, norms and a scale make
of it what is added to hidden states. In most models nothing is pending: everything is added to hidden
states as it comes.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from executor.formats import Matrix
from executor.model.in_place import add, clear
from executor.model.layout import FfnWeights, RouterWeights
from executor.model.linear import add_projected, project
from executor.model.norm import PLAIN, Norm, norm_into, normed
from executor.model.workspace import Workspace
from executor.native import Kernels, kernels
from executor.native.experts import SILU, Glu, Router, Routing, Scores


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """The maths of a layer after attention, with the options of a family.

    If it is another rank that `carries_hidden` states on, those here are only what this one adds to them.
    """

    experts_per_token: int = 1
    norm: Norm = PLAIN
    router: Router = Router()  # noqa: RUF009 - frozen
    glu: Glu = SILU
    carries_hidden: bool = True

    def whole(self, hidden_TD: Tensor, weights: FfnWeights, workspace: Workspace) -> None:
        """Add the output of an FFN that every token goes through, in a layer without experts."""
        mark = workspace.mark()
        x_TD = normed(self.norm, hidden_TD, weights.ffn_norm, workspace, weights.ffn_norm_bias)
        self._start_sum(hidden_TD)
        self._through(x_TD, weights.dense_w13, weights.dense_w2, hidden_TD, workspace)
        workspace.release(mark)

    def _start_sum(self, hidden_TD: Tensor) -> None:
        if not self.carries_hidden:
            clear(hidden_TD)

    def before_experts(
        self, hidden_TD: Tensor, weights: RouterWeights, workspace: Workspace
    ) -> tuple[Tensor, Routing, Tensor | None]:
        """Compute shared experts, and route to the others.

        Returns the experts' input, its routing, and what is pending, if anything is. The routing is
        allocated by torch, the others are taken from the workspace.
        """
        pending_2TD = None
        if weights.has_pending:
            pending_2TD = clear(workspace.take((2, *hidden_TD.shape), hidden_TD.dtype))
        x_TD = normed(self.norm, hidden_TD, weights.ffn_norm, workspace, weights.ffn_norm_bias)
        mark, router_TD = workspace.mark(), x_TD
        if weights.router_scale is not None:
            router_TD = normed(self.norm, hidden_TD, weights.router_scale, workspace)
        routing = self.route(router_TD, weights)
        workspace.release(mark)
        self._start_sum(hidden_TD)
        if weights.shared_w13 is not None:
            out_TD = hidden_TD if pending_2TD is None else pending_2TD[0]
            self._add_shared(x_TD, hidden_TD, weights, out_TD, workspace)
            workspace.release(mark)
        if weights.layer_scale is not None:
            hidden_TD.mul_(weights.layer_scale)
        return x_TD, routing, pending_2TD

    def _add_shared(
        self, x_TD: Tensor, hidden_TD: Tensor, weights: RouterWeights, out_TD: Tensor, workspace: Workspace
    ) -> None:
        assert weights.shared_w13 is not None
        assert weights.shared_w2 is not None
        if weights.shared_norm is not None:
            x_TD = normed(self.norm, hidden_TD, weights.shared_norm, workspace)
        if weights.shared_gate is None:
            self._through(x_TD, weights.shared_w13, weights.shared_w2, out_TD, workspace)
        else:
            output_TD = clear(workspace.take(x_TD.shape, x_TD.dtype))
            self._through(x_TD, weights.shared_w13, weights.shared_w2, output_TD, workspace)
            out_TD.addcmul_(output_TD, (x_TD @ weights.shared_gate).sigmoid_().unsqueeze(1))
        if weights.shared_output_norm is not None:
            assert weights.has_pending, "a norm of what is added to hidden states already"
            norm_into(self.norm, out_TD, weights.shared_output_norm, out_TD, workspace)

    @staticmethod
    def sum_of(pending_2TD: Tensor | None, hidden_TD: Tensor) -> Tensor:
        """Where routed experts add their output."""
        return hidden_TD if pending_2TD is None else pending_2TD[1]

    def finish(
        self, pending_2TD: Tensor | None, hidden_TD: Tensor, weights: RouterWeights, workspace: Workspace
    ) -> None:
        """Add to hidden states, which `before_experts` has scaled, what comes of the complete sum; uses it up."""
        if pending_2TD is None:
            return
        output_TD, sum_TD = pending_2TD
        if weights.routed_output_norm is not None:
            norm_into(self.norm, sum_TD, weights.routed_output_norm, sum_TD, workspace)
        add(output_TD, sum_TD)
        if weights.ffn_output_norm is not None:
            norm_into(self.norm, output_TD, weights.ffn_output_norm, output_TD, workspace)
        if weights.layer_scale is not None:
            output_TD.mul_(weights.layer_scale)
        add(hidden_TD, output_TD)

    def route(self, x_TD: Tensor, weights: RouterWeights) -> Routing:
        """The experts of greatest score for each token, and their normalised scores."""
        router = self.router
        logits_TE = project(x_TD, weights.router, x_TD.new_empty(x_TD.shape[0], weights.router.shape[0]))
        if router.input_scale != 1:
            logits_TE *= router.input_scale
        if weights.router_bias is not None:
            logits_TE += weights.router_bias
        if router.scores is Scores.SPARSE_MIXER:
            return sparse_mixer(logits_TE.float(), self.experts_per_token, router.jitter)
        native, is_sum = kernels(), router.norm in {None, 1.0}
        if native is not None and is_sum and native.takes_choice(logits_TE, weights.score_correction, router.groups):
            return self._expert_scaled(self._chosen_natively(native, logits_TE, weights), weights)
        if router.scores is Scores.SIGMOID:
            scores_TE = logits_TE.float().sigmoid_()
        else:
            scores_TE = logits_TE.softmax(-1, dtype=torch.float32)
        if weights.score_correction is None:
            weights_TK, experts_TK = router.restricted(scores_TE).topk(self.experts_per_token)
        else:
            corrected_TE = router.restricted(scores_TE + weights.score_correction)
            experts_TK = corrected_TE.topk(self.experts_per_token).indices
            weights_TK = scores_TE.gather(1, experts_TK)
        if router.norm is not None:
            weights_TK /= torch.linalg.vector_norm(weights_TK, router.norm, dim=-1, keepdim=True)
        if router.scale != 1:
            weights_TK *= router.scale
        return self._expert_scaled(Routing(weights_TK, experts_TK), weights)

    def _chosen_natively(self, native: Kernels, logits_TE: Tensor, weights: RouterWeights) -> Routing:
        shape = (logits_TE.shape[0], self.experts_per_token)
        routing = Routing(
            logits_TE.new_empty(shape, dtype=torch.float32), logits_TE.new_empty(shape, dtype=torch.int64)
        )
        native.choose_experts(logits_TE, routing, self.router, weights.score_correction)
        return routing

    @staticmethod
    def _expert_scaled(routing: Routing, weights: RouterWeights) -> Routing:
        if weights.expert_scale is not None:
            routing.weights_TK.mul_(weights.expert_scale[routing.experts_TK])
        return routing

    def _through(self, x_TD: Tensor, w13: Matrix, w2: Matrix, out_TD: Tensor, workspace: Workspace) -> None:
        mark = workspace.mark()
        gate_up_T2I = workspace.take((x_TD.shape[0], w13.shape[0]), x_TD.dtype)
        add_projected(self.glu.apply(project(x_TD, w13, gate_up_T2I)), w2, out_TD)
        workspace.release(mark)


def sparse_mixer(logits_TE: Tensor, experts_per_token: int, jitter: float) -> Routing:
    """Experts one after the other, each the best of those that are left (SparseMixer, arXiv 2409.12136).

    Its weight is its probability among those left whose logits are near: below its own by at most
    2 * `jitter` times the greater of it and their absolute value. Overwrites the logits (float32).
    """
    weights: list[Tensor] = []
    experts: list[Tensor] = []
    for _ in range(experts_per_token):
        best_T1, expert_T1 = logits_TE.max(-1, keepdim=True)
        reach_TE = logits_TE.abs().clamp_(min=best_T1).mul_(2 * jitter)
        behind_TE = best_T1 - logits_TE
        far_TE = behind_TE > reach_TE
        weights.append(behind_TE.neg_().exp_().masked_fill_(far_TE, 0).sum(-1, keepdim=True).reciprocal_())
        experts.append(expert_T1)
        logits_TE.scatter_(1, expert_T1, -torch.inf)
    return Routing(torch.cat(weights, 1), torch.cat(experts, 1))
