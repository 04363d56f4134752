"""Multi-head latent attention: what a token leaves in the cache, and the projections around it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from hrm.formats import Format, Formats
from hrm.layers.base import Section, Sections, TensorSpec, Unit, Vectors, check_vectors, vector_tensors
from hrm.layers.indexer import Indexer
from hrm.layers.softmax import SoftmaxAttention
from hrm.layers.work import Kernel
from hrm.numeric import Number


@final
@dataclass(frozen=True, kw_only=True)
class LatentAttention(SoftmaxAttention):
    """The ranks and heads of MLA (DeepSeek-V2, arXiv 2405.04434, §2.1).

    A token's cache is one vector of `kv_rank` elements, from which every head's keys and values
    are projected up, and beside it one rotary key of `rope_head_dim` that all heads share. Each
    head's key has `nope_head_dim` elements besides, its value `value_head_dim`. Queries go through
    `query_rank` elements, or are projected directly if it is 0.

    In decode the projections up are absorbed (§2.1.2): applied to the new token's queries and
    outputs instead of the cache, so that every head scores the cached elements and sums the
    compressed ones. Prefill expands the cache to keys and values of all heads.

    With an `indexer` attention sees the tokens that this chooses only (DeepSeek-V3.2, arXiv
    2512.02556). With `output_gate` a sigmoid of a projection as wide scales the output (Kimi-K3).
    """

    hidden_size: int
    num_heads: int
    kv_rank: int
    rope_head_dim: int
    nope_head_dim: int
    value_head_dim: int
    query_rank: int = 0
    window: int = 0
    output_gate: bool = False
    indexer: Indexer | None = None
    vectors: Vectors = ()
    block: Literal["latent_attention"] = "latent_attention"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "num_heads", "kv_rank", "rope_head_dim", "nope_head_dim", "value_head_dim")
        self.check_sizes("query_rank", "window", at_least=0)
        check_vectors("vectors", self.vectors)
        ranked = self.indexer is None or self.indexer.shared or self.query_rank > 0
        self.require(ranked, "query_rank", "must be there for an indexer, whose queries are made of it")

    @property
    def words(self) -> str:
        """What it is, for people."""
        queries = f"queries through {self.query_rank}" if self.query_rank else "queries direct"
        return (
            f"latent: {self.num_heads} heads of {self.nope_head_dim} + {self.rope_head_dim} rotary,"
            f" values {self.value_head_dim}; cached {self.kv_rank} + {self.rope_head_dim};"
            f" {queries}{', gated' if self.output_gate else ''}" + (f"; {self.indexer.words}" if self.indexer else "")
        )

    @property
    def head_dim(self) -> int:
        """Elements of one head's query, and of its key when projected up."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def query_size(self) -> int:
        """Elements of one token's queries: heads × head_dim."""
        return self.num_heads * self.head_dim

    @property
    def attended_elements(self) -> int:
        """The compressed vector and the rotary key."""
        return self.kv_rank + self.rope_head_dim

    @property
    def cached_elements(self) -> int:
        """These, and the key of an indexer."""
        return self.attended_elements + (self.indexer.cached_elements if self.indexer else 0)

    @property
    def attended_parts(self) -> tuple[int, ...]:
        """The compressed vector and the rotary key."""
        return self.kv_rank, self.rope_head_dim

    @property
    def cached_parts(self) -> tuple[int, ...]:
        """These, and the key of an indexer."""
        return self.attended_parts + (self.indexer.cached_parts if self.indexer else ())

    @property
    def held_elements(self) -> int:
        """The gate, if there is one."""
        return self.output_gate * self.returned_elements

    @property
    def sent_elements(self) -> int:
        """Queries, those of an indexer, and what is cached."""
        return super().sent_elements + (self.indexer.query_size if self.indexer else 0)

    def seen(self, context: Number) -> Number:
        """The tokens that an indexer chooses, or all."""
        reached = self.reach(context)
        return self.indexer.chosen(reached) if self.indexer else reached

    def choose(self, formats: Formats, tokens: Number, context: Number) -> tuple[Kernel, ...]:
        """The scores of an indexer."""
        return self.indexer.score(formats, tokens, context) if self.indexer else ()

    def attended_bytes(self, formats: Formats, requests: Number, context: Number) -> Number:
        """The keys of an indexer, and of the tokens that it chooses the rest."""
        if not self.indexer:
            return super().attended_bytes(formats, requests, context)
        chosen = self.seen(context) * formats.kv_cache.row_bytes(self.attended_parts)
        return requests * (chosen + context * formats.kv_cache.row_bytes(self.indexer.cached_parts))

    @property
    def returned_elements(self) -> int:
        """A value of every head."""
        return self.num_heads * self.value_head_dim

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Norm, queries, what is cached, what projects it up, and the output projection."""
        hidden, heads, rank = self.hidden_size, self.num_heads, self.query_rank
        queries = (
            (
                TensorSpec("query_down", (rank, hidden), Unit.MIXER),
                TensorSpec("query_norm", (rank,), Unit.MIXER),
                TensorSpec("query_up", (self.query_size, rank), Unit.MIXER, 0),
            )
            if rank
            else (TensorSpec("query", (self.query_size, hidden), Unit.MIXER, 0),)
        )
        up_size = heads * (self.nope_head_dim + self.value_head_dim)
        return (
            TensorSpec("attention_norm", (hidden,), Unit.MIXER),
            *queries,
            TensorSpec("kv_down", (self.attended_elements, hidden), Unit.MIXER),
            TensorSpec("kv_norm", (self.kv_rank,), Unit.MIXER),
            TensorSpec("kv_up", (up_size, self.kv_rank), Unit.MIXER, 0),
            TensorSpec("output", (hidden, self.returned_elements), Unit.MIXER, 1),
            *((TensorSpec("gate", (self.returned_elements, hidden), Unit.MIXER, 0),) if self.output_gate else ()),
            *(self.indexer.tensors(hidden, rank) if self.indexer else ()),
            *vector_tensors(self.vectors, Unit.MIXER),
        )

    @property
    def projection_parameters(self) -> int:
        """Parameters of the projections to queries and to what is cached, with norms between."""
        names = {"query", "query_down", "query_norm", "query_up", "kv_down", "kv_norm", "gate"}
        names |= {"index_query", "index_key", "index_weights"}
        return sum(tensor.parameters for tensor in self.tensors if tensor.name in names)

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """What projects cached vectors up, for it is applied to queries and outputs there."""
        return ("kv_up",)

    @property
    def up_parameters(self) -> int:
        """Parameters of what projects cached vectors up to keys and values of all heads."""
        return self.host_parameters

    @property
    def flops_per_context_token(self) -> int:
        """FLOPs over one cached token in the absorbed form."""
        return 2 * self.num_heads * (self.attended_elements + self.kv_rank)

    @property
    def expanded_elements(self) -> int:
        """Elements of one token's keys and values of all heads, as prefill expands the cache."""
        return self.query_size + self.returned_elements

    @property
    def kept_elements(self) -> int:
        """Queries, gate, the cached vector, attention output, and the keys and values expanded from it."""
        return self.sent_elements + self.held_elements + self.returned_elements + self.expanded_elements

    def temporary_bytes(self, compute: Format) -> int:
        """What the projections down or the rotary embedding need, and an attention output as wide as queries."""
        down = compute.bytes_of(self.hidden_size + self.query_rank) + 4 * (max(self.query_rank, self.kv_rank) + 1)
        rotated = compute.bytes_of(self.query_size + self.cached_elements // 2) // 2
        rotary = rotated + 4 * self.head_dim + compute.bytes_of(self.head_dim)
        return max(down, rotary, compute.bytes_of(max(self.query_size, self.returned_elements)))

    def prefix_read_bytes(self, formats: Formats) -> int:
        """Keys and values that the cache was expanded to."""
        return formats.compute.bytes_of(self.expanded_elements)

    @property
    def prefix_in_cache(self) -> bool:
        """The cache is no place for the keys and values that it is expanded to."""
        return False

    def obstacle_to(self, ranks: int) -> str:
        """Heads are divided."""
        return f"its {self.num_heads} heads cannot be divided by {ranks}" if self.num_heads % ranks else ""

    def shares(self, ranks: int, whole: int) -> dict[str, int]:  # noqa: ARG002 - others need it
        """Heads; every GPU needs the whole compressed vector."""
        return {"num_heads": self.num_heads // ranks}

    @property
    def sections(self) -> Mapping[str, Sections]:
        """A gate of every head."""
        return {"head_gate": (Section(self.num_heads, self.hidden_size),)}
