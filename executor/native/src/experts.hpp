// The experts' FFN. Activations lie as float32, prepared for the second product.
#pragma once

#include "fetcher.hpp"
#include "packed.hpp"

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

// Take so many columns of activations of the tokens of a group that are arranged together, up to its `last`.
template <typename T>
void keep_arranged(
    const Experts& shape, const ExpertGroup& group, const T (&activations)[TILE][COLUMNS], int64_t last,
    int64_t first, int64_t columns) {
    if constexpr (TILED<T>) {
        const T* rows[TILE];
        for (int t = 0; t < TILE; ++t) rows[t] = activations[t];
        Bf16* const kept = reinterpret_cast<Bf16*>(shape.activations + group.first_row * shape.activation_stride);
        const int64_t before = native::arranged_elements(last / TILE * TILE, shape.intermediate) + first * TILE;
        arrange(rows, static_cast<int>(last % TILE + 1), columns, kept + before);
    }
}

template <typename T>
void gate(
    const Experts& shape, const ExpertGroup& group, int64_t first, int64_t last,
    const ExpertGroup* next, int64_t next_first, float* scratch) {
    const Curve curve = Curve::of(shape);
    const T* const x = static_cast<const T*>(shape.x);
    const T* const bias = static_cast<const T*>(group.bias13);
    const int64_t columns = last - first;
    with_packing<T>(shape.packing13, [&]<typename W>(const W& weights) {
        for (int64_t t = 0; t < group.count;) {
            const int tokens = at_once<W>(group.count - t, group.arranged);
            const Matrix* following = next && t + tokens == group.count ? &next->w13 : nullptr;
            const int64_t next_tokens = next ? next->count : 0;
            float *const gated = scratch, *const up = scratch + PRODUCTS / 2;
            const Slice both[] = {
                {group.w13, first, following, next_first, next_tokens, gated},
                {group.w13, shape.intermediate + first, following, shape.intermediate + next_first, next_tokens, up},
            };
            if (group.arranged) {
                multiply_arranged<T>(
                    weights, both, columns, shape.hidden, group.arranged, t, tokens, scratch + PRODUCTS);
            } else {
                const T* rows[W::TOKENS];
                for (int i = 0; i < tokens; ++i) rows[i] = x + group.tokens[t + i] * shape.x_stride;
                weights.multiply(both, columns, shape.hidden, rows, shape.x_stride, tokens, scratch + PRODUCTS);
            }
            T narrowed[TILE][COLUMNS];
            for (int i = 0; i < tokens; ++i) {
                float *products = gated + i * COLUMNS, *ups = up + i * COLUMNS;
                if (shape.weight_on_input) {
                    scale(products, group.weights[t + i], columns);
                    scale(ups, group.weights[t + i], columns);
                }
                if (bias) {
                    add_bias(products, bias + first, columns);
                    add_bias(ups, bias + shape.intermediate + first, columns);
                }
                curve.activate(products, ups);
                T* const activated = narrowed[i % TILE];
                for (int64_t c = 0; c < columns; ++c) narrow(products[c], activated + c);
                if (group.arranged) {
                    if (i % TILE == TILE - 1 || i + 1 == tokens) keep_arranged(shape, group, narrowed, t + i, first, columns);
                    continue;
                }
                float* row = shape.activations + (group.first_row + t + i) * shape.activation_stride;
                with_packing<T>(shape.packing2, [&]<typename W2>(const W2&) {
                    W2::keep(activated, columns, row, first);
                });
            }
            t += tokens;
        }
    });
}

// Each expert's output is added by itself, as it would be if the experts came in several calls.
template <typename T>
void project(
    const Experts& shape, const ExpertGroup* groups, int64_t num_groups, int64_t first,
    int64_t last, int64_t next, float* scratch) {
    T* const out = static_cast<T*>(shape.out) + first;
    with_packing<T>(shape.packing2, [&]<typename W>(const W& weights) {
        for (int64_t e = 0; e < num_groups; ++e) {
            const ExpertGroup& group = groups[e];
            const bool is_last_group = e + 1 == num_groups;
            const ExpertGroup& coming = groups[is_last_group ? 0 : e + 1];
            const Matrix* following = !is_last_group || next >= 0 ? &coming.w2 : nullptr;
            for (int64_t t = 0; t < group.count;) {
                const int tokens = at_once<W>(group.count - t, group.arranged);
                float* const kept = shape.activations + (group.first_row + t) * shape.activation_stride;
                const int32_t* const places = group.tokens + t;
                for (int i = 0; i < tokens; ++i) {  // what is added to, wherever it lies
                    Fetcher(out + places[i] * shape.out_stride).fetch((last - first) * sizeof(T));
                }
                const Slice all[] = {{
                    group.w2, first, t + tokens == group.count ? following : nullptr,
                    is_last_group ? next : first, coming.count, scratch,
                }};
                if (group.arranged) {
                    const float* const all_kept = shape.activations + group.first_row * shape.activation_stride;
                    multiply_arranged<T>(
                        weights, all, last - first, shape.intermediate, all_kept, t, tokens, scratch + PRODUCTS);
                } else {
                    weights.multiply_kept(
                        all, last - first, shape.intermediate, kept, shape.activation_stride, tokens,
                        scratch + PRODUCTS);
                }
                for (int i = 0; i < tokens; ++i) {
                    float* const products = scratch + i * COLUMNS;
                    if (group.bias2) add_bias(products, static_cast<const T*>(group.bias2) + first, last - first);
                    T* row = out + places[i] * shape.out_stride;
                    const float weight = shape.weight_on_input ? 1.0f : group.weights[t + i];
                    for (int64_t c = 0; c < last - first; ++c) {
                        narrow(widened(row[c]) + weight * products[c], row + c);
                    }
                }
                t += tokens;
            }
        }
    });
}

}  // namespace
