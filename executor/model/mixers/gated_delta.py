"""The gated delta rule: a matrix of each sequence that every token decays, corrects and reads.

T tokens, m of them in a block, D hidden, R requests, r of them at once, C states; H value heads, K key
heads, g = H/K that share one; k and v elements of a head's key and value, Q = H*v. Of a token X elements
go through the convolution: queries and keys of all key heads, values of all value heads. It needs the t
tokens before. A row has these elements, and then decays and steps of the value heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from torch import Tensor
from torch.nn import functional

from executor.model.layout import GatedDeltaWeights
from executor.model.linear import add_projected, project
from executor.model.mixers.base import Mixer
from executor.model.norm import PLAIN, Norm, norm_into, normed
from executor.model.numbers import PromptNumbers, RowNumbers
from executor.model.workspace import Workspace
from executor.native import kernels as native_kernels
from executor.native.mixers import DeltaStep
from hrm.layers import GatedDeltaNet
from hrm.layers.recurrent import STATE_BYTES

if TYPE_CHECKING:
    from executor.model.kernels import AbstractKernels

HEAD_EPS: Final = 1e-6  # of the norms of queries and keys


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta(Mixer):
    """The gated delta rule (arXiv 2412.06464), with a gated norm of each value head's output.

    A row of its cache is bytes: the state, float32 (H, k, v), and then the t tokens before the
    convolution, the earliest first. States are stepped in place, zeros before a sequence's first token.
    """

    block: GatedDeltaNet
    norm: Norm = PLAIN
    output_norm: Norm = PLAIN

    def project(
        self,
        x_TD: Tensor,
        weights: GatedDeltaWeights,
        positions_T: Tensor,  # noqa: ARG002 - others need them
        row_TX: Tensor,
        held_TS: Tensor,
        workspace: Workspace,
    ) -> None:
        """All that is projected; the gate of the output waits."""
        mark = workspace.mark()
        hidden_TD = normed(self.norm, x_TD, weights.attention_norm, workspace)
        gate = self.block.convolved_elements
        after = gate + self.block.held_elements
        project(hidden_TD, weights.projections[:gate], row_TX[:, :gate])
        project(hidden_TD, weights.projections[gate:after], held_TS)
        project(hidden_TD, weights.projections[after:], row_TX[:, gate:])
        workspace.release(mark)

    def append(self, cache_C: Tensor, row_RX: Tensor, rows_R: Tensor) -> None:
        """Nothing: a state takes up a token when it is stepped."""

    def decode(
        self,
        kernels: "AbstractKernels",  # noqa: ARG002 - others need them
        row_RX: Tensor,
        weights: GatedDeltaWeights,
        cache_C: Tensor,
        numbers: RowNumbers,
        out_RO: Tensor,
        *,
        spare_bytes: int,
    ) -> None:
        """One step of every request's state; by torch, of those that lie one after the other at once."""
        x_RX, decay_RH, step_RH = self._split(row_RX)
        states_CHkv, tails_CtX = self._states(cache_C, row_RX.dtype)
        rates = weights.decay.float(), weights.step_bias.float()
        native = native_kernels()
        step = DeltaStep(x_RX, weights.convolution, tails_CtX, states_CHkv, decay_RH, step_RH, *rates)
        if native is not None and native.takes_gated_delta(step, out_RO):
            native.gated_delta_step(step, numbers.starts, out_RO)
            return
        at_once = max(1, spare_bytes // (2 * STATE_BYTES * self.block.state_elements))
        for rows, some in _stretches(numbers.starts, at_once):
            convolved_rX = _step_convolution(x_RX[some], weights.convolution.float(), tails_CtX[rows])
            decays_rH = _log_decays(decay_RH[some], *rates).exp_()
            steps_rH = step_RH[some].float().sigmoid()
            self._step(states_CHkv[rows], convolved_rX, decays_rH, steps_rH, out_RO[some])

    def prefill(
        self,
        kernels: "AbstractKernels",  # noqa: ARG002 - others need them
        row_TX: Tensor,
        weights: GatedDeltaWeights,
        prompts: PromptNumbers,
        caches_C: Sequence[Tensor | None],
        out_TO: Tensor,
        workspace: Workspace,
    ) -> None:
        """Prompt by prompt, block by block: a prompt's cache is its state, which it goes on from."""
        ends = [*torch.tensor(prompts.lengths).cumsum(0).tolist()]
        block_tokens = self.block.chunk_tokens
        for length, end, cache_1 in zip(prompts.lengths, ends, caches_C, strict=True):
            assert cache_1 is not None, "a state has to begin and to stay somewhere"
            states_1Hkv, tails_1tX = self._states(cache_1, row_TX.dtype)
            for first in range(end - length, end, block_tokens):
                some, mark = slice(first, min(first + block_tokens, end)), workspace.mark()
                self._block(row_TX[some], weights, states_1Hkv[0], tails_1tX[0], out_TO[some], workspace)
                workspace.release(mark)

    def finish(
        self, out_TO: Tensor, held_TS: Tensor, weights: GatedDeltaWeights, hidden_TD: Tensor, workspace: Workspace
    ) -> None:
        """Each head's output is normed, in place, and scaled by the gate, before it is projected."""
        heads = out_TO.view(-1, self.block.value_head_dim)
        norm_into(self.output_norm, heads, weights.output_norm, heads, workspace)
        out_TO.mul_(functional.silu(held_TS, inplace=True))
        add_projected(out_TO, weights.output, hidden_TD)

    def _split(self, row_TX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is convolved, decays and steps."""
        heads = self.block.num_value_heads
        x_TX, decay_TH, step_TH = row_TX.split((self.block.convolved_elements, heads, heads), dim=1)
        return x_TX, decay_TH, step_TH

    def _states(self, cache_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The states in the rows of a cache, and the tokens before the convolution."""
        block = self.block
        end, tokens = STATE_BYTES * block.state_elements, block.conv_kernel - 1
        tail = slice(end, end + tokens * block.convolved_elements * dtype.itemsize)
        states = cache_C[:, :end].view(torch.float32)
        shape = (block.num_value_heads, block.key_head_dim, block.value_head_dim)
        return states.unflatten(1, shape), cache_C[:, tail].view(dtype).unflatten(1, (tokens, -1))

    def _heads(self, convolved_mX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (m, K, 1, k), and values (m, K, g, v), after the convolution, in place."""
        block = self.block
        keys, dim = block.num_key_heads, block.key_head_dim
        functional.silu(convolved_mX, inplace=True)
        qk_mKk = convolved_mX[:, : 2 * keys * dim].unflatten(1, (2 * keys, dim))
        length_mK1 = torch.linalg.vector_norm(qk_mKk, dim=-1, keepdim=True)
        qk_mKk.mul_(length_mK1.square_().add_(HEAD_EPS).rsqrt_())
        q_mKk, k_mKk = qk_mKk.split(keys, dim=1)
        values = convolved_mX[:, 2 * keys * dim :].unflatten(1, (keys, -1, block.value_head_dim))
        return q_mKk.mul_(dim**-0.5).unsqueeze(2), k_mKk.unsqueeze(2), values

    def _step(
        self, states_rHkv: Tensor, convolved_rX: Tensor, decays_rH: Tensor, steps_rH: Tensor, out_rQ: Tensor
    ) -> None:
        """A new token of each request: its state decays, is corrected for the key, and read for the query."""
        q_rK1k, k_rK1k, v_rKgv = self._heads(convolved_rX)
        shape = v_rKgv.shape[1:3]
        states_rKgkv = states_rHkv.unflatten(1, shape)
        decays_rKg11, steps_rKg1 = decays_rH.view(-1, *shape, 1, 1), steps_rH.view(-1, *shape, 1)
        # One state is read where it lies, several where they are one matrix after the other.
        place = states_rKgkv if states_rHkv.shape[0] == 1 else None
        decayed_rKgkv = torch.mul(states_rKgkv, decays_rKg11, out=place)
        both_rK12k = torch.stack((k_rK1k, q_rK1k), dim=3)
        held_rKgv, read_rKgv = torch.matmul(both_rK12k, decayed_rKgkv).unbind(3)
        change_rKgv = torch.sub(v_rKgv, held_rKgv).mul_(steps_rKg1)
        match_rK11 = (q_rK1k * k_rK1k).sum(-1, keepdim=True)
        out_rQ.unflatten(1, v_rKgv.shape[1:]).copy_(read_rKgv.addcmul_(change_rKgv, match_rK11))
        torch.addcmul(decayed_rKgkv, k_rK1k.unsqueeze(-1), change_rKgv.unsqueeze(-2), out=states_rKgkv)

    def _block(
        self,
        row_mX: Tensor,
        weights: GatedDeltaWeights,
        state_Hkv: Tensor,
        tail_tX: Tensor,
        out_mQ: Tensor,
        workspace: Workspace,
    ) -> None:
        """Tokens of a prompt at once: what each corrects follows from a triangular system (§3.3).

        Decays of a token are those since the block's first token; `between` are those from one token
        to a later one.
        """
        x_mX, decay_mH, step_mH = self._split(row_mX)
        q_mK1k, k_mK1k, v_mKgv = self._heads(_convolve(x_mX, weights.convolution, tail_tX, workspace))
        heads, tokens = state_Hkv.shape[0], row_mX.shape[0]

        def by_head(x_mKgd: Tensor) -> Tensor:
            """(H, m, d), where key heads are repeated."""
            keys, dim = x_mKgd.shape[1], x_mKgd.shape[3]
            out_Hmd = workspace.take((heads, tokens, dim), torch.float32)
            out_Hmd.view(keys, -1, tokens, dim).copy_(x_mKgd.permute(1, 2, 0, 3))
            return out_Hmd

        def product(left: Tensor, right: Tensor) -> Tensor:
            return torch.bmm(left, right, out=workspace.take((heads, tokens, right.shape[2]), torch.float32))

        q_Hmk, k_Hmk, v_Hmv = by_head(q_mK1k), by_head(k_mK1k), by_head(v_mKgv)
        rates = weights.decay.float(), weights.step_bias.float()
        decays_Hm = _log_decays(decay_mH, *rates).T.cumsum(1)
        steps_Hm1 = step_mH.T.float().sigmoid().unsqueeze(2)
        between_Hmm = workspace.take((heads, tokens, tokens), torch.float32)
        torch.sub(decays_Hm.unsqueeze(2), decays_Hm.unsqueeze(1), out=between_Hmm)
        later_mm = torch.ones((tokens, tokens), dtype=torch.bool, device=row_mX.device).triu_(1)
        between_Hmm.masked_fill_(later_mm, -torch.inf).exp_()
        system_Hmm = product(k_Hmk, k_Hmk.mT).mul_(between_Hmm).mul_(steps_Hm1)
        scores_Hmm = product(q_Hmk, k_Hmk.mT).mul_(between_Hmm)
        whole_Hm1 = decays_Hm.exp().unsqueeze(2)
        held_Hmv = product(k_Hmk, state_Hkv)
        v_Hmv.addcmul_(held_Hmv, whole_Hm1, value=-1).mul_(steps_Hm1)
        change_Hmv = torch.linalg.solve_triangular(system_Hmm, v_Hmv, upper=False, unitriangular=True, out=held_Hmv)
        read_Hmv = product(q_Hmk, state_Hkv).mul_(whole_Hm1).baddbmm_(scores_Hmm, change_Hmv)
        out_mQ.unflatten(1, (heads, -1)).copy_(read_Hmv.transpose(0, 1))
        change_Hmv.mul_((decays_Hm[:, -1:] - decays_Hm).exp_().unsqueeze(2))
        state_Hkv.mul_(whole_Hm1[:, -1:]).baddbmm_(k_Hmk.mT, change_Hmv)


def _log_decays(decay_TH: Tensor, log_rate_H: Tensor, bias_H: Tensor) -> Tensor:
    """The logarithm of what each token leaves of a state, float32."""
    return functional.softplus(decay_TH + bias_H).mul_(log_rate_H.exp().neg_())


def _step_convolution(x_rX: Tensor, weight_Xk: Tensor, tails_rtX: Tensor) -> Tensor:
    """Each request's new token, convolved with those before, of which the earliest is then forgotten; float32."""
    convolved_rX = torch.mul(x_rX, weight_Xk[:, -1])
    befores = tails_rtX.unbind(1)
    for before_rX, weight_X, after_rX in zip(befores, weight_Xk.T, (*befores[1:], x_rX), strict=False):
        convolved_rX.addcmul_(before_rX.float(), weight_X)
        before_rX.copy_(after_rX)
    return convolved_rX


def _convolve(x_mX: Tensor, weight_Xk: Tensor, tail_tX: Tensor, workspace: Workspace) -> Tensor:
    """Tokens of a prompt, convolved with those before, which then are the last of them; float32."""
    tokens, before = x_mX.shape[0], tail_tX.shape[0]
    convolved_mX = workspace.take(x_mX.shape, torch.float32)
    window_wX = workspace.take((before + tokens, x_mX.shape[1]), torch.float32)
    window_wX[:before].copy_(tail_tX)
    window_wX[before:].copy_(x_mX)
    weights = weight_Xk.float().T.unbind(0)
    torch.mul(window_wX[before:], weights[-1], out=convolved_mX)
    for first, weight_X in enumerate(weights[:-1]):
        convolved_mX.addcmul_(window_wX[first : first + tokens], weight_X)
    tail_tX.copy_(window_wX[tokens:])
    return convolved_mX


def _stretches(rows: Sequence[int], at_most: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a cache that lie one after the other, as a slice of them and of the requests."""
    first = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1 or end - first == at_most:
            yield slice(rows[first], rows[end - 1] + 1), slice(first, end)
            first = end
