"""Requests into micro-batches, and prompts into chunks: variable lengths, no padding.

A prompt longer than a chunk is split over successive ones.

Algorithm 2 of MoE-Lightning (arXiv 2411.11217, App. A): longest prompt first, into the open
micro-batch with the fewest tokens; a micro-batch closes at μ requests; what would exceed its cache
waits for the next batch. No request is ever dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, final

from executor.sampling import SamplingParams
from hrm.contract.rows import KV_BLOCK_TOKENS
from hrm.policy import Policy
from hrm.workload import Workload


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids and how to go on from it; `name` is the user's word for it.

    `chat` says that it was asked as a conversation and is answered as one; `open_ended` that its
    `max_tokens` is what the policy has room for, as nothing else was asked for. `digest` is of the
    line that it was read from.
    """

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams
    chat: bool = False
    open_ended: bool = False
    digest: str = ""

    @property
    def num_positions(self) -> int:
        """Positions that it may reach: those of its tokens, but for the last, which nothing follows."""
        return len(self.prompt) + self.params.max_tokens - 1

    @property
    def kv_tokens(self) -> int:
        """Cache tokens that it owns: prompt and generation, in whole blocks."""
        tokens = len(self.prompt) + self.params.max_tokens
        return -(-tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Completion:
    """What was generated for a request, the token that ended it included.

    If its `finish_reason` is ERROR, `error` says what went wrong with it. `logprobs` are
    the log probabilities of the tokens, if they were asked for.
    """

    request: Request
    tokens: tuple[int, ...]
    finish_reason: str
    error: str | None = None
    logprobs: tuple[float, ...] = ()


class Sink(Protocol):
    """Where completions go, each as soon as it is there."""

    def put(self, completion: Completion, /) -> None:
        """Take a completion; a lane waits for this, so it must return at once."""
        ...

    def stops(self) -> bool:
        """Raise what went wrong with those taken, from the main thread; False if nothing did."""
        ...


@final
class Nowhere:
    """A sink that keeps nothing: the result of the batch holds all completions."""

    def put(self, completion: Completion, /) -> None:
        """Nothing happens."""

    def stops(self) -> bool:
        """Nothing can go wrong."""
        return False


@dataclass(frozen=True, slots=True)
class Placed:
    """A request and the first row of its part of its micro-batch's cache."""

    request: Request
    start: int


@dataclass(slots=True)
class MicroBatch:
    """Requests that are computed together."""

    placed: list[Placed]
    kv_tokens: int = 0

    def add(self, request: Request) -> None:
        """Place a request behind the others."""
        self.placed.append(Placed(request, self.kv_tokens))
        self.kv_tokens += request.kv_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Micro-batches that are prefilled and decoded together, none of them empty.

    In a pipeline it is several batches, whose steps take turns; `sizes` are then their numbers of micro-batches.
    """

    micro_batches: tuple[MicroBatch, ...]
    sizes: tuple[int, ...] = ()

    @staticmethod
    def together(batches: Sequence["Batch"]) -> "Batch":
        """Batches that are under way together."""
        if len(batches) == 1:
            return batches[0]
        micro_batches = tuple(each for batch in batches for each in batch.micro_batches)
        return Batch(micro_batches, tuple(len(batch.micro_batches) for batch in batches))

    @property
    def under_way(self) -> tuple["Batch", ...]:
        """The batches apart, of equally many micro-batches: the last of one may be empty."""
        if not self.sizes:
            return (self,)
        left, most = iter(self.micro_batches), max(self.sizes)
        of_each = [tuple(islice(left, size)) for size in self.sizes]
        return tuple(Batch((*of, *(MicroBatch([]) for _ in range(most - len(of))))) for of in of_each)

    @property
    def num_requests(self) -> int:
        """Requests in all micro-batches."""
        return sum(self.micro_batch_sizes)

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Requests in each micro-batch."""
        return tuple(len(micro_batch.placed) for micro_batch in self.micro_batches)

    @property
    def requests(self) -> Iterator[Request]:
        """All requests, micro-batch by micro-batch."""
        return (placed.request for micro_batch in self.micro_batches for placed in micro_batch.placed)

    @property
    def num_steps(self) -> int:
        """Decode steps until the last request has all its tokens; prefill gives each the first."""
        return max(request.params.max_tokens for request in self.requests) - 1

    def policy(self, whole: Policy) -> Policy:
        """What is run of a whole batch's policy: that of a batch with these micro-batches full."""
        return whole.for_batch(max(self.sizes or (len(self.micro_batches),)) * whole.micro_batch_size)


def pack(requests: Sequence[Request], policy: Policy) -> tuple[Batch, list[Request]]:
    """Algorithm 2 over these requests: a batch, and those that have to wait, in the order given.

    Opens as few micro-batches as the requests need. Every request must fit an empty micro-batch.
    """
    limit = policy.kv_tokens_per_micro_batch
    tokens = sum(request.kv_tokens for request in requests)
    needed = max(-(-len(requests) // policy.micro_batch_size), -(-tokens // limit))
    for count in range(min(needed, policy.num_micro_batches), policy.num_micro_batches + 1):
        batch, waiting = _pack_into(requests, policy, count)
        if not waiting:
            break
    return batch, waiting


def _pack_into(requests: Sequence[Request], policy: Policy, num_micro_batches: int) -> tuple[Batch, list[Request]]:
    open_ = [MicroBatch([]) for _ in range(num_micro_batches)]
    all_ = list(open_)
    waiting: set[int] = set()
    by_length = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
    for index in by_length:
        request = requests[index]
        assert request.kv_tokens <= policy.kv_tokens_per_micro_batch, request.name
        emptiest = min(open_, key=lambda micro_batch: micro_batch.kv_tokens, default=None)
        if emptiest is None or emptiest.kv_tokens + request.kv_tokens > policy.kv_tokens_per_micro_batch:
            waiting.add(index)
            continue
        emptiest.add(request)
        if len(emptiest.placed) == policy.micro_batch_size:
            open_.remove(emptiest)
    filled = tuple(micro_batch for micro_batch in all_ if micro_batch.placed)
    return Batch(filled), [requests[index] for index in sorted(waiting)]


@final
class Batcher:
    """Cuts a stream of requests into batches, holding no more than one batch's worth of them.

    A batch has requests of one `kind` only. What had to wait goes first into the next batch, so
    nothing waits for ever.
    """

    def __init__(
        self, requests: Iterator[Request], policy: Policy, kind: Callable[[Request], object] = lambda _: None
    ) -> None:
        self._requests, self._policy, self._kind = requests, policy, kind
        self._waiting: list[Request] = []

    def __iter__(self) -> Iterator[Batch]:
        """Batches until the stream ends and nothing waits."""
        room = self._policy.num_micro_batches * self._policy.micro_batch_size
        room = min(room, self._policy.batch_size)
        while True:
            missing = max(room - len(self._waiting), 0)
            candidates = self._waiting + list(islice(self._requests, missing))
            if not candidates:
                return
            first = self._kind(candidates[0])
            alike = [request for request in candidates if self._kind(request) == first]
            batch, waiting = pack(alike, self._policy)
            if self._waiting and self._waiting[0] in waiting:  # never twice in a row
                batch, waiting = self._oldest_first(alike)
            packed = {id(request) for request in batch.requests}
            self._waiting = [request for request in candidates if id(request) not in packed]
            yield batch

    def _oldest_first(self, candidates: list[Request]) -> tuple[Batch, list[Request]]:
        """As many of the oldest candidates as fit together."""
        low, high = 1, len(candidates)
        while low < high:  # the greatest count that fits, by bisection
            middle = (low + high + 1) // 2
            if pack(candidates[:middle], self._policy)[1]:
                high = middle - 1
            else:
                low = middle
        batch, waiting = pack(candidates[:low], self._policy)
        return batch, waiting + candidates[low:]


def asks_for_more(request: Request, solved: Workload, policy: Policy) -> bool:
    """Whether a request has a longer prompt than the policy was solved for, or takes more cache.

    It does if it asks for more new tokens and its share of a micro-batch's cache is not enough.
    """
    prompt, new = len(request.prompt), request.params.max_tokens
    blocks = policy.kv_tokens_per_micro_batch // KV_BLOCK_TOKENS // policy.micro_batch_size
    longer = new > solved.gen_len and prompt + new > blocks * KV_BLOCK_TOKENS
    return prompt > solved.max_prompt_len or longer


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """A prompt in a chunk, or a part of one: its tokens from `start` on, in rows [first, last)."""

    placed: Placed
    micro_batch: int
    start: int
    first: int
    last: int

    @property
    def end(self) -> int:
        """Tokens of the prompt up to the end of the part."""
        return self.start + self.last - self.first

    @property
    def ends(self) -> bool:
        """Whether it is the prompt's last part."""
        return self.end == len(self.placed.request.prompt)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Its token ids."""
        return self.placed.request.prompt[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompts that are prefilled together; `offset` counts the tokens of earlier chunks.

    A split prompt's parts lie in successive chunks: last in the one, first in the next. So between
    two chunks no more than one prompt is under way.
    """

    parts: tuple[ChunkPart, ...]
    offset: int

    @property
    def num_tokens(self) -> int:
        """Prompt tokens in the chunk."""
        return self.parts[-1].last


def chunks(batch: Batch, max_tokens: int) -> tuple[Chunk, ...]:
    """All prompts of a batch in chunks of at most `max_tokens`, the longest first.

    Those that are longer fill one chunk after the other, the others go into the first with room.
    """
    prompts = [(placed, j) for j, micro_batch in enumerate(batch.micro_batches) for placed in micro_batch.placed]
    prompts.sort(key=lambda prompt: -len(prompt[0].request.prompt))
    rooms: list[int] = []
    members: list[list[ChunkPart]] = []
    for placed, j in prompts:
        length = len(placed.request.prompt)
        start, least = 0, 1 if length > max_tokens else length
        while start < length:
            index = next((g for g, room in enumerate(rooms) if room >= least), len(rooms))
            if index == len(rooms):
                rooms.append(max_tokens)
                members.append([])
            first = max_tokens - rooms[index]
            part = ChunkPart(placed, j, start, first, first + min(length - start, rooms[index]))
            members[index].append(part)
            rooms[index] = max_tokens - part.last
            start = part.end
    made: list[Chunk] = []
    offset = 0
    for parts in members:
        made.append(Chunk(tuple(parts), offset))
        offset += made[-1].num_tokens
    return tuple(made)
