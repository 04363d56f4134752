"""Multi-head latent attention: what a token leaves in the cache, and the projections around it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """The ranks and heads of MLA (DeepSeek-V2, arXiv 2405.04434, §2.1).

    A token's cache is one vector of `kv_rank` elements, from which every head's keys and values
    are projected up, and beside it one rotary key of `rope_head_dim` that all heads share. Each
    head's key has `nope_head_dim` elements besides, its value `value_head_dim`. Queries go through
    `query_rank` elements, or are projected directly if it is 0.
    """

    kv_rank: int
    rope_head_dim: int
    nope_head_dim: int
    value_head_dim: int
    query_rank: int = 0

    @property
    def query_head_dim(self) -> int:
        """Elements of one head's query, and of its key when projected up."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def cached_elements(self) -> int:
        """Elements that one token adds to one layer's cache."""
        return self.kv_rank + self.rope_head_dim

    def projection_parameters(self, hidden_size: int, num_heads: int) -> int:
        """Parameters from a hidden state to queries and to what is cached, with the norms between.

        What projects the cached vector up is in `up_parameters`.
        """
        queries = num_heads * self.query_head_dim
        if self.query_rank:
            query = self.query_rank * (hidden_size + 1 + queries)
        else:
            query = hidden_size * queries
        return query + hidden_size * self.cached_elements + self.kv_rank

    def up_parameters(self, num_heads: int) -> int:
        """Parameters that project a cached vector up to the keys and values of all heads."""
        return self.kv_rank * num_heads * (self.nope_head_dim + self.value_head_dim)

    def absorbed_flops_per_context_token(self, num_heads: int) -> int:
        """FLOPs of decode attention over one cached token, up-projections absorbed (§2.1.2).

        They are applied to the new token's queries and outputs instead, so that every head scores
        the cached elements and sums the compressed ones.
        """
        return 2 * num_heads * (self.cached_elements + self.kv_rank)
