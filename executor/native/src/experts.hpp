// The experts' FFN. Activations lie as float32, prepared for the second product.
#pragma once

#include "gemm.hpp"

namespace {

using native::ExpertGroup;
using native::Experts;

// gate * sigmoid(linear * gate + cubic * gate^3) * (up + shift), with both clamped to `limit` before.
struct Curve {
    float linear, cubic, shift, limit;

    static Curve of(const Experts& shape) {
        constexpr float ANY = __builtin_inff();
        if (shape.activation == native::SILU) return {1.0f, 0.0f, 0.0f, ANY};
        if (shape.activation == native::CLAMPED) return {1.702f, 0.0f, 1.0f, shape.limit};
        // (1 + tanh(x)) / 2 is sigmoid(2x), and this is 2 sqrt(2 / pi) (gate + 0.044715 gate^3).
        return {1.59576912f, 0.0713548163f, 0.0f, ANY};
    }

    // Of COLUMNS columns, left in `gate`.
    void activate(float* gate, const float* up) const {
        const Floats one = splat(1.0f), most = splat(limit), least = splat(-limit);
        for (int64_t c = 0; c < COLUMNS; c += LANES) {
            // What is not a number comes second: then it stays.
            const Floats g = lesser(most, widen(gate + c));
            const Floats u = greater(least, lesser(most, widen(up + c)));
            Floats slope = splat(linear);
            if (cubic != 0.0f) slope = multiply_add(multiply(g, g), splat(cubic), slope);
            const Floats decay = power_of_two(multiply(multiply(g, slope), splat(-1.44269504f)));
            const Floats activated = divide(g, add(one, decay));
            store(gate + c, multiply(activated, add(u, splat(shift))));
        }
    }
};

template <typename T>
void add_bias(float* products, const T* bias, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) products[c] += widened(bias[c]);
}

// The product of an input that is `weight` times as large.
inline void scale(float* products, float weight, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) products[c] *= weight;
}

template <typename T>
void gate(
    const Experts& shape, const ExpertGroup& group, int64_t first, int64_t last,
    const void* next) {
    const int64_t hidden = shape.hidden, up_rows = shape.intermediate * hidden;
    const T* x = static_cast<const T*>(shape.x);
    const T* gates = static_cast<const T*>(group.w13) + first * hidden;
    const T* bias = static_cast<const T*>(group.bias13);
    const Curve curve = Curve::of(shape);
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
            float *products = gated + i * COLUMNS, *ups = up + i * COLUMNS;
            if (shape.weight_on_input) {
                scale(products, group.weights[t + i], last - first);
                scale(ups, group.weights[t + i], last - first);
            }
            if (bias) {
                add_bias(products, bias + first, last - first);
                add_bias(ups, bias + shape.intermediate + first, last - first);
            }
            curve.activate(products, ups);
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
                if (group.bias2) {
                    const T* bias = static_cast<const T*>(group.bias2) + first;
                    add_bias(products + i * COLUMNS, bias, last - first);
                }
                T* row = out + group.tokens[t + i] * shape.out_stride;
                const float weight = shape.weight_on_input ? 1.0f : group.weights[t + i];
                for (int64_t c = 0; c < last - first; ++c) {
                    narrow(widened(row[c]) + weight * products[i * COLUMNS + c], row + c);
                }
            }
            t += tokens;
        }
    }
}

}  // namespace
