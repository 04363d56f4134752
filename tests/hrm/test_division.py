"""Which rows and columns of a layer's tensors each of several ranks has, of all kinds of blocks."""

from collections import Counter
from collections.abc import Iterator

import pytest

from hrm.layers import (
    CompressedAttention,
    DenseFfn,
    GatedDeltaNet,
    GroupedQueryAttention,
    KimiDelta,
    LatentAttention,
    Layer,
    Mamba,
    Mamba2,
    Mixer,
    RoutedExperts,
    TensorShare,
    layer_shares,
    tensor_share,
)
from tests.hrm.support import tiny_spec

D = 32
EXPERTS = RoutedExperts(
    hidden_size=D,
    num_experts=4,
    experts_per_token=2,
    intermediate_size=24,
    shared_intermediate_size=20,
    vectors=(("score_correction", 4), ("shared_w13_bias", 40), ("shared_w2_bias", D)),
    expert_vectors=(("w13_bias", 48), ("w2_bias", D)),
)
GATED = GroupedQueryAttention(
    hidden_size=D, num_heads=8, num_kv_heads=4, head_dim=6, output_gate=True, value_head_dim=5
)
DELTA = GatedDeltaNet(hidden_size=D, num_key_heads=4, num_value_heads=8, key_head_dim=3, value_head_dim=5)
MAMBA2 = Mamba2(hidden_size=D, num_heads=8, head_dim=3, state_size=5, num_groups=4)
KIMI = KimiDelta(hidden_size=D, num_heads=4, head_dim=6, decay_rank=5)
MIXERS = {
    "gated": GATED,
    "values from keys": GroupedQueryAttention(
        hidden_size=D, num_heads=8, num_kv_heads=4, head_dim=6, values_from_keys=True
    ).with_vectors(qkv_bias=8 * 6 + 4 * 6, output_bias=D, sinks=8, query_norm=8 * 6, key_norm=4 * 6),
    "delta": DELTA.with_vectors(projections_bias=DELTA.projected_size),
    "mamba2": MAMBA2.with_vectors(convolution_bias=MAMBA2.convolved_elements, output_bias=D),
    "kimi": KIMI,
    "mamba": Mamba(hidden_size=D, inner_size=24, state_size=5, step_rank=3),
    "latent": LatentAttention(
        hidden_size=D, num_heads=4, kv_rank=16, rope_head_dim=4, nope_head_dim=6, value_head_dim=5, query_rank=10
    ),
    "compressed": CompressedAttention(
        hidden_size=D, num_heads=8, head_dim=6, query_rank=10, output_groups=4, output_rank=5, rate=4, local_window=8
    ),
}


def heads(count: int, size: int = 1) -> list[float]:
    """Of so many heads of that many rows, how far through the heads each row is."""
    return [head / count for head in range(count) for _ in range(size)]


# Whose rows lie beside one another.
JOINED = {
    "gated": {"qkv": [*heads(8, 6), *heads(8, 6), *heads(4, 6), *heads(4, 5)]},
    "delta": {
        "projections": [*heads(4, 3), *heads(4, 3), *heads(8, 5), *heads(8, 5), *heads(8), *heads(8)],
        "projections_bias": [*heads(4, 3), *heads(4, 3), *heads(8, 5), *heads(8, 5), *heads(8), *heads(8)],
        "convolution": [*heads(4, 3), *heads(4, 3), *heads(8, 5)],
    },
    "mamba2": {
        "projections": [*heads(8, 3), *heads(8, 3), *heads(4, 5), *heads(4, 5), *heads(8)],
        "convolution_bias": [*heads(8, 3), *heads(4, 5), *heads(4, 5)],
        "output_norm": heads(8, 3),
    },
    "kimi": {"qkv": 3 * heads(4, 6), "convolution": 3 * heads(4, 6), "decay_scale": heads(4)},
}


def rows_of(share: TensorShare) -> Iterator[int]:
    return (span.start + i for span in share.rows for i in range(span.size))


def owners(shares: list[TensorShare], rows: int) -> list[list[int]]:
    """The ranks that have each row."""
    found = [list[int]() for _ in range(rows)]
    for rank, share in enumerate(shares):
        for row in rows_of(share):
            found[row].append(rank)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_ranks_have_everything_once(name: str, ranks: int) -> None:
    layer = Layer(mixer=MIXERS[name], ffn=(EXPERTS, DenseFfn(hidden_size=D, intermediate_size=12)))
    narrow = layer.of_rank(ranks)
    shares = [layer_shares(layer, narrow, rank, ranks) for rank in range(ranks)]
    for tensor, part in zip(layer.tensors, narrow.tensors, strict=True):
        ours, rows = [each[tensor.name] for each in shares], tensor.shape[0]
        assert all(sum(span.room for span in share.rows) == part.shape[0] for share in ours)
        counts = Counter(row for share in ours for row in rows_of(share))
        columns = Counter(share.columns.start + i for share in ours for i in range(share.columns.size))
        if tensor.name in {"output_bias", "w2_bias", "shared_w2_bias"}:
            assert counts == dict.fromkeys(range(D), 1), "else the sum would have it several times"
            assert [*rows_of(ours[0])] == [*range(D)]
        elif tensor.shape == part.shape:
            assert counts == dict.fromkeys(range(rows), ranks)
        elif tensor.shape[1:] != part.shape[1:]:
            assert columns == dict.fromkeys(range(tensor.parameters // rows), 1)
        else:
            assert counts == dict.fromkeys(range(rows), 1)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", JOINED)
def test_a_rank_has_whole_heads_of_everything_that_is_joined(name: str, ranks: int) -> None:
    layer = Layer(mixer=MIXERS[name], ffn=(EXPERTS,))
    shares = [layer_shares(layer, layer.of_rank(ranks), rank, ranks) for rank in range(ranks)]
    for tensor, places in JOINED[name].items():
        found = owners([each[tensor] for each in shares], len(places))
        assert found == [[int(place * ranks)] for place in places], tensor


def test_heads_that_are_fewer_than_ranks_are_repeated_beside_their_queries() -> None:
    mixer: Mixer = GroupedQueryAttention(hidden_size=D, num_heads=8, num_kv_heads=2, head_dim=2)
    layer = Layer(mixer=mixer, ffn=(EXPERTS,))
    shares = [layer_shares(layer, layer.of_rank(4), rank, 4)["qkv"] for rank in range(4)]
    found = owners(shares, mixer.query_size + 8)
    assert found[: mixer.query_size] == [[rank] for rank in range(4) for _ in range(4)]
    assert found[mixer.query_size :] == 2 * [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_what_is_left_of_whole_groups_goes_to_the_first_ranks() -> None:
    """Widths that ranks have begin and end with groups, and what the last have more room for are noughts."""
    experts = RoutedExperts(hidden_size=D, num_experts=4, experts_per_token=2, intermediate_size=80)
    layer = Layer(mixer=GATED, ffn=(experts,), packed=(("w13", "fp8-b16"), ("w2", "fp8-b16")))
    narrow = layer.of_rank(4)
    assert dict(narrow.packed).keys() == {"w13", "w2"}
    shares = [layer_shares(layer, narrow, rank, 4) for rank in range(4)]
    assert [share["w2"].columns.size for share in shares] == [32, 32, 16, 0]
    assert [[span.start for span in share["w13"].rows] for share in shares[:3]] == [[0, 80], [32, 112], [64, 144]]
    assert {span.room for share in shares for span in share["w13"].rows} == {32}


def test_vocabularies_follow_one_another() -> None:
    spec = tiny_spec(vocab_size=50)
    narrow = spec.of_rank(4)
    for tensor, part in zip(spec.embedding_tensors, narrow.embedding_tensors, strict=True):
        shares = [tensor_share(tensor, part, rank, 4).rows[0] for rank in range(4)]
        assert [(span.start, span.size, span.room) for span in shares] == [
            (0, 13, 13),
            (13, 13, 13),
            (26, 13, 13),
            (39, 11, 13),
        ]
