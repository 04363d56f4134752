// What is done to each token's row by itself: norm, rotary embedding, and what is added to it.
#pragma once

#include <math.h>

#include "kernels.hpp"
#include "simd.hpp"

// Before a loop whose result may lie where what it reads lies, but nowhere else beside it.
#define IN_PLACE _Pragma("GCC ivdep")

namespace {

using native::RmsNorm;
using native::Rotation;

template <typename T>
float sum_of_squares(const T* row, int64_t width) {
    constexpr int WIDTH = Pack<T>::WIDTH, VECTORS = Pack<T>::VECTORS;
    Floats sums[VECTORS];
    for (Floats& sum : sums) sum = zeros();
    const auto add_pack = [&](const T* from) {
        const Floats even = Pack<T>::template vector<0>(from);
        sums[0] = multiply_add(even, even, sums[0]);
        if constexpr (VECTORS == 2) {
            const Floats odd = Pack<T>::template vector<1>(from);
            sums[1] = multiply_add(odd, odd, sums[1]);
        }
    };
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) add_pack(row + i);
    if (i < width) {
        Padded<T, WIDTH> padded;
        add_pack(padded.from(row + i, width - i));
    }
    float total = 0.0f;
    for (const Floats& each : sums) total += sum(each);
    return total;
}

// A head divided by the root of its mean square and rounded, then multiplied by the weight and rounded
// again; with an offset it is rounded only then.
template <typename T>
void norm_head(const RmsNorm& shape, const T* head, T* out) {
    const T* const weight = static_cast<const T*>(shape.weight);
    const float mean = sum_of_squares(head, shape.width) / static_cast<float>(shape.width);
    const float scale = 1.0f / sqrtf(mean + shape.epsilon);
    if (shape.offset != 0.0f) {
        IN_PLACE for (int64_t i = 0; i < shape.width; ++i) {
            narrow(widened(head[i]) * scale * (widened(weight[i]) + shape.offset), out + i);
        }
        return;
    }
    IN_PLACE for (int64_t i = 0; i < shape.width; ++i) {
        T rounded;
        narrow(widened(head[i]) * scale, &rounded);
        narrow(widened(rounded) * widened(weight[i]), out + i);
    }
}

// All heads of rows [first, last).
template <typename T>
void rms_norm(const RmsNorm& shape, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        const T* const row = static_cast<const T*>(shape.x) + t * shape.x_stride;
        T* const out = static_cast<T*>(shape.out) + t * shape.out_stride;
        for (int64_t at = 0; at < shape.heads * shape.width; at += shape.width) norm_head(shape, row + at, out + at);
    }
}

// Turn pairs of elements, `apart` from one another, whose firsts are STEP apart.
template <typename T, int STEP>
void turn(T* head, int64_t pairs, int64_t apart, const float* cosines, const float* sines) {
    for (int64_t i = 0; i < pairs; ++i) {
        T *const first = head + i * STEP, *const second = first + apart;
        const float a = widened(*first), b = widened(*second);
        narrow(a * cosines[i] - b * sines[i], first);
        narrow(b * cosines[i] + a * sines[i], second);
    }
}

// Heads of rows [first, last) in place.
template <typename T>
void rotate(const Rotation& shape, int64_t first, int64_t last, float* scratch) {
    const int64_t pairs = shape.pairs;
    float *cosines = scratch, *sines = scratch + pairs;
    for (int64_t t = first; t < last; ++t) {
        for (int64_t i = 0; i < pairs; ++i) {
            const float angle = static_cast<float>(shape.positions[t]) * shape.frequencies[i];
            cosines[i] = cosf(angle) * shape.magnitude;
            sines[i] = sinf(angle) * shape.magnitude;
        }
        T* head = static_cast<T*>(shape.rows) + t * shape.stride;
        for (int64_t h = 0; h < shape.heads; ++h, head += shape.head_dim) {
            if (shape.interleaved) {
                turn<T, 2>(head, pairs, 1, cosines, sines);
            } else {
                turn<T, 1>(head, pairs, pairs, cosines, sines);
            }
        }
    }
}

template <typename T>
void add(void* out, const void* x, int64_t count) {
    T* const to = static_cast<T*>(out);
    const T* const from = static_cast<const T*>(x);
    IN_PLACE for (int64_t i = 0; i < count; ++i) narrow(widened(to[i]) + widened(from[i]), to + i);
}

}  // namespace
