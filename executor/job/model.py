"""A checkpoint with the policy that it runs under: all that is known of both before a weight is read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from executor.batching import Completion, Placed
from executor.checkpoint import Checkpoint
from executor.families import Family, family_for
from executor.guard import in_a_line, is_of_one_request
from executor.job.machine import check_model
from executor.job.model_part import ModelPart
from executor.job.outputs import completion_line, failed_line, logprobs_json, rejected_line, text_of
from executor.job.requests import LineReader, Rejected
from executor.job.room import AnswerRoom
from executor.job.sampling_defaults import SamplingDefaults, SamplingSource
from executor.model import Architecture
from executor.weight_pages import StoredWeights
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import PolicyFile


@final
@dataclass(frozen=True, slots=True)
class OpenModel:
    """A checkpoint, its policy, and what makes requests of lines and texts of tokens.

    `own` is what this process has of it: all, or if there are several what rank 0 has.
    """

    checkpoint: Checkpoint
    family: Family
    arch: Architecture
    policy_file: PolicyFile
    policy: Policy
    reader: LineReader
    own: ModelPart

    @property
    def defaults(self) -> SamplingDefaults:
        """What requests that do not say are sampled with."""
        return self.reader.defaults

    def stops(self, placed: Placed, tokens: Sequence[int]) -> bool:
        """Whether the tokens of a request hold one of its stop texts."""
        tokenizer, request = self.reader.tokenizer, placed.request
        assert tokenizer is not None, "checked when the request was read"
        return tokenizer.has_stopped(request.prompt, tokens, request.params.stop)

    def line_of(self, item: Completion | Rejected) -> dict[str, Any]:
        """The output line of a request that has ended or was rejected."""
        if isinstance(item, Rejected):
            return rejected_line(item)
        if item.error is not None:
            return failed_line(item.request.name, item.error)
        try:
            text = text_of(item, self.reader.tokenizer, frozenset(self.arch.eos_token_ids))
            logprobs = logprobs_json(item, self.reader.tokenizer, chat=item.request.chat)
        except BaseException as error:
            if not is_of_one_request(error):
                raise
            told = f"the generated tokens cannot be made a text: {in_a_line(error)}"
            return failed_line(item.request.name, told)
        return completion_line(item, self.arch.spec.name, text, chat=item.request.chat, logprobs=logprobs)


@contextmanager
def opened(
    model: Path,
    policy_file: PolicyFile,
    *,
    name: str = "",
    policy_path: Path | str = "policy",
    schedule: ScheduleName | None = None,
    seed: int = 0,
    sampling: SamplingSource = "model",
    tell: Callable[[str], object] = lambda _: None,
) -> Iterator[OpenModel]:
    """A model opened and held against the policy; an HrmError says what of them does not suit."""
    policy = policy_file.policy if schedule is None else replace(policy_file.policy, schedule=schedule)
    with Checkpoint.open(model, name) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        check_model(arch.spec, policy_file, policy_path)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
        room = AnswerRoom.of(policy, policy_file.workload.gen_len, arch)
        defaults = SamplingDefaults.of(sampling, checkpoint.folder)
        reader = LineReader(checkpoint.folder, room, seed, tell, defaults)
        arch = replace(arch, eos_token_ids=tuple(dict.fromkeys(arch.eos_token_ids + reader.eos_token_ids)))
        as_run = replace(policy_file, policy=policy)
        own = ModelPart.of(StoredWeights(checkpoint, family), arch, as_run)
        yield OpenModel(checkpoint, family, arch, policy_file, policy, reader, own)
