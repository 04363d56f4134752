"""The requests of a batch while they are generated, and the choice of their next tokens.

R requests, D hidden, V vocab.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, final

import torch
from torch import Tensor

from executor.batching import Batch, Placed
from executor.errors import RunError
from executor.group import Group, share_of
from executor.guard import in_a_line, is_of_one_request
from executor.handlers.memory import RunMemory
from executor.model import Architecture, Reach, RowNumbers, logits
from executor.sampling import NO_TOKEN, choose, choose_of_parts, greatest_of_part, log_probabilities, needs_all_logits

STOP: Final = "stop"
LENGTH: Final = "length"
ERROR: Final = "error"


@dataclass(slots=True)
class Generated:
    """A request being generated: its tokens so far and, once it has ended, why.

    `error` says what went wrong with it, if its `finish_reason` is ERROR.
    """

    placed: Placed
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The requests of a micro-batch that go on in one decode step, a row each, and their last tokens."""

    sequences: tuple[Generated, ...]
    tokens: Tensor
    numbers: Mapping[Reach, RowNumbers]

    @staticmethod
    def of(sequences: Sequence[Generated], starts: Mapping[Reach, Sequence[int]]) -> "Rows":
        """The rows of the step after the tokens that the sequences have.

        `starts` are the first rows of their parts of a cache.
        """
        tokens = [len(s.placed.request.prompt) + len(s.tokens) for s in sequences]
        positions_R = torch.tensor([count - 1 for count in tokens], dtype=torch.int64)
        numbers = {
            reach: RowNumbers(
                positions_R,
                torch.tensor([at + reach.row(n - 1) for at, n in zip(of, tokens, strict=True)], dtype=torch.int64),
                of,
                [reach.length(count) for count in tokens] if reach.rows else tokens,
            )
            for reach, of in starts.items()
        }
        # Of a stage that has yet to be told there is none before the first step.
        last_tokens = torch.tensor([[NO_TOKEN, *sequence.tokens][-1] for sequence in sequences], dtype=torch.int64)
        return Rows(tuple(sequences), last_tokens, numbers)


class EndOfText(Protocol):
    """Whether a request's text so far holds one of its stop texts."""

    def __call__(self, placed: Placed, tokens: Sequence[int], /) -> bool:
        """True ends the request."""
        ...


def never_stops(placed: Placed, tokens: Sequence[int]) -> bool:
    """For requests without stop texts."""
    del placed, tokens
    return False


@final
class BatchState:
    """The requests of a batch, what they have generated, and which rows the next step has.

    `num_active` counts requests that go on, and `num_generated` tokens so far. `ended` is called
    with each request as it ends, in the lane that chose its last token. Where several batches share
    buffers, each micro-batch has so many `places` in them, in every batch the same. `routed_tokens[i][e]`
    counts the tokens, prompts' and generated, that layer i sent to expert e; of prompts the last
    layer sends the ends only.
    """

    def __init__(
        self,
        batch: Batch,
        arch: Architecture,
        stops: EndOfText,
        ended: Callable[[Generated], object] = lambda _: None,
        *,
        places: int | None = None,
    ) -> None:
        self._eos = frozenset(arch.eos_token_ids)
        self._stops, self._ended = stops, ended
        self.sequences = [[Generated(placed) for placed in micro_batch.placed] for micro_batch in batch.micro_batches]
        self.routed_tokens = [[0] * arch.spec.experts.all_experts for _ in range(arch.spec.num_layers)]
        self._routed_on_device: Tensor | None = None
        self.num_active = batch.num_requests
        self.num_generated = 0
        self._longest_first = sorted(
            (s for members in self.sequences for s in members), key=lambda s: -s.placed.request.params.max_tokens
        )
        self._num_longer_ended = 0  # of them, before the first that goes on
        # Prefill gives each request its first token; these are the others.
        self._num_left = sum(s.placed.request.params.max_tokens - 1 for s in self._longest_first)
        self._num_decoded = self._num_steps = 0
        self.first_rows: list[int] = []
        first = 0
        for members in self.sequences:
            self.first_rows.append(first)
            first += places or len(members)
        self.by_placed = {id(s.placed): s for members in self.sequences for s in members}
        self._cache_starts = {reach: _starts(batch, reach) for reach in arch.reaches}
        # Two versions: STORE_KV of a step may still run when SAMPLE makes the next step's rows.
        nothing = Rows.of([], {reach: [] for reach in arch.reaches})
        self._rows: list[list[Rows]] = [[nothing, nothing] for _ in self.sequences]

    @property
    def routed(self) -> tuple[tuple[int, ...], ...]:
        """`routed_tokens` with what was counted on a device; only while no lane is at work."""
        total = torch.tensor(self.routed_tokens)
        if self._routed_on_device is not None:
            with suppress(RuntimeError):  # a device that failed tells no more
                total += self._routed_on_device.cpu()
        return tuple(tuple(layer) for layer in total.tolist())

    def decoded_share(self, fixed_share: float) -> float:
        """From 0 to 1: how much of the time of decode has passed, if no request ends early.

        Of a step's time `fixed_share` is for weights, whoever goes on, and the rest in proportion
        to how many do. For live displays, from one thread.
        """
        while self._num_longer_ended < len(self._longest_first):
            longest = self._longest_first[self._num_longer_ended]
            if longest.finish_reason is None:
                break
            self._num_longer_ended += 1
        else:
            return 1.0
        steps_left = max(longest.placed.request.params.max_tokens - 1 - self._num_steps, 0)
        per_token = (1 - fixed_share) / len(self._longest_first)
        done = fixed_share * self._num_steps + per_token * self._num_decoded
        left = fixed_share * steps_left + per_token * self._num_left
        return done / (done + left) if done else 0.0

    def rows(self, micro_batch: int, step: int) -> Rows:
        """The requests of a micro-batch that go on in that step."""
        return self._rows[micro_batch][step % 2]

    def append(self, sequence: Generated, token: int, *, ends: bool = False) -> None:
        """Add a token; end the request if it is one that ends it or the last allowed, or if it is known that it `ends`.

        NO_TOKEN ends it with an error, and so does a failing search for its stop texts.
        """
        if token == NO_TOKEN:
            error = RunError(
                f"logits of the request's token {len(sequence.tokens) + 1}",
                "<not finite>",
                "must be finite numbers",
                "run in bfloat16 or float32, or check the weights",
            )
            self._end(sequence, ERROR, str(error))
            return
        params = sequence.placed.request.params
        sequence.tokens.append(token)
        self.num_generated += 1
        if len(sequence.tokens) > 1:
            self._num_left -= 1
            self._num_decoded += 1
            self._num_steps = max(self._num_steps, len(sequence.tokens) - 1)
        ends = ends or token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        try:
            ends = ends or (bool(params.stop) and self._stops(sequence.placed, sequence.tokens))
        except BaseException as error:
            if not is_of_one_request(error):
                raise
            self._end(sequence, ERROR, f"stop texts cannot be looked for: {in_a_line(error)}")
            return
        if ends:
            self._end(sequence, STOP)
        elif len(sequence.tokens) >= params.max_tokens:
            self._end(sequence, LENGTH)

    def _end(self, sequence: Generated, finish_reason: str, error: str | None = None) -> None:
        self._num_left -= sequence.placed.request.params.max_tokens - max(len(sequence.tokens), 1)
        sequence.error, sequence.finish_reason = error, finish_reason
        self.num_active -= 1
        self._ended(sequence)

    def count_routed(self, layer: int, counts: Sequence[int] | Tensor) -> None:
        """Add to the tokens that each expert of the layer was sent, where they were counted."""
        if isinstance(counts, Tensor):
            if self._routed_on_device is None:
                shape = (len(self.routed_tokens), len(counts))
                self._routed_on_device = counts.new_zeros(shape)
            self._routed_on_device[layer] += counts
            return
        total = self.routed_tokens[layer]
        for expert, count in enumerate(counts):
            total[expert] += count

    def start_decode(self) -> None:
        """Set up the rows of step 0, after prefill."""
        for j in range(len(self.sequences)):
            self.set_rows(j, 0)
            self._rows[j][1] = self._rows[j][0]

    def set_rows(self, micro_batch: int, step: int) -> None:
        """Set up the rows of a step from the requests that go on."""
        going_on = [s for s in self.sequences[micro_batch] if s.finish_reason is None]
        starts = {reach: [of[id(s.placed)] for s in going_on] for reach, of in self._cache_starts.items()}
        self._rows[micro_batch][step % 2] = Rows.of(going_on, starts)

    def cache_start(self, placed: Placed, reach: Reach) -> int:
        """The first row of a request's part of its micro-batch's cache, in layers of that reach."""
        return self._cache_starts[reach][id(placed)]


def _starts(batch: Batch, reach: Reach) -> dict[int, int]:
    """Each request's first row, by the identity of its `Placed`."""
    starts: dict[int, int] = {}
    for micro_batch in batch.micro_batches:
        start = 0
        for placed in micro_batch.placed:
            starts[id(placed)] = start
            start += reach.capacity(placed.request.kv_tokens)
    return starts


def sample(
    arch: Architecture,
    memory: RunMemory,
    state: BatchState,
    group: Group,
    hidden_RD: Tensor,
    sequences: Sequence[Generated],
) -> None:
    """Choose and append the next token of each sequence, from its last hidden state."""
    append(state, sequences, *choices(arch, memory, group, hidden_RD, sequences))


def append(state: BatchState, sequences: Sequence[Generated], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
    """Append the tokens that were chosen, and their log probabilities where these were asked for."""
    for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
        if sequence.placed.request.params.logprobs and token != NO_TOKEN:
            sequence.logprobs.append(logprob)
        state.append(sequence, token)


def _of_greatest(
    arch: Architecture, group: Group, logits_RC: Tensor, sequences: Sequence[Generated]
) -> list[int] | None:
    """The next tokens, of each rank's part of the logits; None if that is not enough."""
    params, steps = [each.placed.request.params for each in sequences], [len(each.tokens) for each in sequences]
    of_rank, first = logits_RC.shape[1], arch.first_token or 0
    if any(map(needs_all_logits, params, steps)) or (group.size - 1) * of_rank >= arch.vocab_size:
        return None
    own_2R = greatest_of_part(logits_RC[:, : arch.vocab_size - first], first)
    found = group.gather(own_2R.view(-1), group.size * own_2R.numel())
    return choose_of_parts(found.view(group.size, 2, -1), params, steps)


def choices(
    arch: Architecture, memory: RunMemory, group: Group, hidden_RD: Tensor, sequences: Sequence[Generated]
) -> tuple[list[int], list[float]]:
    """The next token of each sequence, from its last hidden state, and its log probability if anyone asked for such.

    Every rank computes its part of the vocabulary for all sequences, and chooses for its share of them; or all choose
    for all, where the greatest logit of each part is enough.
    """
    workspace, head = memory.sampling_workspace, memory.weights.head
    assert head is not None, "tokens are chosen where the LM head is"
    workspace.reset()
    logits_RV = logits(
        arch.final_norm,
        hidden_RD,
        head,
        workspace,
        scale=arch.logits_scale,
        softcap=arch.softcap,
        may_be_narrow=hidden_RD.is_cpu and group.size == 1,
    )
    greatest = _of_greatest(arch, group, logits_RV, sequences) if group.size > 1 else None
    if greatest is not None:
        return greatest, [0.0] * len(greatest)
    logits_RV = group.exchange_rows(logits_RV)[:, : arch.vocab_size]
    ours = share_of(group.rank, group.size, len(sequences))
    params = [sequences[r].placed.request.params for r in ours]
    steps = [len(sequences[r].tokens) for r in ours]
    spare_bytes = workspace.capacity_bytes // 2
    chosen = choose(logits_RV, params, steps, spare_bytes=spare_bytes)
    told = [r for r, one in enumerate(params) if one.logprobs and chosen[r] != NO_TOKEN]
    found = dict(zip(told, log_probabilities(logits_RV, chosen, told, spare_bytes=spare_bytes), strict=True))
    tokens: list[int] = group.gather(torch.tensor(chosen, dtype=torch.int64), len(sequences)).tolist()
    if not any(sequence.placed.request.params.logprobs for sequence in sequences):
        return tokens, [0.0] * len(tokens)
    own = torch.tensor([found.get(r, 0.0) for r in range(len(ours))], dtype=torch.float64)
    return tokens, group.gather(own, len(sequences)).tolist()
