"""A look at the whole input before anything is run: what it asks for, and whether it goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, final

from executor.batching import Request, asks_for_more
from executor.checks import check_request
from executor.errors import JobError
from executor.job.identity import digest_of_line
from executor.job.input_file import Input
from executor.job.outputs import OUTPUTS
from executor.job.requests import Line, LineReader, lines_of
from executor.model import Architecture
from hrm.errors import HrmError
from hrm.policy import Policy
from hrm.workload import Workload

SHOWN_REASONS: Final = 3  # why lines cannot be run, or requests got no answer


@final
@dataclass(slots=True)
class RequestLengths:
    """How many requests there are and what they ask for, in tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    max_prompt_tokens: int = 0
    new_tokens: int = 0
    max_new_tokens: int = 0

    def add(self, request: Request) -> None:
        """Count a request."""
        prompt, new = len(request.prompt), request.params.max_tokens
        self.requests += 1
        self.prompt_tokens += prompt
        self.max_prompt_tokens = max(self.max_prompt_tokens, prompt)
        self.new_tokens += new
        self.max_new_tokens = max(self.max_new_tokens, new)

    def workload(self) -> Workload:
        """The same as a workload; there must be a request."""
        mean_new = self.new_tokens / self.requests
        return Workload(
            name="input",
            prompt_len=self.prompt_tokens / self.requests,
            max_prompt_len=self.max_prompt_tokens,
            gen_len=self.max_new_tokens,
            mean_gen_len=mean_new if mean_new < self.max_new_tokens else None,
            num_requests=self.requests,
        )


@final
@dataclass(slots=True)
class Survey:
    """What of an input is still to be run.

    `to_run` are the requests that the policy can run and `asked` all that some policy could.
    `reasons` are those of the first lines that cannot be run. `names` are made up for broken lines,
    by their numbers: none is another line's custom_id.
    """

    to_run: RequestLengths = field(default_factory=RequestLengths)
    asked: RequestLengths = field(default_factory=RequestLengths)
    rejected: int = 0
    reasons: list[str] = field(default_factory=list[str])
    names: dict[int, str] = field(default_factory=dict[int, str])
    more: int = 0  # of those asked, requests that ask for more than the policy was solved for


@final
@dataclass(frozen=True, slots=True)
class Judge:
    """What a model and some policies make of requests; `solved` is what the first policy was solved for."""

    arch: Architecture
    policies: Sequence[Policy]
    solved: Workload

    def check(self, request: Request) -> None:
        """Raise why the first policy cannot run the request, if no other can either (JobError)."""
        reasons: list[JobError] = []
        for policy in self.policies:
            try:
                return check_request(request, self.arch, policy)
            except JobError as error:
                reasons.append(error)
        raise reasons[0]

    def fits_model(self, request: Request) -> bool:
        """Whether some policy could run it."""
        length = len(request.prompt)
        return 0 < length <= self.arch.max_position_embeddings - request.params.max_tokens

    def is_more(self, request: Request) -> bool:
        """Whether it asks for more than the first policy was solved for."""
        return asks_for_more(request, self.solved, self.policies[0])

    def as_asked(self, request: Request) -> Request:
        """The request; if it asks for as much as there is room, for no more than was solved for."""
        if not request.open_ended:
            return request
        most = min(request.params.max_tokens, self.solved.gen_len)
        return replace(request, params=replace(request.params, max_tokens=most))


def survey(
    path: Input, reader: LineReader, judge: Judge, answered: Mapping[str, str | None], directory: Path, most: int | None
) -> Survey:
    """Read the input once, up to `most` requests that can be run and to its end for names.

    Raises JobError if what is answered in the run directory is not in the input, or was changed
    there since.
    """
    made = Survey()
    names: set[str] = set()
    broken: list[int] = []
    missing = dict.fromkeys(answered)
    for line in lines_of(path):
        if line.error is not None:
            broken.append(line.number)
        else:
            names.add(line.name)
        if line.name in answered:
            del missing[line.name]
            _check_unchanged(line, answered[line.name], path, directory)
        elif most is None or made.to_run.requests < most:
            _count(made, line, reader, judge)
    if missing:
        raise JobError(
            f"--input {path}: request {next(iter(missing))!r}",
            "<missing>",
            f"must be there as long as {directory / OUTPUTS} holds its answer",
            "give the input with all of its lines, or choose another --output-dir",
        )
    for number in broken:
        name = f"line-{number}"
        while name in names:
            name = f"broken-{name}"
        made.names[number] = name
    return made


def _check_unchanged(line: Line, digest: str | None, path: Input, directory: Path) -> None:
    if digest not in {None, digest_of_line(line.content)}:
        raise JobError(
            f"--input {path}: line {line.number}: request {line.name!r}",
            "<changed>",
            f"must be as it was when {directory / OUTPUTS} got its answer",
            "put it back, give it another custom_id, or choose another --output-dir",
        )


def _count(made: Survey, line: Line, reader: LineReader, judge: Judge) -> None:
    try:
        request = reader.request(line)
        if judge.fits_model(request):
            asked = judge.as_asked(request)
            made.asked.add(asked)
            made.more += judge.is_more(asked)
        judge.check(request)
    except HrmError as error:
        made.rejected += 1
        if len(made.reasons) < SHOWN_REASONS:
            made.reasons.append(f"line {line.number}: {error}")
    else:
        made.to_run.add(request)
