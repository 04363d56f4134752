"""What a stage of a pipeline does otherwise than a whole model: it begins with hidden states, or ends with them.

The last stage chooses tokens and sends them to the first. There they are appended and looked through for stop texts,
and go on from stage to stage, each before the hidden states that are made of it, so that all stages have the same
requests in their rows. Steps of the batches that are under way take turns.

R requests, T tokens, D hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Final, final

import torch
from torch import Tensor

from executor.group.stages import Moving, Stages
from executor.handlers.decode import DecodeHandlers
from executor.handlers.prefill import PrefillHandlers
from executor.handlers.state import BatchState, Generated, Rows, append, choices
from executor.lanes import Handler
from hrm.acts import decode, prefill
from hrm.tasks import Act, Lane, Task

_KINDS: Final = 3  # of what is sent, each by number: of a micro-batch or chunk
_TOKENS, _HIDDEN, _PROMPTS = range(_KINDS)


def in_turns(of_batches: Sequence[Mapping[Act, Handler]], turns: int) -> Mapping[Act, Handler]:
    """Handlers of batches whose steps take turns; nothing is done in those for which there is no batch."""
    if turns == 1:
        return of_batches[0]

    def nothing(_: Task) -> int:
        return 0

    def of(act: Act) -> Handler:
        handlers = [*(one[act] for one in of_batches), *[nothing] * (turns - len(of_batches))]
        return lambda x: handlers[x.id.step % turns](x)

    return {act: of(act) for act in of_batches[0]}


@final
class Handover:
    """What goes from stage to stage for one batch."""

    def __init__(self, stages: Stages, state: BatchState) -> None:
        self.stages, self._state = stages, state
        self._awaited = [tuple(members) for members in state.sequences]  # of each micro-batch, whose tokens are to come
        self._first: dict[int, tuple[int, float]] = {}  # token and log probability of a placed request, on the last

    def tell(self, micro_batch: int, step: int) -> None:
        """Append what was chosen for a micro-batch before this step, and set up its rows."""
        awaited, tag = self._awaited[micro_batch], _tag(_TOKENS, micro_batch)
        if awaited:
            told_2R = torch.empty(2, len(awaited), dtype=torch.int64)
            self.stages.receive(told_2R, tag).wait()
            tokens: list[int] = told_2R[0].tolist()
            if self.stages.is_first:
                append(self._state, awaited, tokens, told_2R[1].view(torch.float64).tolist())
                told_2R[1] = torch.tensor([sequence.finish_reason is not None for sequence in awaited])
            else:
                for sequence, token, ends in zip(awaited, tokens, told_2R[1].tolist(), strict=True):
                    self._state.append(sequence, token, ends=bool(ends))
            if not self.stages.is_last:
                self.stages.send(told_2R, tag)
            self._awaited[micro_batch] = tuple(each for each in awaited if each.finish_reason is None)
        self._state.set_rows(micro_batch, step)

    def tell_all(self, step: int) -> None:
        """The same of all micro-batches, when all steps before this one are over."""
        for micro_batch in range(len(self._awaited)):
            self.tell(micro_batch, step)

    def give(self, micro_batch: int, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Send what was chosen for a micro-batch to the first stage."""
        bits_R = torch.tensor(logprobs, dtype=torch.float64).view(torch.int64)
        self.stages.send(torch.stack([torch.tensor(tokens), bits_R]), _tag(_TOKENS, micro_batch))

    def keep(self, sequences: Sequence[Generated], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Keep first tokens, which come in the order of chunks, until all are there."""
        chosen = zip(tokens, logprobs, strict=True)
        self._first.update((id(s.placed), each) for s, each in zip(sequences, chosen, strict=True))

    def give_first(self) -> None:
        """Send the first tokens of all requests, from the stage that has them."""
        for micro_batch, members in enumerate(self._awaited if self.stages.is_last else ()):
            if members:
                tokens, logprobs = zip(*(self._first[id(sequence.placed)] for sequence in members), strict=True)
                self.give(micro_batch, tokens, logprobs)

    def send_hidden(self, hidden_RD: Tensor, micro_batch: int) -> None:
        """Send a micro-batch's hidden states to the next stage."""
        self.stages.send(hidden_RD, _tag(_HIDDEN, micro_batch))

    def hidden_has_left(self, micro_batch: int) -> None:
        """Return when the last of them have left."""
        self.stages.has_left(_tag(_HIDDEN, micro_batch))

    def receive_hidden(self, hidden_RD: Tensor, micro_batch: int) -> None:
        """Return with a micro-batch's hidden states from the stage before."""
        self.stages.receive(hidden_RD, _tag(_HIDDEN, micro_batch)).wait()

    def send_prompts(self, hidden_TD: Tensor, chunk: int) -> None:
        """Send a chunk's hidden states to the next stage."""
        self.stages.send(hidden_TD, _tag(_PROMPTS, chunk))

    def receive_prompts(self, host_TD: Sequence[Tensor]) -> list[Moving]:
        """Begin to receive all chunks' hidden states, as soon as those of the batch before have left their place."""
        for tag in self.stages.leaving:
            if tag % _KINDS == _PROMPTS:
                self.stages.has_left(tag)
        if self.stages.is_first:
            return []
        return [self.stages.receive(hidden_TD, _tag(_PROMPTS, chunk)) for chunk, hidden_TD in enumerate(host_TD)]


def _tag(kind: int, number: int) -> int:
    return _KINDS * number + kind


@final
class StagePrefill:
    """Prefill of a batch in one of several stages."""

    def __init__(self, handlers: PrefillHandlers, handover: Handover) -> None:
        self._own, self._handover = handlers, handover
        # Not only when they are needed, so that the stage before need not wait to go on.
        all_TD = handlers.memory.prefill.host_TD
        host_TD = [all_TD[each.offset : each.offset + each.num_tokens] for each in handlers.prompts.chunks]
        self._coming = handover.receive_prompts(host_TD)

    def by_act(self) -> dict[Act, Handler]:
        """The handler of every act that occurs in prefill."""
        stages, changed = self._handover.stages, dict[Act, Handler]()
        if not stages.is_first:
            changed[prefill.EMBED] = self._enter
        if not stages.is_last:
            changed[prefill.SAMPLE] = self._leave
        return {**self._own.by_act(), **changed}

    def _enter(self, x: Task) -> int:
        self._coming[x.id.index].wait()
        return self._own.load_hidden(x)

    def _leave(self, x: Task) -> int:
        own = self._own
        moved = own.backend.transfer(Lane.D2H, [(own.host(x), own.after_layers(x))])
        own.backend.synchronise()
        self._handover.send_prompts(own.host(x), x.id.index)
        return moved


@final
class StageDecode:
    """Decode of a batch in one of several stages."""

    def __init__(self, handlers: DecodeHandlers, handover: Handover) -> None:
        self._own, self._handover = handlers, handover
        self._enter, self._leave = handlers.on_rows(self._enter_rows), handlers.on_rows(self._leave_rows)

    def by_act(self) -> dict[Act, Handler]:
        """The handler of every act that occurs in decode."""
        return {**self._own.by_act(), decode.EMBED: self._tell_and_enter, decode.SAMPLE: self._leave}

    def _tell_and_enter(self, x: Task) -> int:
        self._handover.tell(x.id.index, self._own.step(x))
        return self._enter(x)

    def _enter_rows(self, x: Task, rows: Rows, span: slice) -> int:
        if self._handover.stages.is_first:
            return self._own.embed(x, rows, span)
        self._handover.receive_hidden(self._own.memory.host.hidden_ND[span], x.id.index)
        return self._own.enter(rows, span)

    def _leave_rows(self, x: Task, rows: Rows, span: slice) -> int:
        own, handover = self._own, self._handover
        hidden_RD = own.after_layers(x, span)
        if handover.stages.is_last:
            handover.give(x.id.index, *choices(own.arch, own.memory, own.group, hidden_RD, rows.sequences))
            return 0
        sent_RD = own.memory.host.sent_ND[span]
        handover.hidden_has_left(x.id.index)
        moved = own.backend.transfer(Lane.D2H, [(sent_RD, hidden_RD)])
        own.backend.synchronise()
        handover.send_hidden(sent_RD, x.id.index)
        return moved
