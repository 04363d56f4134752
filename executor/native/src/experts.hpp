// The experts' FFN. Activations lie as float32, prepared for the second product.
#pragma once

#include "gemm.hpp"

namespace {

using native::ExpertGroup;
using native::Experts;

// silu(gate) * up of the first `columns` columns, left in `gate`.
inline void activate(float* gate, const float* up) {
    for (int64_t c = 0; c < COLUMNS; c += LANES) {
        const Floats g = widen(gate + c), u = widen(up + c);
        const Floats decay = power_of_two(multiply(g, splat(-1.44269504f)));
        store(gate + c, multiply(divide(g, add(splat(1.0f), decay)), u));
    }
}

template <typename T>
void gate(
    const Experts& shape, const ExpertGroup& group, int64_t first, int64_t last,
    const void* next) {
    const int64_t hidden = shape.hidden, up_rows = shape.intermediate * hidden;
    const T* x = static_cast<const T*>(shape.x);
    const T* gates = static_cast<const T*>(group.w13) + first * hidden;
    for (int64_t t = 0; t < group.count;) {
        const int tokens = at_once(group.count - t);
        const T* rows[BLOCK_TOKENS];
        for (int i = 0; i < tokens; ++i) rows[i] = x + group.tokens[t + i] * shape.x_stride;
        Gathered<T> inputs(rows, shape.x_stride, hidden);
        float gated[BLOCK_TOKENS * COLUMNS], up[BLOCK_TOKENS * COLUMNS];
        const T* following = t + tokens == group.count ? static_cast<const T*>(next) : nullptr;
        const Rows<T> both[] = {
            {gates, following, gated},
            {gates + up_rows, following ? following + up_rows : nullptr, up},
        };
        multiply(both, last - first, hidden, inputs, tokens);
        for (int i = 0; i < tokens; ++i) {
            float* products = gated + i * COLUMNS;
            activate(products, up + i * COLUMNS);
            T narrowed[COLUMNS];
            for (int64_t c = 0; c < last - first; ++c) narrow(products[c], narrowed + c);
            float* row = shape.activations + (group.first_row + t + i) * shape.activation_stride;
            Dot<T>::prepare(narrowed, last - first, Dot<T>::place(row, first));
        }
        t += tokens;
    }
}

// Each expert's output is added by itself, as it would be if the experts came in several calls.
template <typename T>
void project(
    const Experts& shape, const ExpertGroup* groups, int64_t num_groups, int64_t first,
    int64_t last, int64_t next) {
    const int64_t intermediate = shape.intermediate;
    const auto rows_of = [&](int64_t e, int64_t row) {
        return static_cast<const T*>(groups[e].w2) + row * intermediate;
    };
    T* out = static_cast<T*>(shape.out) + first;
    for (int64_t e = 0; e < num_groups; ++e) {
        const ExpertGroup& group = groups[e];
        const T* following = e + 1 < num_groups ? rows_of(e + 1, first)
                             : next >= 0        ? rows_of(0, next)
                                                : nullptr;
        for (int64_t t = 0; t < group.count;) {
            const int tokens = at_once(group.count - t);
            Prepared<T> inputs{
                shape.activations + (group.first_row + t) * shape.activation_stride,
                shape.activation_stride,
                {},
            };
            float products[BLOCK_TOKENS * COLUMNS];
            const bool is_last = t + tokens == group.count;
            const Rows<T> all[] = {{rows_of(e, first), is_last ? following : nullptr, products}};
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
