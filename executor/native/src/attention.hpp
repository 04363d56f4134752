// Decode attention of one request over a stretch of its cache: online softmax, float32 sums.
//
// The cache is read in the order in which it lies, a block of tokens at a time: while one block is
// computed, head by head, the next is fetched line by line in the order of its addresses. That is
// what lets a core read at the memory's speed although one head's rows lie far apart.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using native::Heads;

// Fetches the lines of a stretch of memory, a few whenever it is asked to.
struct Fetcher {
    const char* next;
    const char* end;

    void fetch(int64_t lines) {
        const int64_t left = (end - next) / 64;
        const char* const until = next + 64 * (lines < left ? lines : left);
        for (const char* line = next; line < until; line += 64) prefetch(line);
        next = until;
    }
};

// Where the parts of a softmax in progress lie.
struct State {
    float *values, *greatest, *sums;

    State(const Heads& shape, float* state)
        : values(state),
          greatest(state + shape.heads * shape.padded_dim),
          sums(greatest + shape.heads) {}
};

// Logits of NUM heads for the block's tokens, whose keys are `stride` apart: scores[head][token].
// Tokens beyond the last repeat it: there is room for them, and the softmax passes over them.
template <typename T, int NUM>
void block_scores(
    const float* queries, int64_t query_stride, const T* keys, int64_t stride, int64_t dim,
    int64_t tokens, int64_t block_tokens, float* scores, Fetcher& fetcher, int64_t lines) {
    constexpr int TOKENS = SUMS / NUM;
    using D = Dot<T>;
    for (int64_t first = 0; first < tokens; first += TOKENS) {
        const T* rows[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const int64_t token = first + t < tokens ? first + t : tokens - 1;
            rows[t] = keys + token * stride;
        }
        fetcher.fetch(lines);
        Floats sums[SUMS];
        UNROLL
        for (int i = 0; i < SUMS; ++i) sums[i] = zeros();
        const auto pass = [&]<int PASS>(int64_t i, const auto& key_of) {
            typename D::Operand q[NUM];
            UNROLL
            for (int h = 0; h < NUM; ++h) {
                q[h] = D::template prepared<PASS>(queries + h * query_stride, i);
            }
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                const typename D::Operand k = D::template load<PASS>(key_of(t));
                UNROLL
                for (int h = 0; h < NUM; ++h) {
                    sums[h * TOKENS + t] = D::step(sums[h * TOKENS + t], q[h], k);
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
            Padded<T, D::STEP> parts[TOKENS];
            for (int t = 0; t < TOKENS; ++t) parts[t].from(rows[t] + i, dim - i);
            step(i, [&](int t) { return parts[t].elements; });
        }
        float finished[SUMS];
        finish_sums(sums, finished);
        UNROLL
        for (int h = 0; h < NUM; ++h) {
            std::memcpy(
                scores + h * block_tokens + first, finished + h * TOKENS, TOKENS * sizeof(float));
        }
    }
}

// Weights as the sums over tokens take them.
template <typename T>
struct Weights {
    using Element = float;
    static void set(Element* to, Floats weights) { store(to, weights); }
    static Floats get(const Element* from) { return widen(from); }
};

// Turn one head's logits into weights relative to the greatest logit so far, zero beyond `tokens`
// up to a multiple of 16. Returns by how much what was summed before must be multiplied.
template <typename T>
float block_softmax(float* scores, int64_t tokens, float scale, float& greatest, float& total) {
    using Element = typename Weights<T>::Element;
    const int64_t padded = native::rounded_up(tokens, SUMS);
    for (int64_t t = tokens; t < padded; ++t) scores[t] = scores[tokens - 1];
    // Zero, unless a logit is infinite or not a number: then the result must not be one either.
    Floats most = widen(scores), doubt = multiply(most, zeros());
    for (int64_t t = LANES; t < padded; t += LANES) {
        const Floats logits = widen(scores + t);
        most = greater(most, logits);
        doubt = multiply_add(logits, zeros(), doubt);
    }
    const float before = greatest, now = maximum(most) * scale;
    greatest = now > before ? now : before;
    const Floats scales = splat(scale), offset = splat(-greatest);
    Element* weights = reinterpret_cast<Element*>(scores);  // never overtakes what is still read
    for (int64_t t = 0; t < padded; t += LANES) {
        Weights<T>::set(weights + t, power_of_two(multiply_add(widen(scores + t), scales, offset)));
    }
    for (int64_t t = tokens; t < padded; ++t) weights[t] = Element{};
    Floats sums = zeros();
    for (int64_t t = 0; t < padded; t += LANES) sums = add(sums, Weights<T>::get(weights + t));
    float factor[LANES];
    store(factor, power_of_two(splat(before - greatest)));
    total = total * factor[0] + sum(add(sums, doubt));
    return factor[0];
}

// A block's values, and what they are added to, for NUM heads that share them.
template <typename T>
struct Block {
    const T* rows;
    int64_t stride, tokens;
    const float* scores;  // the heads' weights, block_tokens floats apart
    int64_t block_tokens;
    float* values;        // in the order of `Columns`, padded_dim apart
    int64_t padded_dim;
    const float* factors;
};

constexpr int64_t FETCH_EVERY = 8;  // tokens

// How values are added up: WIDTH columns at a time, VECTORS sums of them a head.
template <typename T>
struct Columns {
    static constexpr int WIDTH = Pack<T>::WIDTH, VECTORS = Pack<T>::VECTORS, TOKENS = 1;

    // Add `weight * value` of the tokens from `row` on, for NUM heads and COUNT times WIDTH columns.
    template <int NUM, int COUNT, typename Load>
    static void add(
        Floats (&sums)[NUM][COUNT * VECTORS], const T* row, const T*, const float* scores,
        int64_t token, int64_t block_tokens, Load load) {
        Floats values[COUNT * VECTORS];
        UNROLL
        for (int c = 0; c < COUNT; ++c) {
            const T* from = load(row + c * WIDTH);
            values[c * VECTORS] = Pack<T>::template vector<0>(from);
            if constexpr (VECTORS == 2) values[c * 2 + 1] = Pack<T>::template vector<1>(from);
        }
        UNROLL
        for (int h = 0; h < NUM; ++h) {
            const Floats weight = splat(scores[h * block_tokens + token]);
            UNROLL
            for (int c = 0; c < COUNT * VECTORS; ++c) {
                sums[h][c] = multiply_add(weight, values[c], sums[h][c]);
            }
        }
    }

    static void put_in_order(Floats (&sums)[VECTORS]) { Pack<T>::put_in_order(sums); }
};

#ifdef PATH_AVX512_BF16
template <>
struct Weights<Bf16> {
    using Element = uint16_t;

    static void set(Element* to, Floats weights) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(weights));
    }

    static Floats get(const Element* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
};

// Two tokens at a time: the values of both side by side, and so their weights.
template <>
struct Columns<Bf16> {
    static constexpr int WIDTH = 2 * LANES, VECTORS = 2, TOKENS = 2;

    template <int NUM, int COUNT, typename Load>
    static void add(
        Floats (&sums)[NUM][COUNT * VECTORS], const Bf16* row, const Bf16* next,
        const float* scores, int64_t token, int64_t block_tokens, Load load) {
        __m512bh values[COUNT * VECTORS];
        UNROLL
        for (int c = 0; c < COUNT; ++c) {
            const __m512i a = _mm512_loadu_si512(load(row + c * WIDTH));
            const __m512i b = _mm512_loadu_si512(load(next + c * WIDTH));
            values[2 * c] = (__m512bh)_mm512_unpacklo_epi16(a, b);
            values[2 * c + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
        }
        UNROLL
        for (int h = 0; h < NUM; ++h) {
            int32_t pair;
            const uint16_t* weights = reinterpret_cast<const uint16_t*>(scores + h * block_tokens);
            std::memcpy(&pair, weights + token, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL
            for (int c = 0; c < COUNT * VECTORS; ++c) {
                sums[h][c] = _mm512_dpbf16_ps(sums[h][c], values[c], both);
            }
        }
    }

    static void put_in_order(Floats (&pair)[VECTORS]) {
        const __m512i first = _mm512_setr_epi32(
            0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        const Floats low = _mm512_permutex2var_ps(pair[0], first, pair[1]);
        pair[1] = _mm512_permutex2var_ps(pair[0], second, pair[1]);
        pair[0] = low;
    }
};
#endif

// values[head][column] = factor[head] * values + sum over tokens of weight * value.
template <typename T, int NUM, int COUNT, typename Load>
void add_columns(
    const Block<T>& block, int64_t column, Load load, Fetcher& fetcher, int64_t lines) {
    using C = Columns<T>;
    constexpr int VECTORS = COUNT * C::VECTORS;
    Floats sums[NUM][VECTORS];
    UNROLL
    for (int h = 0; h < NUM; ++h) {
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            const float* before = block.values + h * block.padded_dim + column + v * LANES;
            sums[h][v] = multiply(widen(before), splat(block.factors[h]));
        }
    }
    const T* row = block.rows + column;
    const T* const last = row + (block.tokens - 1) * block.stride;
    for (int64_t start = 0; start < block.tokens; start += FETCH_EVERY) {
        fetcher.fetch(lines);
        const int64_t end = start + FETCH_EVERY < block.tokens ? start + FETCH_EVERY : block.tokens;
        for (int64_t t = start; t < end; t += C::TOKENS, row += C::TOKENS * block.stride) {
            const T* next = row < last ? row + block.stride : row;  // its weight is 0 at the end
            C::template add<NUM, COUNT>(
                sums, row, next, block.scores, t, block.block_tokens, load);
        }
    }
    UNROLL
    for (int h = 0; h < NUM; ++h) {
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            store(block.values + h * block.padded_dim + column + v * LANES, sums[h][v]);
        }
    }
}

template <typename T, int NUM>
constexpr int columns_at_once() {
    return VALUE_SUMS / NUM / Columns<T>::VECTORS;
}

template <typename T, int NUM>
int64_t passes(int64_t dim) {
    const int64_t whole = dim / Columns<T>::WIDTH, at_once = columns_at_once<T, NUM>();
    return whole / at_once + whole % at_once + (dim % Columns<T>::WIDTH != 0);
}

template <typename T, int NUM>
void add_values(const Block<T>& block, int64_t dim, Fetcher& fetcher, int64_t lines) {
    using C = Columns<T>;
    constexpr int COUNT = columns_at_once<T, NUM>();
    const auto whole = [](const T* from) { return from; };
    int64_t column = 0;
    for (; column + COUNT * C::WIDTH <= dim; column += COUNT * C::WIDTH) {
        add_columns<T, NUM, COUNT>(block, column, whole, fetcher, lines);
    }
    for (; column + C::WIDTH <= dim; column += C::WIDTH) {
        add_columns<T, NUM, 1>(block, column, whole, fetcher, lines);
    }
    if (column < dim) {
        Padded<T, C::WIDTH> padded;
        const auto part = [&](const T* from) { return padded.from(from, dim - column); };
        add_columns<T, NUM, 1>(block, column, part, fetcher, lines);
    }
}

// One block for NUM heads, `head` the first of them, that share a head of keys and values.
template <typename T, int NUM>
void attend_heads(
    const Heads& shape, const float* queries, const T* keys, int64_t head, int64_t tokens, State& state,
    float* scores, Fetcher& fetcher, int64_t lines) {
    const int64_t dim = shape.head_dim, stride = shape.token_elements;
    // Half of the lines are fetched with the logits and half with the values.
    const int64_t tiles = native::rounded_up(tokens, SUMS / NUM) / (SUMS / NUM);
    block_scores<T, NUM>(
        queries + head * shape.padded_dim, shape.padded_dim, keys, stride, dim, tokens,
        shape.block_tokens, scores, fetcher, lines / (2 * tiles) + 1);
    float factors[NUM];
    UNROLL
    for (int h = 0; h < NUM; ++h) {
        factors[h] = block_softmax<T>(
            scores + h * shape.block_tokens, tokens, shape.scale, state.greatest[head + h],
            state.sums[head + h]);
    }
    const int64_t padded = shape.padded_dim;
    const Block<T> block = {
        keys + shape.kv_heads * dim, stride, tokens, scores, shape.block_tokens,
        state.values + head * padded, padded, factors,
    };
    const int64_t steps = passes<T, NUM>(dim) * ((tokens + FETCH_EVERY - 1) / FETCH_EVERY);
    add_values<T, NUM>(block, dim, fetcher, lines / (2 * steps) + 1);
}

template <typename T>
void attend(
    const Heads& shape, const void* query_row, const void* first_token, int64_t tokens,
    native::Stretch following, float* state_memory, float* scratch) {
    const T* query = static_cast<const T*>(query_row);
    const T* cache = static_cast<const T*>(first_token);
    State state(shape, state_memory);
    for (int64_t i = 0; i < shape.heads * shape.padded_dim; ++i) state.values[i] = 0.0f;
    for (int64_t h = 0; h < shape.heads; ++h) {
        state.greatest[h] = -__builtin_inff();
        state.sums[h] = 0.0f;
    }
    float* queries = scratch;
    float* scores = queries + shape.heads * shape.padded_dim;
    for (int64_t h = 0; h < shape.heads; ++h) {
        Dot<T>::prepare(query + h * shape.head_dim, shape.head_dim, queries + h * shape.padded_dim);
    }
    const int64_t group = shape.heads / shape.kv_heads;
    const int64_t stride = shape.token_elements;
    const int64_t steps = shape.kv_heads * (group / 4 + group % 4 / 2 + group % 2);
    for (int64_t start = 0; start < tokens; start += shape.block_tokens) {
        const int64_t rest = tokens - start;
        const int64_t here = rest < shape.block_tokens ? rest : shape.block_tokens;
        const int64_t after = rest - here < shape.block_tokens ? rest - here : shape.block_tokens;
        const T* block = cache + start * stride;
        const native::Stretch next =
            after > 0 ? native::Stretch{reinterpret_cast<const char*>(block + here * stride),
                                        after * stride * static_cast<int64_t>(sizeof(T))}
                      : following;
        Fetcher fetcher{next.from, next.from + next.num_bytes};
        const int64_t lines = next.num_bytes / 64 / steps + 1;
        for (int64_t g = 0; g < shape.kv_heads; ++g) {
            const T* keys = block + g * shape.head_dim;
            int64_t head = g * group;
            const int64_t end = head + group;
            for (; head + 4 <= end; head += 4) {
                attend_heads<T, 4>(
                    shape, queries, keys, head, here, state, scores, fetcher, lines);
            }
            if (head + 2 <= end) {
                attend_heads<T, 2>(
                    shape, queries, keys, head, here, state, scores, fetcher, lines);
                head += 2;
            }
            if (head < end) {
                attend_heads<T, 1>(
                    shape, queries, keys, head, here, state, scores, fetcher, lines);
            }
        }
    }
}

inline void merge_states(const Heads& shape, float* earlier, const float* later) {
    State into(shape, earlier), from(shape, const_cast<float*>(later));
    const int64_t padded = shape.padded_dim;
    for (int64_t h = 0; h < shape.heads; ++h) {
        const float a = into.greatest[h], b = from.greatest[h], most = a > b ? a : b;
        float factors[2 * LANES];
        const Floats keep = power_of_two(splat(a - most)), take = power_of_two(splat(b - most));
        store(factors, keep);
        store(factors + LANES, take);
        into.greatest[h] = most;
        into.sums[h] = into.sums[h] * factors[0] + from.sums[h] * factors[LANES];
        for (int64_t i = h * padded; i < (h + 1) * padded; i += LANES) {
            const Floats kept = multiply(widen(into.values + i), keep);
            store(into.values + i, multiply_add(widen(from.values + i), take, kept));
        }
    }
}

template <typename T>
void finish(const Heads& shape, const float* state_memory, void* out_row) {
    using C = Columns<T>;
    const State state(shape, const_cast<float*>(state_memory));
    T* out = static_cast<T*>(out_row);
    for (int64_t h = 0; h < shape.heads; ++h, out += shape.head_dim) {
        const float* values = state.values + h * shape.padded_dim;
        const Floats total = splat(state.sums[h]);
        for (int64_t i = 0; i < shape.head_dim; i += C::WIDTH) {
            Floats vectors[C::VECTORS];
            for (int v = 0; v < C::VECTORS; ++v) {
                vectors[v] = divide(widen(values + i + v * LANES), total);
            }
            C::put_in_order(vectors);
            float means[C::WIDTH];
            for (int v = 0; v < C::VECTORS; ++v) store(means + v * LANES, vectors[v]);
            const int64_t rest = shape.head_dim - i, count = rest < C::WIDTH ? rest : C::WIDTH;
            for (int64_t c = 0; c < count; ++c) narrow(means[c], out + i + c);
        }
    }
}

}  // namespace
