"""Attention to the newest tokens and to earlier ones compressed several into one, as in DeepSeek-V4."""

from dataclasses import dataclass
from typing import Literal, final

from hrm.formats import Format, Formats
from hrm.layers.base import TensorSpec, Unit, Vectors, check_vectors, vector_tensors
from hrm.layers.hyper_connection import mix_streams, stream_tensors
from hrm.layers.indexer import Indexer
from hrm.layers.softmax import FINISHING, SoftmaxAttention
from hrm.layers.work import Kernel, Operator, gemms
from hrm.numeric import Number, minimum


@final
@dataclass(frozen=True, kw_only=True)
class CompressedAttention(SoftmaxAttention):
    """Heads that all share one key, which is their value too.

    A layer sees the newest `local_window` tokens as they are, and of all others one key for every
    `rate` of them, weighted by gates; an `indexer` chooses among these, and then each is made of
    twice as many tokens. With a rate of 0 it sees those of its `window` only. The output is projected
    through `output_rank` elements in each of `output_groups`. The hidden state has `streams`.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    query_rank: int
    output_groups: int
    output_rank: int
    window: int = 0
    rate: int = 0
    local_window: int = 0
    indexer: Indexer | None = None
    streams: int = 1
    vectors: Vectors = ()
    block: Literal["compressed_attention"] = "compressed_attention"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes(
            "hidden_size", "num_heads", "head_dim", "query_rank", "output_groups", "output_rank", "streams"
        )
        self.check_sizes("window", "rate", "local_window", at_least=0)
        whole = self.num_heads % self.output_groups == 0
        self.require(whole, "output_groups", f"must divide num_heads {self.num_heads}")
        self.require(self.indexer is None or self.rate > 0, "rate", "must be positive with an indexer")
        check_vectors("vectors", self.vectors)

    @property
    def words(self) -> str:
        """What it is, for people."""
        compressed = f", {self.local_window} tokens and one for {self.rate} others" if self.rate else ""
        chosen = f"; {self.indexer.words}" if self.indexer else ""
        return f"shared key: {self.num_heads} heads of {self.head_dim}{compressed}{chosen}"

    @property
    def query_size(self) -> int:
        """Elements of one token's queries: heads × head_dim."""
        return self.num_heads * self.head_dim

    @property
    def returned_elements(self) -> int:
        """As many as queries have."""
        return self.query_size

    @property
    def attended_parts(self) -> tuple[int, ...]:
        """One key."""
        return (self.head_dim,)

    @property
    def compressed_size(self) -> int:
        """Elements that a token gives to compressed keys: to two of them, if they overlap."""
        return self.head_dim * (1 + (self.indexer is not None)) if self.rate else 0

    @property
    def index_size(self) -> int:
        """Elements that a token gives to compressed keys of the indexer."""
        return 2 * self.indexer.head_dim if self.indexer else 0

    @property
    def cached_elements(self) -> int:
        """A key, or its share of a compressed one and of one of the indexer."""
        if not self.rate:
            return self.head_dim
        return -(-(self.head_dim + self.index_size // 2) // self.rate)

    def cached_bytes(self, formats: Formats) -> int:
        """Bytes of a key, or a token's share of those of compressed ones."""
        if not (self.rate and formats.kv_cache.is_scaled):
            return super().cached_bytes(formats)
        keys = [formats.kv_cache.row_bytes((size,)) for size in (self.head_dim, self.index_size // 2) if size]
        return -(-sum(keys) // self.rate)

    def state_bytes(self, formats: Formats) -> int:
        """The newest keys, and what the next compressed ones are made of, with its gates."""
        pending = 2 * (1 + (self.indexer is not None)) * self.rate * (self.compressed_size + self.index_size)
        return self.local_window * formats.kv_cache.row_bytes((self.head_dim,)) + formats.compute.bytes_of(pending)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Norms, queries, keys, what compresses them, and the output in two steps."""
        hidden, rank = self.hidden_size, self.query_rank
        within, inner = self.query_size // self.output_groups, self.output_groups * self.output_rank
        return (
            TensorSpec("attention_norm", (hidden,), Unit.MIXER),
            TensorSpec("query_down", (rank, hidden), Unit.MIXER),
            TensorSpec("query_norm", (rank,), Unit.MIXER),
            TensorSpec("query_up", (self.query_size, rank), Unit.MIXER, 0),
            TensorSpec("key", (self.head_dim, hidden), Unit.MIXER),
            TensorSpec("key_norm", (self.head_dim,), Unit.MIXER),
            TensorSpec("sinks", (self.num_heads,), Unit.MIXER, 0),
            *self._compressor("compressed", self.head_dim, self.compressed_size),
            *self._index_tensors(),
            TensorSpec("output_down", (inner, within), Unit.MIXER, 0),
            TensorSpec("output", (hidden, inner), Unit.MIXER, 1),
            *stream_tensors("attention", self.streams, hidden, Unit.MIXER),
            *vector_tensors(self.vectors, Unit.MIXER),
        )

    def _compressor(self, name: str, key_size: int, size: int) -> tuple[TensorSpec, ...]:
        if not size:
            return ()
        return (
            TensorSpec(f"{name}_key", (size, self.hidden_size), Unit.MIXER),
            TensorSpec(f"{name}_gate", (size, self.hidden_size), Unit.MIXER),
            TensorSpec(f"{name}_position", (self.rate, size), Unit.MIXER),
            TensorSpec(f"{name}_norm", (key_size,), Unit.MIXER),
        )

    def _index_tensors(self) -> tuple[TensorSpec, ...]:
        if self.indexer is None:
            return ()
        return (
            *self._compressor("index", self.indexer.head_dim, self.index_size),
            TensorSpec("index_query", (self.indexer.query_size, self.query_rank), Unit.MIXER),
            TensorSpec("index_weights", (self.indexer.num_heads, self.hidden_size), Unit.MIXER),
        )

    @property
    def projection_parameters(self) -> int:
        """Parameters of all matrices before attention."""
        after = {"output_down", "output", "attention_streams"}
        matrices = (tensor for tensor in self.tensors if len(tensor.shape) == 2 and tensor.name not in after)
        return sum(tensor.parameters for tensor in matrices if not tensor.name.endswith("_position"))

    @property
    def output_parameters(self) -> int:
        """Parameters of both steps of the output projection."""
        return self.output_rank * (self.query_size + self.output_groups * self.hidden_size)

    @property
    def flops_per_context_token(self) -> int:
        """Two products, of 2 FLOPs for each element of the queries."""
        return 4 * self.query_size

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """What weights and norms the tokens that are compressed, and sinks."""
        return "sinks", "compressed_position", "compressed_norm", "index_position", "index_norm"

    def _compressed(self, context: Number) -> Number:
        """Compressed keys that attention sees of so many tokens."""
        keys = context / self.rate
        return self.indexer.chosen(keys) if self.indexer else keys

    def seen(self, context: Number) -> Number:
        """The newest tokens and the compressed keys."""
        if not self.rate:
            return self.reach(context)
        return minimum(context, self.local_window) + self._compressed(context)

    def mean_seen(self, prompt_len: Number) -> Number:
        """The same as a mean over a prompt: each part grows to its bound."""
        if not self.rate:
            return super().mean_seen(prompt_len)
        newest, keys = minimum(prompt_len, self.local_window), self._compressed(prompt_len)
        return newest - newest * newest / (2 * prompt_len) + keys - keys * keys * self.rate / (2 * prompt_len)

    def choose(self, formats: Formats, tokens: Number, context: Number) -> tuple[Kernel, ...]:
        """The scores of an indexer over compressed keys."""
        return self.indexer.score(formats, tokens, context / self.rate) if self.indexer else ()

    def attended_bytes(self, formats: Formats, requests: Number, context: Number) -> Number:
        """The keys that attention sees, and those of an indexer."""
        seen = self.seen(context) * formats.kv_cache.row_bytes((self.head_dim,))
        index = context / self.rate * formats.kv_cache.row_bytes((self.indexer.head_dim,)) if self.indexer else 0
        return requests * (seen + index)

    @property
    def sent_elements(self) -> int:
        """Queries, a key, what is compressed with its gates, and an indexer's queries and weights."""
        index = self.indexer.query_size + self.indexer.num_heads if self.indexer else 0
        return self.query_size + self.head_dim + 2 * (self.compressed_size + self.index_size) + index

    def sent_bytes(self, formats: Formats) -> int:
        """All that is projected, as it is computed."""
        return formats.compute.bytes_of(self.sent_elements)

    def project(self, formats: Formats, tokens: Number) -> Operator:
        """Mixing the streams, norm, projections and rotary embedding of so many tokens."""
        return mix_streams(self.streams, self.hidden_size, formats, tokens) + super().project(formats, tokens)

    def finish(self, formats: Formats, tokens: Number) -> Operator:
        """Both steps of the output projection, with the norm after them."""
        touched = self.query_size + 2 * self.output_groups * self.output_rank + self.hidden_size
        return Operator((gemms(tokens, self.output_parameters, touched, formats),)) + FINISHING

    @property
    def kept_elements(self) -> int:
        """All that is projected, and attention output."""
        return self.sent_elements + self.returned_elements

    def temporary_bytes(self, compute: Format) -> int:
        """What the rotary embedding needs, and a second attention output."""
        rotated = compute.bytes_of(self.query_size + self.head_dim) // 2
        rotary = rotated + 4 * self.head_dim + compute.bytes_of(self.head_dim)
        return max(rotary, compute.bytes_of(self.returned_elements))

    def prefix_read_bytes(self, formats: Formats) -> int:
        """Keys as they lie in the cache, or as the numbers that its codes mean."""
        return formats.numbers_bytes((self.head_dim,))

    def prefix_bytes(self, formats: Formats) -> int:
        """What is cached of a token, in numbers."""
        return formats.numbers_bytes(self.cached_parts)

    @property
    def prefix_in_cache(self) -> bool:
        """Keys are needed as they are cached, but in a window in their order."""
        return not self.window

    def obstacle_to(self, ranks: int) -> str:
        """Groups of heads are divided."""
        groups = self.output_groups
        return f"its {groups} groups of heads cannot be divided by {ranks}" if groups % ranks else ""

    def shares(self, ranks: int, whole: int) -> dict[str, int]:  # noqa: ARG002 - others need it
        """Groups of heads; every GPU needs all keys."""
        return {"num_heads": self.num_heads // ranks, "output_groups": self.output_groups // ranks}
