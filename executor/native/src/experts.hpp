// The experts' FFN for few tokens: weights are read from memory once, row by row, and multiplied
// by every token of their group while they are in the cache; float32 sums.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using native::ExpertGroup;
using native::Experts;

constexpr int MAX_COLUMNS = native::GATE_COLUMNS > native::OUTPUT_COLUMNS
                                ? native::GATE_COLUMNS
                                : native::OUTPUT_COLUMNS;

// products[token * MAX_COLUMNS + row] = weights[row] . inputs[token]
template <typename T, int ROWS, int TOKENS>
void multiply_tile(
    const T* weights, int64_t width, const T* const* inputs, float* products) {
    using D = Dot<T>;
    Floats sums[ROWS][TOKENS];
    for (auto& row : sums) {
        for (Floats& sum : row) sum = zeros();
    }
    int64_t i = 0;
    for (; i + D::STEP <= width; i += D::STEP) {
        typename D::Operand w[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; ++r) w[r] = D::load(weights + r * width + i);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const typename D::Operand x = D::load(inputs[t] + i);
            UNROLL
            for (int r = 0; r < ROWS; ++r) sums[r][t] = D::step(sums[r][t], w[r], x);
        }
    }
    if (i < width) {
        const int64_t rest = width - i;
        typename D::Operand w[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; ++r) w[r] = D::part(weights + r * width + i, rest);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const typename D::Operand x = D::part(inputs[t] + i, rest);
            UNROLL
            for (int r = 0; r < ROWS; ++r) sums[r][t] = D::step(sums[r][t], w[r], x);
        }
    }
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) products[t * MAX_COLUMNS + r] = sum(sums[r][t]);
    }
}

template <typename T, int ROWS, int TOKENS>
void multiply_rows(
    const T* weights, int64_t width, const T* const* inputs, int64_t tokens, float* products) {
    if constexpr (TOKENS > 0) {
        if (tokens == TOKENS) {
            multiply_tile<T, ROWS, TOKENS>(weights, width, inputs, products);
        } else {
            multiply_rows<T, ROWS, TOKENS - 1>(weights, width, inputs, tokens, products);
        }
    }
}

// products[token * MAX_COLUMNS + row] for `rows` rows and at most GEMM_TOKENS tokens. Each product
// is summed in the same order whatever its neighbours.
template <typename T>
void multiply_some(
    const T* weights, int64_t rows, int64_t width, const T* const* inputs, int64_t tokens,
    float* products) {
    int64_t r = 0;
    for (; r + GEMM_ROWS <= rows; r += GEMM_ROWS) {
        multiply_rows<T, GEMM_ROWS, GEMM_TOKENS>(
            weights + r * width, width, inputs, tokens, products + r);
    }
    for (; r < rows; ++r) {
        multiply_rows<T, 1, GEMM_TOKENS>(weights + r * width, width, inputs, tokens, products + r);
    }
}

// Tokens of the next tile when `left` are left: as even as possible.
inline int64_t tile_tokens(int64_t left) {
    const int64_t tiles = (left + GEMM_TOKENS - 1) / GEMM_TOKENS;
    return (left + tiles - 1) / tiles;
}

template <typename T>
void gate(const Experts& shape, const ExpertGroup& group, int64_t first, int64_t last) {
    const int64_t hidden = shape.hidden, intermediate = shape.intermediate;
    const T* x = static_cast<const T*>(shape.x);
    const T* gates = static_cast<const T*>(group.w13) + first * hidden;
    const T* ups = gates + intermediate * hidden;
    T* activations = static_cast<T*>(shape.activations);
    for (int64_t t = 0; t < group.count;) {
        const int64_t tokens = tile_tokens(group.count - t);
        const T* inputs[GEMM_TOKENS];
        for (int64_t i = 0; i < tokens; ++i) inputs[i] = x + group.tokens[t + i] * shape.x_stride;
        float gated[GEMM_TOKENS * MAX_COLUMNS] = {}, up[GEMM_TOKENS * MAX_COLUMNS] = {};
        multiply_some(gates, last - first, hidden, inputs, tokens, gated);
        multiply_some(ups, last - first, hidden, inputs, tokens, up);
        for (int64_t i = 0; i < tokens; ++i) {
            float* products = gated + i * MAX_COLUMNS;
            for (int64_t c = 0; c < MAX_COLUMNS; c += LANES) {
                const Floats g = widen(products + c), u = widen(up + i * MAX_COLUMNS + c);
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
            const int64_t tokens = tile_tokens(group.count - t);
            const T* inputs[GEMM_TOKENS];
            for (int64_t i = 0; i < tokens; ++i) inputs[i] = rows + (t + i) * intermediate;
            float products[GEMM_TOKENS * MAX_COLUMNS];
            multiply_some(weights, last - first, intermediate, inputs, tokens, products);
            for (int64_t i = 0; i < tokens; ++i) {
                T* row = out + group.tokens[t + i] * shape.out_stride;
                const float weight = group.weights[t + i];
                for (int64_t c = 0; c < last - first; ++c) {
                    narrow(widened(row[c]) + weight * products[i * MAX_COLUMNS + c], row + c);
                }
            }
            t += tokens;
        }
    }
}

}  // namespace
