// The experts' FFN for few tokens: weights are read from memory once, row by row, and multiplied
// by every token of their group while they are in the cache; float32 sums.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using native::ExpertGroup;
using native::Experts;

using native::COLUMNS;

constexpr int MAX_TILES = 4;  // of tokens that share what is read of the weights
constexpr int MAX_TOKENS = MAX_TILES * GEMM_TOKENS;
constexpr int64_t INPUT_FLOATS = 6 << 10;  // of the tokens are multiplied at a time: they stay near

// A stretch of some rows, and the same stretch of the tokens that it is multiplied with.
template <typename T>
struct Tile {
    const T* rows;
    int64_t width;        // from row to row
    int64_t length;       // of the stretch
    const T* ahead;       // rows of the stretch that comes next, some of them to be fetched now
    const float* tokens;  // prepared, and `stride` apart
    int64_t stride;
    Floats* sums;         // of each token with each row, tokens COLUMNS apart
};

// sums[token][row] += row . token over the stretch, fetching FETCH rows of the next. Each is summed
// in the same order whatever its neighbours; what is left over at the end is padded with zeros.
template <typename T, int ROWS, int TOKENS, int FETCH>
__attribute__((noinline)) void multiply_tile(const Tile<T>& tile) {
    using D = Dot<T>;
    constexpr int LINE = 64 / sizeof(T);
    const T* const weights = tile.rows;
    const int64_t width = tile.width, stride = tile.stride;
    Floats sums[ROWS][TOKENS];
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = tile.sums[t * COLUMNS + r];
    }
    const auto pass = [&]<int PASS>(int64_t i, const auto& row_of) {
        typename D::Operand w[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; ++r) w[r] = D::template load<PASS>(row_of(r));
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const auto x = D::template prepared<PASS>(tile.tokens + t * stride, i);
            UNROLL
            for (int r = 0; r < ROWS; ++r) sums[r][t] = D::step(sums[r][t], w[r], x);
        }
    };
    const auto step = [&](int64_t i, const auto& row_of) {
        pass.template operator()<0>(i, row_of);
        if constexpr (D::PASSES == 2) pass.template operator()<1>(i, row_of);
    };
    int64_t i = 0;
    for (; i + D::STEP <= tile.length; i += D::STEP) {
        if (D::STEP >= LINE || i % LINE == 0) {
            UNROLL
            for (int r = 0; r < FETCH; ++r) {
                prefetch(reinterpret_cast<const char*>(tile.ahead + r * width + i));
            }
        }
        step(i, [&](int r) { return weights + r * width + i; });
    }
    if (i < tile.length) {
        Padded<T, D::STEP> rows[ROWS];
        for (int r = 0; r < ROWS; ++r) rows[r].from(weights + r * width + i, tile.length - i);
        step(i, [&](int r) { return rows[r].elements; });
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) tile.sums[t * COLUMNS + r] = sums[r][t];
    }
}

template <typename T, int ROWS, int FETCH, int TOKENS = GEMM_TOKENS>
void multiply_tokens(const Tile<T>& tile, int tokens) {
    if constexpr (TOKENS > 1) {
        if (tokens < TOKENS) {
            multiply_tokens<T, ROWS, FETCH, TOKENS - 1>(tile, tokens);
            return;
        }
    }
    multiply_tile<T, ROWS, TOKENS, FETCH>(tile);
}

// At most COLUMNS rows of a weight matrix.
template <typename T>
struct Rows {
    const T* first;
    float* results;  // [token][row], tokens COLUMNS apart
};

// results = rows . tokens for each of NUM sets of `rows` rows and at most MAX_TOKENS tokens.
template <typename T, int NUM>
void multiply(
    const Rows<T> (&sets)[NUM], int64_t rows, int64_t width, const T* const* inputs, int tokens) {
    Floats sums[NUM][MAX_TOKENS * COLUMNS];
    for (int set = 0; set < NUM; ++set) {
        for (int i = 0; i < tokens * COLUMNS; ++i) sums[set][i] = zeros();
    }
    alignas(64) float prepared[INPUT_FLOATS];
    const int tiles = (tokens + GEMM_TOKENS - 1) / GEMM_TOKENS;
    const int64_t stretch = INPUT_FLOATS / tokens / 32 * 32;
    for (int64_t start = 0; start < width; start += stretch) {
        const int64_t length = width - start < stretch ? width - start : stretch;
        for (int t = 0; t < tokens; ++t) {
            Dot<T>::prepare(inputs[t] + start, length, prepared + t * stretch);
        }
        for (int64_t at = 0; at < NUM * rows;) {
            const int64_t set = at / rows, row = at % rows;
            const int together = row + GEMM_ROWS <= rows ? GEMM_ROWS : 1;
            const T* here = sets[set].first + row * width + start;
            const T* ahead = here + together * width;
            if (row + together == rows) {
                ahead = set + 1 < NUM ? sets[set + 1].first + start : sets[0].first + start + length;
            }
            for (int tile = 0, token = 0; tile < tiles; ++tile) {
                const int end = (tile + 1) * tokens / tiles, count = end - token;
                Tile<T> work = {
                    here, width, length, ahead, prepared + token * stretch, stretch,
                    sums[set] + token * COLUMNS + row,
                };
                if (together == 1) {
                    multiply_tokens<T, 1, 1>(work, count);
                } else if (tiles == 1) {
                    multiply_tokens<T, GEMM_ROWS, GEMM_ROWS>(work, count);
                } else if (tile < GEMM_ROWS / 2) {  // two rows with each of the first tiles
                    work.ahead += 2 * tile * width;
                    multiply_tokens<T, GEMM_ROWS, 2>(work, count);
                } else {
                    multiply_tokens<T, GEMM_ROWS, 0>(work, count);
                }
                token = end;
            }
            at += together;
        }
    }
    for (int set = 0; set < NUM; ++set) {
        for (int i = 0; i < tokens * COLUMNS; i += SUMS) {
            finish_sums(sums[set] + i, sets[set].results + i);
        }
    }
}

inline int at_once(int64_t tokens) {
    return static_cast<int>(tokens < MAX_TOKENS ? tokens : MAX_TOKENS);
}

template <typename T>
void gate(const Experts& shape, const ExpertGroup& group, int64_t first, int64_t last) {
    const int64_t hidden = shape.hidden, intermediate = shape.intermediate;
    const T* x = static_cast<const T*>(shape.x);
    const T* gates = static_cast<const T*>(group.w13) + first * hidden;
    const T* ups = gates + intermediate * hidden;
    T* activations = static_cast<T*>(shape.activations);
    for (int64_t t = 0; t < group.count;) {
        const int tokens = at_once(group.count - t);
        const T* inputs[MAX_TOKENS];
        for (int i = 0; i < tokens; ++i) inputs[i] = x + group.tokens[t + i] * shape.x_stride;
        float gated[MAX_TOKENS * COLUMNS], up[MAX_TOKENS * COLUMNS];
        const Rows<T> both[] = {{gates, gated}, {ups, up}};
        multiply(both, last - first, hidden, inputs, tokens);
        for (int i = 0; i < tokens; ++i) {
            float* products = gated + i * COLUMNS;
            for (int64_t c = 0; c < COLUMNS; c += LANES) {
                const Floats g = widen(products + c), u = widen(up + i * COLUMNS + c);
                const Floats decay = power_of_two(multiply(g, splat(-1.44269504f)));
                store(products + c, multiply(divide(g, add(splat(1.0f), decay)), u));
            }
            T* row = activations + (group.first_row + t + i) * intermediate + first;
            for (int64_t c = 0; c < last - first; ++c) narrow(products[c], row + c);
        }
        t += tokens;
    }
}

// Each expert's output is added by itself, as it would be if the experts came in several calls.
template <typename T>
void project(
    const Experts& shape, const ExpertGroup* groups, int64_t num_groups, int64_t first,
    int64_t last) {
    const int64_t intermediate = shape.intermediate;
    T* out = static_cast<T*>(shape.out) + first;
    for (int64_t e = 0; e < num_groups; ++e) {
        const ExpertGroup& group = groups[e];
        const T* weights = static_cast<const T*>(group.w2) + first * intermediate;
        const T* rows = static_cast<const T*>(shape.activations) + group.first_row * intermediate;
        for (int64_t t = 0; t < group.count;) {
            const int tokens = at_once(group.count - t);
            const T* inputs[MAX_TOKENS];
            for (int i = 0; i < tokens; ++i) inputs[i] = rows + (t + i) * intermediate;
            float products[MAX_TOKENS * COLUMNS];
            const Rows<T> all[] = {{weights, products}};
            multiply(all, last - first, intermediate, inputs, tokens);
            for (int i = 0; i < tokens; ++i) {
                T* row = out + group.tokens[t + i] * shape.out_stride;
                const float weight = group.weights[t + i];
                for (int64_t c = 0; c < last - first; ++c) {
                    narrow(widened(row[c]) + weight * products[i * COLUMNS + c], row + c);
                }
            }
            t += tokens;
        }
    }
}

}  // namespace
