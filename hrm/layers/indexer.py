"""Lightning indexers, which choose the tokens that attention sees."""

from dataclasses import dataclass

from hrm.formats import Formats
from hrm.layers.base import TensorSpec, Unit, check_size
from hrm.layers.work import Kernel
from hrm.numeric import Number, minimum


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Small heads that score all tokens, of which attention sees the best `top_k` (DeepSeek-V3.2).

    Every token has one key of `head_dim` elements in the cache for it. A `shared` one uses what that
    of an earlier layer chose, and has no weights, cache or work.
    """

    num_heads: int
    head_dim: int
    top_k: int
    shared: bool = False

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        check_size("index_n_heads", self.num_heads)
        check_size("index_head_dim", self.head_dim)
        check_size("index_topk", self.top_k)

    @property
    def words(self) -> str:
        """What it does, for people."""
        by = "an earlier layer" if self.shared else f"{self.num_heads} index heads of {self.head_dim}"
        return f"{self.top_k} tokens chosen by {by}"

    def tensors(self, hidden_size: int, query_rank: int) -> tuple[TensorSpec, ...]:
        """Queries from the compressed ones, a normed key, and a weight for every head."""
        if self.shared:
            return ()
        return (
            TensorSpec("index_query", (self.query_size, query_rank), Unit.MIXER),
            TensorSpec("index_key", (self.head_dim, hidden_size), Unit.MIXER),
            TensorSpec("index_key_norm", (self.head_dim,), Unit.MIXER),
            TensorSpec("index_key_norm_bias", (self.head_dim,), Unit.MIXER),
            TensorSpec("index_weights", (self.num_heads, hidden_size), Unit.MIXER),
        )

    @property
    def query_size(self) -> int:
        """Elements of a token's queries."""
        return 0 if self.shared else self.num_heads * self.head_dim

    @property
    def cached_elements(self) -> int:
        """A key."""
        return 0 if self.shared else self.head_dim

    @property
    def cached_parts(self) -> tuple[int, ...]:
        """It as a part of what a token caches."""
        return () if self.shared else (self.head_dim,)

    def chosen(self, context: Number) -> Number:
        """Of so many tokens, those that attention sees."""
        return minimum(context, self.top_k)

    def score(self, formats: Formats, tokens: Number, context: Number) -> tuple[Kernel, ...]:
        """Queries of so many tokens against the keys of a context, and a weighted sum over the heads."""
        if self.shared:
            return ()
        flops = tokens * context * 2 * (self.query_size + self.num_heads)
        return (Kernel(flops, tokens * context * formats.kv_cache.row_bytes(self.cached_parts), tokens, reads_kv=True),)
