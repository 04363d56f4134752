// Decode attention of one request over a stretch of its cache: online softmax, float32 sums.
//
// The cache is computed nearly in the order in which it lies, a tile of tokens at a time: the keys
// of all heads, then every head's softmax, then the values of all heads. Meanwhile the next tile is
// fetched in the order of its addresses. Only so is it read as fast as the memory delivers: one
// head's rows of many tokens lie far apart, and come at half that speed.
#pragma once

#include "cached.hpp"
#include "softmax.hpp"

namespace {

constexpr int KEY_TOKENS = SUMS / 4;  // whose keys are multiplied together, by up to 4 queries

// Logits of NUM heads from `head` on, whose keys begin at `keys`, for KEY_TOKENS of a tile's tokens
// from `first` on; if it has fewer, the rows of scores that would be theirs are written all the same.
template <typename T, int NUM>
void add_scores(
    const Heads& shape, const TokenTile& tile, const T* keys, const float* queries, int64_t head,
    int64_t first) {
    using D = Dot<T>;
    const int64_t dim = shape.head_dim, rest = tile.tokens - first;
    const int64_t tokens = rest < KEY_TOKENS ? rest : KEY_TOKENS;
    const T* rows[KEY_TOKENS];
    UNROLL
    for (int t = 0; t < KEY_TOKENS; ++t) {
        rows[t] = keys + (first + (t < tokens ? t : tokens - 1)) * shape.token_elements;
    }
    queries += head * shape.padded_dim;
    Floats sums[SUMS];
    UNROLL
    for (int i = 0; i < SUMS; ++i) sums[i] = zeros();
    const auto pass = [&]<int PASS>(int64_t i, const auto& key_of) {
        typename D::Operand q[NUM];
        UNROLL
        for (int h = 0; h < NUM; ++h) {
            q[h] = D::template prepared<PASS>(queries + h * shape.padded_dim, i);
        }
        UNROLL
        for (int t = 0; t < KEY_TOKENS; ++t) {
            const typename D::Operand k = D::template load<PASS>(key_of(t));
            UNROLL
            for (int h = 0; h < NUM; ++h) {
                sums[t * NUM + h] = D::step(sums[t * NUM + h], q[h], k);
            }
        }
    };
    const auto step = [&](int64_t i, const auto& key_of) {
        pass.template operator()<0>(i, key_of);
        if constexpr (D::PASSES == 2) pass.template operator()<1>(i, key_of);
    };
    int64_t i = 0;
    for (; i + D::STEP <= dim; i += D::STEP) step(i, [&](int t) { return rows[t] + i; });
    if (i < dim) {
        Padded<T, D::STEP> parts[KEY_TOKENS];
        for (int t = 0; t < KEY_TOKENS; ++t) parts[t].from(rows[t] + i, dim - i);
        step(i, [&](int t) { return parts[t].elements; });
    }
    tile.fetcher.fetch(tokens * dim * static_cast<int64_t>(sizeof(T)) * NUM / tile.parts);
    float finished[SUMS];
    finish_sums(sums, finished);
    float* scores = tile.scores + first * padded_heads(shape) + head;
    UNROLL
    for (int t = 0; t < KEY_TOKENS; ++t, scores += padded_heads(shape)) {
        std::memcpy(scores, finished + t * NUM, NUM * sizeof(float));
    }
}

// Whether 4, 8 or 16 heads that share keys are multiplied with them together: each vector has as many bits
// of every head, and of a key what all of them are multiplied with. So little or nothing is summed across
// vectors.
template <typename T>
constexpr bool ARE_TOGETHER = false;
constexpr int64_t TOGETHER_UNIT = 8;     // elements; dimensions of such heads are multiples of it
constexpr int64_t LONGEST_OF_FOUR = 128;  // longer ones have fewer sums for what they multiply

inline bool are_together(const Heads& shape, int num) {
    return shape.head_dim % TOGETHER_UNIT == 0 && (num > 4 || shape.head_dim <= LONGEST_OF_FOUR);
}

#ifdef PATH_AVX512_BF16
template <>
constexpr bool ARE_TOGETHER<Bf16> = true;

// Queries of HEADS heads: a part of each, and then the next parts.
template <int HEADS>
void prepare_together(const Bf16* queries, int64_t dim, float* prepared) {
    constexpr int64_t PART = 2 * LANES / HEADS;
    Bf16* to = reinterpret_cast<Bf16*>(prepared);
    for (int64_t i = 0; i < dim; i += PART) {
        UNROLL
        for (int64_t h = 0; h < HEADS; ++h, to += PART) std::memcpy(to, queries + h * dim + i, PART * sizeof(Bf16));
    }
}

// A part of a key, as often as there are heads.
template <int HEADS>
__m512bh repeated(const Bf16* part) {
    if constexpr (HEADS == 4) {
        return (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part)));
    } else if constexpr (HEADS == 8) {
        int64_t elements;
        std::memcpy(&elements, part, sizeof elements);
        return (__m512bh)_mm512_set1_epi64(elements);
    } else {
        int32_t elements;
        std::memcpy(&elements, part, sizeof elements);
        return (__m512bh)_mm512_set1_epi32(elements);
    }
}

// Finish TOKENS sums of HEADS heads each, and store a row of them for each token, `apart` floats apart.
template <int HEADS, int TOKENS>
void store_scores(const Floats (&sums)[TOKENS], float* scores, int64_t apart) {
    if constexpr (HEADS == 16) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) store(scores + t * apart, sums[t]);
    } else if constexpr (HEADS == 8) {
        const __m512i by_token = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        UNROLL
        for (int t = 0; t < TOKENS; t += 2, scores += 2 * apart) {
            const Floats even = _mm512_shuffle_ps(sums[t], sums[t + 1], 0x88);
            const Floats odd = _mm512_shuffle_ps(sums[t], sums[t + 1], 0xdd);
            const __m512i both = _mm512_permutexvar_epi64(by_token, _mm512_castps_si512(_mm512_add_ps(even, odd)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(scores), _mm512_castsi512_si256(both));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(scores + apart), _mm512_extracti64x4_epi64(both, 1));
        }
    } else {
        const __m512i by_token = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        UNROLL
        for (int t = 0; t < TOKENS; t += 4, scores += 4 * apart) {
            const Floats by_head = four_sums(sums[t], sums[t + 1], sums[t + 2], sums[t + 3]);
            const Floats all = _mm512_permutexvar_ps(by_token, by_head);
            _mm_storeu_ps(scores, _mm512_extractf32x4_ps(all, 0));
            _mm_storeu_ps(scores + apart, _mm512_extractf32x4_ps(all, 1));
            _mm_storeu_ps(scores + 2 * apart, _mm512_extractf32x4_ps(all, 2));
            _mm_storeu_ps(scores + 3 * apart, _mm512_extractf32x4_ps(all, 3));
        }
    }
}

// As `add_scores`, of HEADS heads and TILE_UNIT tokens.
template <int HEADS>
void add_scores_together(
    const Heads& shape, const TokenTile& tile, const Bf16* keys, const float* queries, int64_t head,
    int64_t first) {
    constexpr int TOKENS = native::TILE_UNIT;
    constexpr int64_t PART = 2 * LANES / HEADS;
    const int64_t rest = tile.tokens - first, tokens = rest < TOKENS ? rest : TOKENS, padded = padded_heads(shape);
    const Bf16* rows[TOKENS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        rows[t] = keys + (first + (t < tokens ? t : tokens - 1)) * shape.token_elements;
    }
    const Bf16* const parts = reinterpret_cast<const Bf16*>(queries + head * shape.padded_dim);
    const int64_t fetched = tokens * TOGETHER_UNIT * static_cast<int64_t>(sizeof(Bf16)) * HEADS / tile.parts;
    Fetcher fetcher = tile.fetcher;
    Floats sums[TOKENS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) sums[t] = zeros();
    for (int64_t i = 0; i < shape.head_dim; i += TOGETHER_UNIT) {
        UNROLL
        for (int64_t p = i; p < i + TOGETHER_UNIT; p += PART) {
            const __m512bh q = Dot<Bf16>::load<0>(parts + p * HEADS);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) sums[t] = Dot<Bf16>::step(sums[t], q, repeated<HEADS>(rows[t] + p));
        }
        fetcher.fetch(fetched);
    }
    tile.fetcher = fetcher;
    store_scores<HEADS>(sums, tile.scores + first * padded + head, padded);
}
#endif

// Add the weighted values of NUM heads from `head` on, whose values begin at `values`.
template <typename T, int NUM>
void add_values(
    const Heads& shape, const TokenTile& tile, const T* values, float* summed, int64_t head) {
    using C = Columns<T>;
    constexpr int COUNT = VALUE_SUMS / NUM / C::VECTORS;
    const int64_t dim = shape.head_dim;
    const auto as_is = [](const T* from) { return from; };
    int64_t column = 0;
    for (; column + COUNT * C::WIDTH <= dim; column += COUNT * C::WIDTH) {
        add_columns<T, NUM, COUNT>(shape, tile, values, summed, head, column, as_is);
    }
    for (; column + C::WIDTH <= dim; column += C::WIDTH) {
        add_columns<T, NUM, 1>(shape, tile, values, summed, head, column, as_is);
    }
    if (column < dim) {
        Padded<T, C::WIDTH> padded;
        const auto part = [&](const T* from) { return padded.from(from, dim - column); };
        add_columns<T, NUM, 1>(shape, tile, values, summed, head, column, part);
    }
}

// Call work<NUM>(kv_head, head) for all heads, NUM of them at a time, MOST or fewer, that share keys and values.
template <int MOST = 4, typename Work>
void for_heads(const Heads& shape, const Work& work) {
    const int64_t group = shape.heads / shape.kv_heads;
    int64_t head = 0;
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
        const int64_t end = head + group;
        if constexpr (MOST == 16) {
            for (; head + 16 <= end; head += 16) work.template operator()<16>(g, head);
        }
        if constexpr (MOST >= 8) {
            for (; head + 8 <= end; head += 8) work.template operator()<8>(g, head);
        }
        for (; head + 4 <= end; head += 4) work.template operator()<4>(g, head);
        for (; head + 2 <= end; head += 2) work.template operator()<2>(g, head);
        for (; head < end; ++head) work.template operator()<1>(g, head);
    }
}

template <typename T>
void attend(
    const Heads& shape, const void* query_row, const void* first_token, int64_t tokens,
    const void* following, float* state_memory, float* scratch) {
    const T* query = static_cast<const T*>(query_row);
    const char* cache = static_cast<const char*>(first_token);
    const State state(shape, state_memory);
    const int64_t num_padded = padded_heads(shape);
    begin(shape, state);
    float* queries = scratch;
    float* factors = queries + shape.heads * shape.padded_dim;
    float* scores = factors + num_padded;
    float* room = scores + shape.tile_tokens * num_padded;
    constexpr int MOST_TOGETHER = ARE_TOGETHER<T> ? 16 : 4, VALUES_TOGETHER = ARE_TOGETHER<T> ? 8 : 4;
    for_heads<MOST_TOGETHER>(shape, [&]<int NUM>(int64_t, int64_t head) {
        const T* const from = query + head * shape.head_dim;
        float* const to = queries + head * shape.padded_dim;
        if constexpr (ARE_TOGETHER<T> && NUM >= 4) {
            if (are_together(shape, NUM)) return prepare_together<NUM>(from, shape.head_dim, to);
        }
        for (int h = 0; h < NUM; ++h) {
            Dot<T>::prepare(from + h * shape.head_dim, shape.head_dim, to + h * shape.padded_dim);
        }
    });
    if (shape.heads < num_padded) {  // what is no head's is weighed as well
        std::memset(scores, 0, shape.tile_tokens * num_padded * sizeof(float));
    }
    for (int64_t start = 0; start < tokens; start += shape.tile_tokens) {
        const char* const here = cache + start * shape.token_bytes;
        const int64_t rest = tokens - start, most = shape.tile_tokens;
        Fetcher fetcher(rest > most ? here + most * shape.token_bytes : following, narrower<T>(shape.coded));
        const TokenTile tile = {
            rest < most ? rest : most, scores, factors, fetcher, shape.heads / shape.kv_heads};
        const T* const keys = rows_of<T>(shape.coded, here, tile.tokens, room);
        const T* const values = keys + shape.kv_heads * shape.head_dim;
        for (int64_t first = 0; first < tile.tokens; first += native::TILE_UNIT) {
            const int64_t last = first + native::TILE_UNIT, end = last < tile.tokens ? last : tile.tokens;
            for_heads<MOST_TOGETHER>(shape, [&]<int NUM>(int64_t g, int64_t head) {
                const T* from = keys + g * shape.head_dim;
                if constexpr (ARE_TOGETHER<T> && NUM >= 4) {
                    if (are_together(shape, NUM)) {
                        return add_scores_together<NUM>(shape, tile, from, queries, head, first);
                    }
                }
                constexpr int MOST = NUM < 4 ? NUM : 4;
                for (int64_t t = first; t < end; t += KEY_TOKENS) {
                    for (int h = 0; h < NUM; h += MOST) {
                        add_scores<T, MOST>(shape, tile, from, queries, head + h, t);
                    }
                }
            });
        }
        weigh<T>(shape, tile, state);
        for_heads<VALUES_TOGETHER>(shape, [&]<int NUM>(int64_t g, int64_t head) {
            const T* from = values + g * shape.head_dim;
            add_values<T, NUM>(shape, tile, from, state.values, head);
        });
    }
}

}  // namespace
