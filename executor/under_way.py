"""A batch under way: its requests and caches, and what its tasks do in a whole model or in a stage of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from executor.backends import AbstractBackend
from executor.batching import Chunk
from executor.engine import PhaseResult
from executor.group import Alone, Group
from executor.group.stages import OneStage, Stages
from executor.handlers import (
    BatchState,
    DecodeHandlers,
    Generated,
    Handover,
    PrefillHandlers,
    Prompts,
    RunMemory,
    StageDecode,
    StagePrefill,
    choices,
    in_turns,
)
from executor.lanes import Handler
from executor.model import Architecture
from hrm.policy import Policy
from hrm.schedules import Pipeline
from hrm.tasks import Act


@final
@dataclass(frozen=True, slots=True)
class Peers:
    """The processes that run a model together with this one: a group to sum up with, or the stages of a pipeline."""

    group: Group = field(default_factory=Alone)
    stages: Stages = field(default_factory=OneStage)


@final
@dataclass(slots=True)
class UnderWay:
    """One batch, with its own caches in the memory that all share.

    `prefilled` is what its prefill did, once that is over.
    """

    backend: AbstractBackend
    arch: Architecture
    policy: Policy
    memory: RunMemory
    state: BatchState
    peers: Peers
    chunks: tuple[Chunk, ...]
    prefill: Pipeline
    prefilled: PhaseResult | None = None
    _handover: Handover | None = field(init=False)

    def __post_init__(self) -> None:
        stages = self.peers.stages
        self._handover = Handover(stages, self.state) if stages.size > 1 else None

    def prefill_handlers(self) -> Mapping[Act, Handler]:
        """What the tasks of its prefill do."""
        prompts = Prompts.write(self.chunks, self.memory.prefill)
        if self._handover is None:
            return PrefillHandlers(*self._given(self.prefill), prompts).by_act()
        own = PrefillHandlers(*self._given(self.prefill), prompts, choose=self._keep_first)
        return StagePrefill(own, self._handover).by_act()

    def _given(
        self, pipeline: Pipeline
    ) -> tuple[AbstractBackend, Architecture, Policy, Pipeline, RunMemory, BatchState, Group]:
        """What the handlers of a phase work with."""
        return self.backend, self.arch, self.policy, pipeline, self.memory, self.state, self.peers.group

    def _keep_first(self, hidden_RD: Tensor, sequences: Sequence[Generated]) -> None:
        assert self._handover is not None
        chosen = choices(self.arch, self.memory, self.peers.group, hidden_RD, sequences)
        self._handover.keep(sequences, *chosen)

    def end_prefill(self) -> None:
        """Set up the rows of its first step."""
        if self._handover is not None:
            self._handover.give_first()
        self.state.start_decode()

    def decode_handlers(self, pipeline: Pipeline, batches: int) -> Mapping[Act, Handler]:
        """What the tasks of its steps do, which take turns with those of so many batches."""
        own = DecodeHandlers(*self._given(pipeline), batches=batches)
        return own.by_act() if self._handover is None else StageDecode(own, self._handover).by_act()

    def end(self, num_steps: int) -> None:
        """Have the last tokens, after so many steps."""
        if self._handover is not None:
            self._handover.tell_all(num_steps)


def decode_handlers(batches: Sequence[UnderWay], pipeline: Pipeline, turns: int) -> Mapping[Act, Handler]:
    """What the tasks of decode do, in so many turns: nothing in those for which there is no batch.

    There is one for every stage. With fewer, a stage would wait for tokens that are made of hidden states which it
    itself comes to send later.
    """
    return in_turns([each.decode_handlers(pipeline, turns) for each in batches], turns)
