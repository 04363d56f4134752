"""Chunks that are as long as what else the memories must hold allows.

Where the host is full, a larger batch demands more resident experts, for which the GPU has room only beside
shorter chunks. So the longest chunk follows from the batch, as residents follow from both.
"""

import numpy as np

from hrm.search.fit import Ints, Weights, gpu_needed, host_purposes
from hrm.search.grid import Grid, make_grid
from hrm.search.lattice import ChunkRange, with_most_residents
from hrm.search.space import Kind, Space


def with_longest_chunks(space: Space, kind: Kind, chunks: ChunkRange, places: Ints) -> Grid:
    """The places, each once, with the longest of the chunks that fit beside as few residents as may be, or beside all.

    As many stay as then fit.
    """
    places = with_most_residents(places, chunks.most)
    grid = make_grid(space, kind, places)
    found = grid.take(np.flatnonzero(grid.fits))
    for residents in (0, space.everything) if space.profile.has_accelerator else ():
        found = found.and_also(_shortened(space, grid, chunks.least, residents))
    return found


def _shortened(space: Space, grid: Grid, least: int, residents: int) -> Grid:
    """The candidates with the longest chunks beside at least so many residents, if there are any of `least` tokens."""
    too_long = (~grid.fits | (grid.resident_total < residents)) & (grid.chunk_tokens > least)
    grid = grid.take(np.flatnonzero(too_long))
    if not len(grid):
        return grid
    # Bytes are lines in the chunk between these.
    ends = least, grid.chunk_tokens
    bends = [np.clip(bend, *ends) for bend in (grid.micro_batch_size, grid.batch_size)]
    tokens = np.sort(np.stack([np.full(len(grid), least), *bends, grid.chunk_tokens]), axis=0)
    each = grid.take(np.tile(np.arange(len(grid)), len(tokens)))
    left = _left(space, each, tokens.ravel(), residents).reshape(tokens.shape)
    shortest_fits = np.flatnonzero(left[0] >= 0)
    grid, tokens, left = grid.take(shortest_fits), tokens[:, shortest_fits], left[:, shortest_fits]
    columns = np.arange(len(grid))
    line = (left[1:-1] >= 0).sum(axis=0)  # on which room ends, or the last
    near, far = (line, columns), (line + 1, columns)
    share = np.clip(left[near] / np.maximum(left[near] - left[far], 1), 0, 1)
    return grid.with_chunks(space, tokens[near] + (share * (tokens[far] - tokens[near])).astype(np.int64))


def _left(space: Space, grid: Grid, chunk_tokens: Ints, least: int) -> Ints:
    """Bytes that the GPU has left beside the fewest residents from `least` on with which the host holds the rest.

    They are negative where it lacks some, or where not even all of the experts as residents would do.
    """
    weights, kind, dense = Weights(space), grid.kind, grid.resident_dense
    numbers = grid.numbers() | {"chunk_tokens": chunk_tokens}
    purposes = host_purposes(space, kind, numbers, host_bytes=weights.on_host(dense, 0), page_bytes=0)
    lacking = sum(purposes.values()) - space.profile.host.usable_bytes
    # Where the host holds a part of a chunk, what it lacks is no line in the chunk: one more at most.
    residents = np.maximum(-(-lacking // weights.expert_bytes) + (1 - grid.gpu_prefill_ffn), least)
    of_every_layer = residents // space.spec.num_expert_layers
    largest = np.maximum(*weights.largest_streamed(dense, of_every_layer, grid.gpu_prefill_ffn))
    held = weights.resident(dense, residents)
    needed = gpu_needed(space, kind, numbers, resident_bytes=held, max_streamed_bytes=largest)
    return np.where(residents > space.everything, -1, space.profile.top.usable_bytes - needed)
