// A step of the gated delta rule (arXiv 2412.06464): convolution, norms, and the recurrent state, which
// is read from memory once and written once.
#pragma once

#include <math.h>

#include "fetcher.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace {

using native::GatedDelta;

constexpr int STATE_VECTORS = LANES == 16 ? 8 : 4;  // of the state's columns: both sums are in registers

using StateFetcher = FetcherOf<128>;

// What one key head and its value heads take of a token's queries, keys and values, in this order.
struct Channels {
    int64_t first[3], count[3];
    int64_t all;

    Channels(const GatedDelta& shape, int64_t head) {
        const int64_t values = shape.value_heads / shape.key_heads * shape.value_dim;
        const int64_t keys = shape.key_heads * shape.key_dim, key_dim = shape.key_dim;
        const int64_t firsts[3] = {head * key_dim, keys + head * key_dim, 2 * keys + head * values};
        const int64_t counts[3] = {key_dim, key_dim, values};
        std::memcpy(first, firsts, sizeof first);
        std::memcpy(count, counts, sizeof count);
        all = 2 * key_dim + values;
    }

    // Call work(channel, place, count) for each of the three; places are whole vectors apart.
    template <typename Work>
    void each(const Work& work) const {
        for (int64_t part = 0, place = 0; part < 3; ++part) {
            work(first[part], place, count[part]);
            place += native::rounded_up(count[part], 16);
        }
    }
};

// What is done to a value head's state besides keys, queries and values.
struct Step {
    float decay, beta;
    float match;  // of key and query
};

// Weights of `count` channels, KERNEL or `kernel` one after the other, as float32, channel by channel.
template <int KERNEL, typename T>
void widen_taps(const T* from, int64_t count, int64_t kernel, int64_t apart, float* weights) {
    const int64_t taps = KERNEL > 0 ? KERNEL : kernel;
    for (int64_t k = 0; k < taps; ++k) {
        for (int64_t c = 0; c < count; ++c) weights[k * apart + c] = widened(from[c * taps + k]);
    }
}

// Sums over the new token and those before it, of which the earliest is then forgotten.
template <typename T>
void convolve(
    const T* x, const float* weights, int64_t apart, int64_t tokens, T* state, int64_t row,
    int64_t count, float* out) {
    const float* const newest = weights + tokens * apart;
    for (int64_t c = 0; c < count; ++c) out[c] = newest[c] * widened(x[c]);
    for (int64_t t = 0; t < tokens; ++t) {
        T* const here = state + t * row;
        const float* const weight = weights + t * apart;
        for (int64_t c = 0; c < count; ++c) out[c] += weight[c] * widened(here[c]);
        std::memcpy(here, t + 1 < tokens ? here + row : x, count * sizeof(T));
    }
}

inline void silu(float* values, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats x = widen(values + i);
        const Floats decay = power_of_two(multiply(x, splat(-1.44269504f)));
        store(values + i, divide(x, add(splat(1.0f), decay)));
    }
}

// Of whole vectors, padded with zeros.
inline float dot(const float* a, const float* b, int64_t count) {
    Floats sums = zeros();
    for (int64_t i = 0; i < count; i += LANES) sums = multiply_add(widen(a + i), widen(b + i), sums);
    return sum(sums);
}

inline void scale_by(float* values, int64_t count, float scale) {
    for (int64_t i = 0; i < count; i += LANES) {
        store(values + i, multiply(widen(values + i), splat(scale)));
    }
}

// VECTORS vectors of columns of a state of `rows` rows: what it holds for the key and the query is
// read as it was, and decayed afterwards.
template <int VECTORS>
void step_columns(
    const Step& step, float* state, int64_t rows, int64_t row, const float* key,
    const float* query, const float* value, float* out, StateFetcher& fetcher) {
    constexpr int64_t FETCHED = VECTORS * LANES * sizeof(float) / 2;  // for each row, in both loops
    Floats held[VECTORS], read[VECTORS], difference[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; ++v) held[v] = read[v] = zeros();
    for (int64_t k = 0; k < rows; ++k) {
        const Floats for_key = splat(key[k]), for_query = splat(query[k]);
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            const Floats here = widen(state + k * row + v * LANES);
            held[v] = multiply_add(here, for_key, held[v]);
            read[v] = multiply_add(here, for_query, read[v]);
        }
        fetcher.fetch(FETCHED);
    }
    const Floats decay = splat(step.decay), beta = splat(step.beta), match = splat(step.match);
    UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const Floats known = multiply(held[v], decay);
        difference[v] = multiply(subtract(widen(value + v * LANES), known), beta);
        store(out + v * LANES, multiply_add(difference[v], match, multiply(read[v], decay)));
    }
    for (int64_t k = 0; k < rows; ++k) {
        const Floats for_key = splat(key[k]);
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            float* const here = state + k * row + v * LANES;
            store(here, multiply_add(for_key, difference[v], multiply(widen(here), decay)));
        }
        fetcher.fetch(FETCHED);
    }
}

// The same for one column, of those that make no vector.
inline void step_column(
    const Step& step, float* state, int64_t rows, int64_t row, const float* key,
    const float* query, float value, float* out) {
    float held = 0.0f, read = 0.0f;
    for (int64_t k = 0; k < rows; ++k) {
        held += state[k * row] * key[k];
        read += state[k * row] * query[k];
    }
    const float difference = (value - held * step.decay) * step.beta;
    *out = read * step.decay + step.match * difference;
    for (int64_t k = 0; k < rows; ++k) {
        state[k * row] = state[k * row] * step.decay + key[k] * difference;
    }
}

inline void step_head(
    const Step& step, float* state, const GatedDelta& shape, const float* query, const float* key,
    const float* value, float* out, StateFetcher& fetcher) {
    const int64_t rows = shape.key_dim, row = shape.value_dim;
    int64_t c = 0;
    for (; c + STATE_VECTORS * LANES <= row; c += STATE_VECTORS * LANES) {
        step_columns<STATE_VECTORS>(
            step, state + c, rows, row, key, query, value + c, out + c, fetcher);
    }
    for (; c + LANES <= row; c += LANES) {
        step_columns<1>(step, state + c, rows, row, key, query, value + c, out + c, fetcher);
    }
    for (; c < row; ++c) step_column(step, state + c, rows, row, key, query, value[c], out + c);
}

// exp(-exp(log_rate) * softplus(x)), and what of a difference is written.
template <typename T>
Step step_of(const GatedDelta& shape, int64_t request, int64_t head, float match) {
    const T* const a = static_cast<const T*>(shape.a) + request * shape.a_stride;
    const T* const b = static_cast<const T*>(shape.b) + request * shape.b_stride;
    const float x = widened(a[head]) + shape.step_bias[head];
    const float softplus = x > 20.0f ? x : log1pf(expf(x));
    return {
        expf(-expf(shape.log_rate[head]) * softplus), 1.0f / (1.0f + expf(-widened(b[head]))), match};
}

// One key head with its value heads, for requests [first, last); the state at `following` probably
// comes next, unless it is null.
template <typename T>
void delta_step(
    const GatedDelta& shape, int64_t head, int64_t first, int64_t last, const void* following,
    float* scratch) {
    const Channels channels(shape, head);
    const int64_t group = shape.value_heads / shape.key_heads, state_size = shape.key_dim * shape.value_dim;
    const int64_t key_room = native::rounded_up(shape.key_dim, 16);
    const int64_t room = native::delta_room(shape), kernel = shape.conv_tokens + 1;
    float *const query = scratch, *const key = query + key_room, *const value = key + key_room;
    float *const out = scratch + room, *const weights = out + room;
    std::memset(scratch, 0, room * sizeof(float));
    channels.each([&](int64_t channel, int64_t place, int64_t count) {
        const T* const from = static_cast<const T*>(shape.convolution) + channel * kernel;
        if (kernel == 4) {  // known, it becomes vectors
            widen_taps<4>(from, count, kernel, room, weights + place);
        } else {
            widen_taps<0>(from, count, kernel, room, weights + place);
        }
    });
    const auto state_of = [&](int64_t request) {
        return shape.states + shape.rows[request] * shape.state_stride + head * group * state_size;
    };
    for (int64_t r = first; r < last; ++r) {
        const T* const x = static_cast<const T*>(shape.qkv) + r * shape.qkv_stride;
        T* const before =
            static_cast<T*>(shape.conv_states) + shape.rows[r] * shape.conv_state_stride;
        channels.each([&](int64_t channel, int64_t place, int64_t count) {
            convolve(
                x + channel, weights + place, room, shape.conv_tokens, before + channel,
                shape.channels, count, scratch + place);
        });
        silu(scratch, room);
        const float root = sqrtf(static_cast<float>(shape.key_dim));
        scale_by(query, key_room, 1.0f / (sqrtf(dot(query, query, key_room) + 1e-6f) * root));
        scale_by(key, key_room, 1.0f / sqrtf(dot(key, key, key_room) + 1e-6f));
        const float match = dot(query, key, key_room);
        float* const states = state_of(r);
        for (int64_t v = 0; v < group; ++v) {
            float* const state = states + v * state_size;
            StateFetcher fetcher(
                v + 1 < group  ? state + state_size
                : r + 1 < last ? state_of(r + 1)
                               : following);
            const Step step = step_of<T>(shape, r, head * group + v, match);
            step_head(step, state, shape, query, key, value + v * shape.value_dim, out, fetcher);
            T* const to = static_cast<T*>(shape.out) + r * shape.out_stride +
                          (head * group + v) * shape.value_dim;
            for (int64_t c = 0; c < shape.value_dim; ++c) narrow(out[c], to + c);
        }
    }
}

}  // namespace
