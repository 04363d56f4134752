// Latent attention in its absorbed form: a row of the cache is every head's key, and its first `rank`
// elements are every head's value. So each tile of the cache is a factor of two products of matrices.
#pragma once

#include "attention.hpp"
#include "gemm.hpp"
#include "latent_tiles.hpp"

namespace {

using native::Latent;

// Call work<NUM>(row) for all of so many rows, MOST of them at a time or fewer, about as many each time.
template <int MOST, typename Work>
void in_blocks(int64_t rows, const Work& work) {
    const auto call = [&]<int NUM>(const auto& self, int64_t row, int64_t num) {
        if constexpr (NUM > 1) {
            if (num < NUM) return self.template operator()<NUM - 1>(self, row, num);
        }
        work.template operator()<NUM>(row);
    };
    const int64_t blocks = (rows + MOST - 1) / MOST;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block * rows / blocks;
        call.template operator()<MOST>(call, row, (block + 1) * rows / blocks - row);
    }
}

// Add a tile's weighted values of all heads, whose values are the same.
template <typename T>
void add_shared_values(
    const Heads& shape, const TokenTile& tile, const T* values, float* summed) {
    using C = Columns<T>;
    constexpr int COUNT = GEMM_ROWS / C::VECTORS;
    const int64_t rank = shape.head_dim;
    const auto as_is = [](const T* from) { return from; };
    int64_t column = 0;
    for (; column + COUNT * C::WIDTH <= rank; column += COUNT * C::WIDTH) {
        in_blocks<GEMM_TOKENS>(shape.heads, [&]<int NUM>(int64_t head) {
            add_columns<T, NUM, COUNT>(shape, tile, values, summed, head, column, as_is);
        });
    }
    for (; column < rank; column += C::WIDTH) {
        Padded<T, C::WIDTH> padded;
        const int64_t rest = rank - column, width = rest < C::WIDTH ? rest : C::WIDTH;
        const auto part = [&](const T* from) { return padded.from(from, width); };
        in_blocks<GEMM_TOKENS>(shape.heads, [&]<int NUM>(int64_t head) {
            add_columns<T, NUM, 1>(shape, tile, values, summed, head, column, part);
        });
    }
}

// Queries of one head of all requests, multiplied with the rows that project its keys up: they are
// the weights, and those rows the values, of a sum. The rotary parts come after it as they are.
template <typename T>
void absorb(const Latent& shape, int64_t head, const void* following, float* scratch) {
    const Heads sums{shape.requests, 1, shape.rank, native::padded_rank(shape), shape.rank,
                     shape.nope, 1.0f, 0.0f, nullptr};
    const int64_t requests = padded_heads(sums);
    const T* nopes = static_cast<const T*>(shape.q_nope) + head * shape.nope_head_stride;
    const T* ropes = static_cast<const T*>(shape.q_rope) + head * shape.rope_head_stride;
    float* const factors = scratch;
    float* const weights = factors + requests;
    float* const summed = weights + native::rounded_up(shape.nope, 2) * requests;
    std::memset(scratch, 0, (summed - scratch + sums.heads * sums.padded_dim) * sizeof(float));
    for (int64_t r = 0; r < shape.requests; ++r) {
        const T* const nope = nopes + r * shape.nope_stride;
        for (int64_t n = 0; n < shape.nope; ++n) weights[n * requests + r] = widened(nope[n]);
    }
    constexpr int TOKENS = Columns<T>::TOKENS;
    for (int64_t n = 0; n < shape.nope; n += TOKENS) {
        for (int64_t r = 0; r < requests; r += LANES) {
            float* const row = weights + n * requests + r;
            Floats taken[TOKENS];
            UNROLL
            for (int next = 0; next < TOKENS; ++next) taken[next] = widen(row + next * requests);
            Columns<T>::put(row, taken, zeros());
        }
    }
    const T* const up = static_cast<const T*>(shape.kv_up);
    const int64_t head_elements = (shape.nope + shape.value_dim) * shape.rank;
    Fetcher fetcher(following);
    const TokenTile tile = {shape.nope, weights, factors, fetcher, shape.requests};
    add_shared_values(sums, tile, up + head * head_elements, summed);
    const int64_t width = shape.rank + shape.rope;
    for (int64_t r = 0; r < shape.requests; ++r) {
        T* const row = static_cast<T*>(shape.absorbed) + (r * shape.heads + head) * width;
        put_means(summed + r * sums.padded_dim, 1.0f, 1.0f, shape.rank, row);
        std::memcpy(row + shape.rank, ropes + r * shape.rope_stride, shape.rope * sizeof(T));
    }
}

// Logits of heads from `head` on, whose queries are the rows of a matrix, for a tile's tokens. `room` is for
// GEMM_TOKENS rows of the cache. Half of what comes next is fetched meanwhile, and half with the values.
template <typename T>
void add_shared_scores(
    const Heads& shape, const TokenTile& tile, const T* queries, const T* rows, int64_t head, float* room) {
    const int64_t dim = shape.head_dim, padded = padded_heads(shape);
    const bool in_place = Dot<T>::IN_PLACE && dim % Dot<T>::STEP == 0;
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
    for (int64_t first = 0; first < tile.tokens; first += GEMM_TOKENS) {
        const int64_t rest = tile.tokens - first;
        const int count = static_cast<int>(rest < GEMM_TOKENS ? rest : GEMM_TOKENS);
        const float* tokens[GEMM_TOKENS];
        for (int t = 0; t < count; ++t) {
            const T* const row = rows + (first + t) * dim;
            tokens[t] = in_place ? reinterpret_cast<const float*>(row) : room + t * shape.padded_dim;
            if (!in_place) Dot<T>::prepare(row, dim, room + t * shape.padded_dim);
        }
        for (int64_t h = head; h < shape.heads;) {
            const int together = h + GEMM_ROWS <= shape.heads ? GEMM_ROWS : 1;
            const Tile<T> work = {
                queries + h * dim, dim, dim, nullptr, 0, tokens,
                tile.scores + first * padded + h, padded,
            };
            multiply_rows(work, together, count, 0);
            tile.fetcher.fetch(count * row_bytes * together / tile.parts);
            h += together;
        }
    }
}

// Call work<NUM>(head) for the heads that are multiplied with a key together, 16 or 8 of them; returns the next.
template <typename T, typename Work>
int64_t for_heads_together(const Heads& shape, const Work& work) {
    int64_t next = 0;
    if constexpr (ARE_TOGETHER<T>) {
        if (shape.head_dim % TOGETHER_UNIT != 0) return 0;
        for_heads<16>(shape, [&]<int NUM>(int64_t, int64_t head) {
            if constexpr (NUM >= 8) {
                work.template operator()<NUM>(head);
                next = head + NUM;
            }
        });
    }
    return next;
}

// As `attend`, with the heads' absorbed queries one after the other at `query_rows`.
template <typename T>
void attend_latent(
    const Heads& shape, const void* query_rows, const void* first_token, int64_t tokens,
    const void* following, float* state_memory, float* scratch) {
    const char* cache = static_cast<const char*>(first_token);
    const T* const queries = static_cast<const T*>(query_rows);
    if constexpr (TILED<T>) {
        if (shape.is_tiled) {
            return attend_latent_by_tiles(shape, queries, cache, tokens, following, state_memory, scratch);
        }
    }
    const State state(shape, state_memory);
    begin(shape, state);
    Heads keyed = shape;
    keyed.head_dim = shape.token_elements;
    keyed.padded_dim = native::rounded_up(shape.token_elements, native::ACCUMULATOR_UNIT);
    float* const factors = scratch;
    float* const scores = factors + padded_heads(shape);
    float* const together = scores + shape.tile_tokens * padded_heads(shape);
    float* const elements = together + shape.heads * keyed.padded_dim;
    float* const room = elements + native::tile_floats(shape);
    for_heads_together<T>(keyed, [&]<int NUM>(int64_t head) {
        prepare_together<NUM>(queries + head * keyed.head_dim, keyed.head_dim, together + head * keyed.padded_dim);
    });
    for (int64_t start = 0; start < tokens; start += shape.tile_tokens) {
        const char* const here = cache + start * shape.token_bytes;
        const int64_t rest = tokens - start, most = shape.tile_tokens;
        Fetcher fetcher(rest > most ? here + most * shape.token_bytes : following, narrower<T>(shape.coded));
        const TokenTile tile = {
            rest < most ? rest : most, scores, factors, fetcher, 2 * shape.heads};
        const T* const rows = rows_of<T>(shape.coded, here, tile.tokens, elements);
        std::memset(scores, 0, tile.tokens * padded_heads(shape) * sizeof(float));
        int64_t head = 0;
        for (int64_t first = 0; first < tile.tokens; first += native::TILE_UNIT) {
            head = for_heads_together<T>(keyed, [&]<int NUM>(int64_t from) {
                add_scores_together<NUM>(keyed, tile, rows, together, from, first);
            });
        }
        if (head < shape.heads) add_shared_scores(keyed, tile, queries, rows, head, room);
        weigh<T>(shape, tile, state);
        add_shared_values(shape, tile, rows, state.values);
    }
}

}  // namespace
