// Latent attention in its absorbed form: a row of the cache is every head's key, and its first `rank`
// elements are every head's value. So each tile of the cache is a factor of two products of matrices.
#pragma once

#include "softmax.hpp"

namespace {

using native::Latent;

constexpr int SCORE_VECTORS = GEMM_ROWS;  // of heads, whose logits are summed together
constexpr int64_t SCORE_HEADS = SCORE_VECTORS * LANES;

// Call work<NUM>(row) for rows [row, end), MOST of them at a time and then fewer.
template <int MOST, typename Work>
void in_blocks(int64_t row, int64_t end, const Work& work) {
    for (; row + MOST <= end; row += MOST) work.template operator()<MOST>(row);
    if constexpr (MOST > 1) in_blocks<MOST - 1>(row, end, work);
}

inline int64_t num_blocks(int64_t rows) {
    return rows / GEMM_TOKENS + (rows % GEMM_TOKENS != 0);
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
        in_blocks<GEMM_TOKENS>(0, shape.heads, [&]<int NUM>(int64_t head) {
            add_columns<T, NUM, COUNT>(shape, tile, values, summed, head, column, as_is);
        });
    }
    for (; column < rank; column += C::WIDTH) {
        Padded<T, C::WIDTH> padded;
        const int64_t rest = rank - column, width = rest < C::WIDTH ? rest : C::WIDTH;
        const auto part = [&](const T* from) { return padded.from(from, width); };
        in_blocks<GEMM_TOKENS>(0, shape.heads, [&]<int NUM>(int64_t head) {
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
            Columns<T>::put(row, taken);
        }
    }
    const T* const up = static_cast<const T*>(shape.kv_up);
    const int64_t head_elements = (shape.nope + shape.value_dim) * shape.rank;
    Fetcher fetcher(following);
    const TokenTile tile = {shape.nope, weights, factors, fetcher, num_blocks(shape.requests)};
    add_shared_values(sums, tile, up + head * head_elements, summed);
    const int64_t width = shape.rank + shape.rope;
    for (int64_t r = 0; r < shape.requests; ++r) {
        T* const row = static_cast<T*>(shape.absorbed) + (r * shape.heads + head) * width;
        put_means(summed + r * sums.padded_dim, splat(1.0f), shape.rank, row);
        std::memcpy(row + shape.rank, ropes + r * shape.rope_stride, shape.rope * sizeof(T));
    }
}

// Elements of a row as the dot products take them: a float each, or two bfloat16 in one.
template <typename T>
int64_t units_of(int64_t elements) {
    const int64_t padded = native::rounded_up(elements, Dot<T>::STEP);
    return Dot<T>::IN_PLACE ? padded * static_cast<int64_t>(sizeof(T) / 2) / 2 : padded;
}

// Every unit of all heads' queries side by side, SCORE_HEADS heads at a time and zeros for those
// that are missing from the last vector.
template <typename T>
void put_side_by_side(const Heads& shape, const T* query, float* target, float* row_memory) {
    const int64_t dim = shape.token_elements, units = units_of<T>(dim);
    for (int64_t first = 0; first < padded_heads(shape); first += LANES) {
        for (int64_t h = 0; h < LANES; ++h) {
            float* const row = row_memory + h * units;
            if (first + h < shape.heads) {
                Dot<T>::prepare(query + (first + h) * dim, dim, row);
            } else {
                std::memset(row, 0, units * sizeof(float));
            }
        }
        const int64_t block = first / SCORE_HEADS * SCORE_HEADS;
        const int64_t rest = padded_heads(shape) - block;
        const int64_t width = rest < SCORE_HEADS ? rest : SCORE_HEADS;
        float* to = target + block * units + first - block;
        for (int64_t u = 0; u < units; ++u, to += width) {
            UNROLL
            for (int h = 0; h < LANES; ++h) to[h] = row_memory[h * units + u];
        }
    }
}

// Logits of VECTORS vectors of heads for TOKENS tokens, whose rows are `stride` floats apart, of which
// `count` are there.
template <typename T, int VECTORS, int TOKENS>
void score(
    const float* queries, int64_t units, const float* rows, int64_t stride, int count,
    float* scores, int64_t score_stride) {
    using D = Dot<T>;
    const float* tokens[TOKENS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) tokens[t] = rows + (t < count ? t : count - 1) * stride;
    Floats sums[TOKENS][VECTORS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[t][v] = zeros();
    }
    for (int64_t u = 0; u < units; ++u, queries += VECTORS * LANES) {
        typename D::Operand q[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; ++v) q[v] = (typename D::Operand)widen(queries + v * LANES);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const auto x = (typename D::Operand)splat(tokens[t][u]);
            UNROLL
            for (int v = 0; v < VECTORS; ++v) sums[t][v] = D::step(sums[t][v], q[v], x);
        }
    }
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        if (t == count) return;
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            store(scores + t * score_stride + v * LANES, sums[t][v]);
        }
    }
}

// Logits of all heads for a tile's tokens.
template <typename T>
void add_shared_scores(
    const Heads& shape, const TokenTile& tile, const float* rows, int64_t stride,
    const float* queries) {
    const int64_t units = units_of<T>(shape.token_elements), padded = padded_heads(shape);
    in_blocks<SCORE_VECTORS>(0, padded / LANES, [&]<int VECTORS>(int64_t vector) {
        constexpr int MOST = GEMM_ROWS * GEMM_TOKENS / VECTORS;
        constexpr int TOKENS = MOST < 8 ? MOST : 8;
        const int64_t head = vector * LANES;
        for (int64_t t = 0; t < tile.tokens; t += TOKENS) {
            const int64_t rest = tile.tokens - t;
            const int count = static_cast<int>(rest < TOKENS ? rest : TOKENS);
            score<T, VECTORS, TOKENS>(
                queries + head * units, units, rows + t * stride, stride, count,
                tile.scores + t * padded + head, padded);
        }
    });
}

// As `attend`, with the heads' absorbed queries one after the other at `query_rows`.
template <typename T>
void attend_latent(
    const Heads& shape, const void* query_rows, const void* first_token, int64_t tokens,
    const void* following, float* state_memory, float* scratch) {
    const T* cache = static_cast<const T*>(first_token);
    const State state(shape, state_memory);
    const int64_t padded = padded_heads(shape), dim = shape.token_elements;
    const int64_t units = units_of<T>(dim);
    begin(shape, state);
    float* const factors = scratch;
    float* const scores = factors + padded;
    float* const queries = scores + shape.tile_tokens * padded;
    float* const prepared = queries + padded * units;
    put_side_by_side<T>(shape, static_cast<const T*>(query_rows), queries, prepared);
    const bool in_place = Dot<T>::IN_PLACE && dim % Dot<T>::STEP == 0;
    for (int64_t start = 0; start < tokens; start += shape.tile_tokens) {
        const T* const rows = cache + start * dim;
        const int64_t rest = tokens - start, most = shape.tile_tokens;
        Fetcher fetcher(rest > most ? rows + most * dim : following);
        const TokenTile tile = {
            rest < most ? rest : most, scores, factors, fetcher, num_blocks(shape.heads)};
        if (!in_place) {
            for (int64_t t = 0; t < tile.tokens; ++t) {
                Dot<T>::prepare(rows + t * dim, dim, prepared + t * units);
            }
        }
        const float* const keys = in_place ? reinterpret_cast<const float*>(rows) : prepared;
        add_shared_scores<T>(shape, tile, keys, units, queries);
        weigh<T>(shape, tile, state);
        add_shared_values(shape, tile, rows, state.values);
    }
}

}  // namespace
