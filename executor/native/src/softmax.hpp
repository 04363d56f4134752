// A softmax in progress over the tokens of a cache: weights of a tile's tokens, weighted sums of their
// values, and what becomes of both in the end. Sums are float32.
#pragma once

#include "cached.hpp"
#include "fetcher.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace {

using native::Heads;
using native::padded_heads;

// Where the parts of a softmax in progress lie. The greatest logits and the sums are one float a
// head, and some more up to a whole vector.
struct State {
    float *values, *greatest, *sums;

    State(const Heads& shape, float* state)
        : values(state),
          greatest(state + shape.heads * shape.padded_dim),
          sums(greatest + padded_heads(shape)) {}
};

inline void begin(const Heads& shape, const State& state) {
    for (int64_t i = 0; i < shape.heads * shape.padded_dim; ++i) state.values[i] = 0.0f;
    for (int64_t h = 0; h < padded_heads(shape); ++h) {
        state.greatest[h] = -__builtin_inff();
        state.sums[h] = 0.0f;
    }
}

// Tokens that are computed together. Each has a row of padded_heads scores: every head's logit,
// then its weight as `Columns` takes it.
struct TokenTile {
    int64_t tokens;
    float* scores;
    float* factors;  // by which what each head summed before is multiplied
    Fetcher& fetcher;
    int64_t parts;   // heads that share keys and values: with each as much of what comes next is fetched
};

// How values are added up: WIDTH columns at a time, VECTORS sums of them a head, TOKENS at once.
template <typename T>
struct Columns {
    static constexpr int WIDTH = Pack<T>::WIDTH, VECTORS = Pack<T>::VECTORS, TOKENS = 1;

    // 2^x for x <= 0; not a number where x is none or infinite: then the result must not be one either.
    static Floats power(Floats x) { return multiply_add(x, zeros(), power_of_two(x)); }

    // Put a vector of heads' weights of TOKENS tokens where `add` finds them, and add them to sums.
    static Floats put(float* scores, const Floats (&weights)[TOKENS], Floats sums) {
        store(scores, weights[0]);
        return ::add(sums, weights[0]);
    }

    // Add `weight * value` of the tokens at `row` and `next`, for NUM heads and COUNT * WIDTH columns.
    template <int NUM, int COUNT, typename Load>
    static void add(
        Floats (&sums)[NUM][COUNT * VECTORS], const T* row, const T*, const float* weights,
        Load load) {
        Floats values[COUNT * VECTORS];
        UNROLL
        for (int c = 0; c < COUNT; ++c) {
            const T* from = load(row + c * WIDTH);
            values[c * VECTORS] = Pack<T>::template vector<0>(from);
            if constexpr (VECTORS == 2) values[c * 2 + 1] = Pack<T>::template vector<1>(from);
        }
        UNROLL
        for (int h = 0; h < NUM; ++h) {
            const Floats weight = splat(weights[h]);
            UNROLL
            for (int c = 0; c < COUNT * VECTORS; ++c) {
                sums[h][c] = multiply_add(weight, values[c], sums[h][c]);
            }
        }
    }

    static void put_in_order(Floats (&sums)[VECTORS]) { Pack<T>::put_in_order(sums); }
};

#ifdef PATH_AVX512_BF16
// Two tokens at a time: the values of both side by side, and so their weights.
template <>
struct Columns<Bf16> {
    static constexpr int WIDTH = 2 * LANES, VECTORS = 2, TOKENS = 2;

    // To 2^-13: half of a bfloat16's last place is 2^-9.
    static Floats power(Floats x) {
        const Floats broken = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        Floats value = splat(7.8024460e-2f);
        value = multiply_add(value, broken, splat(2.2606725e-1f));
        value = multiply_add(value, broken, splat(6.9583351e-1f));
        value = multiply_add(value, broken, splat(9.9992522e-1f));
        return multiply_add(x, zeros(), _mm512_scalef_ps(value, x));
    }

    static Floats put(float* scores, const Floats (&weights)[TOKENS], Floats sums) {
        // Lane by lane the weight of one token, and above it that of the other.
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i others = _mm512_add_epi32(lanes, _mm512_set1_epi32(LANES));
        const __m512i in_pairs = _mm512_or_si512(lanes, _mm512_slli_epi32(others, 16));
        const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]);
        const __m512i pairs = _mm512_permutexvar_epi16(in_pairs, apart);
        _mm512_storeu_si512(scores, pairs);
        return _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)_mm512_set1_epi16(0x3f80));  // times 1
    }

    template <int NUM, int COUNT, typename Load>
    static void add(
        Floats (&sums)[NUM][COUNT * VECTORS], const Bf16* row, const Bf16* next,
        const float* weights, Load load) {
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
            const __m512bh both = (__m512bh)splat(weights[h]);
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

// Let no logit be greater than a cap, which the scale that comes after is: they become
// tanh(x) = 1 - 2 / (e^2x + 1) of the scaled ones. What is infinite is not a number after it.
inline void cap(const Heads& shape, const TokenTile& tile) {
    const Floats scale = splat(shape.capped_scale), one = splat(1.0f), two = splat(2.0f);
    const int64_t count = tile.tokens * padded_heads(shape);
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats logits = widen(tile.scores + i);
        const Floats power = power_of_two(multiply(logits, scale));
        const Floats capped = subtract(one, divide(two, add(power, one)));
        store(tile.scores + i, multiply_add(logits, zeros(), capped));
    }
}

// Turn logits into weights relative to the greatest logits so far, a vector of heads at a time.
template <typename T>
void weigh(const Heads& shape, const TokenTile& tile, const State& state) {
    constexpr int TOKENS = Columns<T>::TOKENS;
    const int64_t heads = padded_heads(shape);
    const Floats scale = splat(shape.scale);
    if (shape.capped_scale != 0.0f) cap(shape, tile);
    for (int64_t h = 0; h < heads; h += LANES) {
        float* scores = tile.scores + h;
        Floats even = widen(scores), odd = even;  // a maximum takes longer than a load
        for (int64_t t = 1; t < tile.tokens; t += 2) {
            even = greater(even, widen(scores + (t - 1) * heads));
            odd = greater(odd, widen(scores + t * heads));
        }
        even = greater(even, widen(scores + (tile.tokens - 1) * heads));
        const Floats before = widen(state.greatest + h);
        const Floats greatest = greater(multiply(greater(even, odd), scale), before);
        const Floats factors = power_of_two(subtract(before, greatest));
        Floats sums = multiply(widen(state.sums + h), factors);
        for (int64_t t = 0; t < tile.tokens; t += TOKENS, scores += TOKENS * heads) {
            Floats weights[TOKENS];
            UNROLL
            for (int next = 0; next < TOKENS; ++next) {
                const Floats logits = multiply(widen(scores + next * heads), scale);
                weights[next] = t + next < tile.tokens ? Columns<T>::power(subtract(logits, greatest))
                                                       : zeros();
            }
            sums = Columns<T>::put(scores, weights, sums);
        }
        store(state.greatest + h, greatest);
        store(state.sums + h, sums);
        store(tile.factors + h, factors);
    }
}

// sums[head][column] = factor[head] * sums + sum over tokens of weight * value, for NUM heads from
// `head` on and COUNT times WIDTH columns from `column` on.
template <typename T, int NUM, int COUNT, typename Load>
void add_columns(
    const Heads& shape, const TokenTile& tile, const T* values, float* summed, int64_t head,
    int64_t column, Load load) {
    using C = Columns<T>;
    constexpr int VECTORS = COUNT * C::VECTORS;
    summed += head * shape.padded_dim + column;
    Floats sums[NUM][VECTORS];
    UNROLL
    for (int h = 0; h < NUM; ++h) {
        const Floats factor = splat(tile.factors[head + h]);
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            sums[h][v] = multiply(widen(summed + h * shape.padded_dim + v * LANES), factor);
        }
    }
    const int64_t stride = shape.token_elements, apart = C::TOKENS * padded_heads(shape);
    const T* row = values + column;
    const T* const last = row + (tile.tokens - 1) * stride;
    const float* weights = tile.scores + head;
    constexpr int64_t ROW_BYTES = COUNT * C::WIDTH * sizeof(T);
    const int64_t fetched = C::TOKENS * ROW_BYTES * NUM / tile.parts;
    Fetcher fetcher = tile.fetcher;
    for (; row + (C::TOKENS - 1) * stride <= last; row += C::TOKENS * stride) {
        C::template add<NUM, COUNT>(sums, row, row + stride, weights, load);
        weights += apart;
        fetcher.fetch(fetched);
    }
    if (row <= last) C::template add<NUM, COUNT>(sums, row, row, weights, load);  // once it weighs 0
    tile.fetcher = fetcher;
    UNROLL
    for (int h = 0; h < NUM; ++h) {
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            store(summed + h * shape.padded_dim + v * LANES, sums[h][v]);
        }
    }
}

// Of heads [first, last); likewise below.
inline void merge_states(
    const Heads& shape, int64_t first, int64_t last, float* earlier, const float* later) {
    const State into(shape, earlier), from(shape, const_cast<float*>(later));
    const int64_t padded = shape.padded_dim;
    for (int64_t head = first; head < last; head += LANES) {
        const int64_t rest = last - head, count = rest < LANES ? rest : LANES;
        const auto some = [&](const float* of) {
            Padded<float, LANES> whole;
            return widen(whole.from(of + head, count));
        };
        const auto put = [&](Floats values, float* to) {
            float stored[LANES];
            store(stored, values);
            std::memcpy(to + head, stored, count * sizeof(float));
        };
        const Floats a = some(into.greatest), b = some(from.greatest), most = greater(a, b);
        const Floats keep = power_of_two(subtract(a, most)), take = power_of_two(subtract(b, most));
        put(most, into.greatest);
        put(multiply_add(some(into.sums), keep, multiply(some(from.sums), take)), into.sums);
        float kept[LANES], taken[LANES];
        store(kept, keep);
        store(taken, take);
        for (int64_t h = 0; h < count; ++h) {
            const Floats factor = splat(kept[h]), other = splat(taken[h]);
            for (int64_t i = (head + h) * padded; i < (head + h + 1) * padded; i += LANES) {
                const Floats values = multiply(widen(into.values + i), factor);
                store(into.values + i, multiply_add(widen(from.values + i), other, values));
            }
        }
    }
}

// The sums of weights of LANES heads or fewer, their sinks' among them.
inline Floats total_weights(const Heads& shape, const State& state, int64_t first, int64_t count) {
    Padded<float, LANES> padded;
    Floats total = widen(padded.from(state.sums + first, count));
    if (shape.sinks != nullptr) {
        const Floats greatest = widen(padded.from(state.greatest + first, count)), log2_e = splat(1.44269504f);
        const Floats sink = widen(padded.from(shape.sinks + first, count));
        const Floats logit = subtract(multiply(sink, log2_e), greatest);
        total = add(total, multiply_add(sink, zeros(), power_of_two(logit)));  // if it is a number
    }
    return total;
}

// Sums of values, as `add_columns` leaves them, over a total whose inverse is known: as exact as divided,
// and sooner.
template <typename T>
void put_means(const float* values, float total, float inverse, int64_t count, T* out) {
    using C = Columns<T>;
    for (int64_t i = 0; i < count; i += C::WIDTH) {
        Floats vectors[C::VECTORS];
        for (int v = 0; v < C::VECTORS; ++v) {
            const Floats sums = widen(values + i + v * LANES), about = multiply(sums, splat(inverse));
            const Floats rest = multiply_add(about, splat(-total), sums);
            vectors[v] = multiply_add(rest, splat(inverse), about);
        }
        C::put_in_order(vectors);
        const int64_t left = count - i;
        T means[C::WIDTH], *const to = left < C::WIDTH ? means : out + i;
        if constexpr (C::VECTORS == 2) {
            store_both(to, vectors[0], vectors[1]);
        } else {
            store_as(to, vectors[0]);
        }
        if (left < C::WIDTH) std::memcpy(out + i, means, left * sizeof(T));
    }
}

template <typename T>
void finish(
    const Heads& shape, int64_t first, int64_t last, const float* state_memory, void* out_row) {
    const State state(shape, const_cast<float*>(state_memory));
    T* out = static_cast<T*>(out_row) + first * shape.head_dim;
    for (int64_t head = first; head < last; head += LANES) {
        const int64_t rest = last - head, count = rest < LANES ? rest : LANES;
        const Floats total = total_weights(shape, state, head, count);
        float totals[LANES], inverses[LANES];
        store(totals, total);
        store(inverses, divide(splat(1.0f), total));
        for (int64_t h = 0; h < count; ++h, out += shape.head_dim) {
            const float* const values = state.values + (head + h) * shape.padded_dim;
            put_means(values, totals[h], inverses[h], shape.head_dim, out);
        }
    }
}

}  // namespace
