"""Grouped-query attention, over all tokens or within a window."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from hrm.formats import Format, Formats
from hrm.layers.base import Section, Sections, TensorSpec, Unit, Vectors, check_vectors, vector_tensors
from hrm.layers.softmax import SoftmaxAttention


@final
@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention(SoftmaxAttention):
    """Query heads that share fewer key and value heads.

    With `output_gate` queries are projected twice as wide: a sigmoid of the other half, which stays
    where it is computed, scales the attention output (Qwen3-Next). With `values_from_keys` one
    projection gives both keys and values, which then differ by their norms and rotation (Gemma-4).
    Heads of values have `value_head_dim` elements, or as many as those of keys if it is 0 (MiMo-V2).
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    output_gate: bool = False
    values_from_keys: bool = False
    value_head_dim: int = 0
    vectors: Vectors = ()
    block: Literal["grouped_query_attention"] = "grouped_query_attention"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "num_heads", "num_kv_heads", "head_dim")
        self.check_sizes("window", "value_head_dim", at_least=0)
        self.require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"must divide num_heads {self.num_heads}")
        check_vectors("vectors", self.vectors)

    @property
    def words(self) -> str:
        """What it is, for people."""
        kind = "multi-head" if self.num_kv_heads == self.num_heads else "grouped-query"
        gate = ", gated" if self.output_gate else ""
        return f"{kind}: {self.num_heads} query heads on {self.num_kv_heads} of {self.head_dim}{gate}"

    @property
    def query_size(self) -> int:
        """Elements of one token's queries: heads × head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys."""
        return self.num_kv_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Elements of one token's values."""
        return self.num_kv_heads * (self.value_head_dim or self.head_dim)

    @property
    def cached_shape(self) -> tuple[int, int, int]:
        """How a token lies in the cache: its keys, head by head, and then its values."""
        return 2, self.num_kv_heads, self.head_dim

    @property
    def cached_elements(self) -> int:
        """Keys and values."""
        return self.kv_size + self.value_size

    @property
    def cached_parts(self) -> tuple[int, ...]:
        """Keys head by head, and then values."""
        return (self.head_dim,) * self.num_kv_heads + (self.value_head_dim or self.head_dim,) * self.num_kv_heads

    @property
    def returned_elements(self) -> int:
        """A value for every query head."""
        return self.num_heads * (self.value_head_dim or self.head_dim)

    @property
    def held_elements(self) -> int:
        """The gate, if there is one."""
        return self.output_gate * self.query_size

    @property
    def projected_size(self) -> int:
        """Elements of one token's queries, gate, keys and values, as the projections give them."""
        return sum(self._projected_parts)

    @property
    def _projected_parts(self) -> tuple[int, ...]:
        values = () if self.values_from_keys else (self.value_size,)
        return (*(1 + self.output_gate) * (self.query_size,), self.kv_size, *values)

    @property
    def projection_parameters(self) -> int:
        """Parameters of the projections to queries, gate, keys and values."""
        return self.hidden_size * self.projected_size

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The norm, one matrix to queries, gate, keys and values, and the output projection."""
        parts = self._projected_parts
        return (
            TensorSpec("attention_norm", (self.hidden_size,), Unit.MIXER),
            TensorSpec("qkv", (sum(parts), self.hidden_size), Unit.MIXER, 0, parts),
            TensorSpec("output", (self.hidden_size, self.returned_elements), Unit.MIXER, 1),
            *vector_tensors(self.vectors, Unit.MIXER),
        )

    @property
    def flops_per_context_token(self) -> int:
        """Two products, of 2 FLOPs for each element of the queries and of the output."""
        return 2 * (self.query_size + self.returned_elements)

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """What a head's softmax sums up beside the scores of tokens, where there is such."""
        return ("sinks",)

    @property
    def kept_elements(self) -> int:
        """Queries, gate, keys, values and attention output."""
        return (1 + self.output_gate) * self.query_size + self.cached_elements + self.returned_elements

    def temporary_bytes(self, compute: Format) -> int:
        """What the rotary embedding needs, a norm of heads or a scale of queries, and a second attention output."""
        rotated = compute.bytes_of(self.query_size + self.kv_size) // 2
        rotary = rotated + 4 * self.head_dim + compute.bytes_of(self.head_dim)
        normed = 4 * (self.query_size + self.num_heads)
        return max(rotary, normed, compute.bytes_of(self.returned_elements))

    def prefix_read_bytes(self, formats: Formats) -> int:
        """Keys and values as they lie in the cache, or as the numbers that its codes mean."""
        return formats.numbers_bytes(self.cached_parts)

    @property
    def prefix_in_cache(self) -> bool:
        """Keys and values are needed as they are cached, but in a window in their order."""
        return not self.window

    def obstacle_to(self, ranks: int) -> str:
        """Heads are divided, and those of keys and values repeated where they are fewer than GPUs."""
        few, many = sorted((self.num_kv_heads, ranks))
        if self.num_heads % ranks:
            return f"its {self.num_heads} heads cannot be divided by {ranks}"
        return f"its {self.num_kv_heads} key and value heads cannot be divided by {ranks}" if many % few else ""

    def shares(self, ranks: int, whole: int) -> dict[str, int]:  # noqa: ARG002 - others need it
        """Heads, at least one of keys and values."""
        return {"num_heads": self.num_heads // ranks, "num_kv_heads": max(1, self.num_kv_heads // ranks)}

    @property
    def sections(self) -> Mapping[str, Sections]:
        """What goes with heads; norms of queries and keys only where they are of all heads together."""
        queries, keys = Section(self.num_heads, self.head_dim), Section(self.num_kv_heads, self.head_dim)
        values = () if self.values_from_keys else (Section(self.num_kv_heads, self.value_head_dim or self.head_dim),)
        return {
            "qkv": (*(1 + self.output_gate) * (queries,), keys, *values),
            "qkv_bias": (queries, keys, *values),  # the gate's is another
            "gate_bias": (queries,),
            "query_norm": (queries,),
            "key_norm": (keys,),
            "sinks": (Section(self.num_heads),),
            "head_gate": (Section(self.num_heads, self.hidden_size),),
        }
