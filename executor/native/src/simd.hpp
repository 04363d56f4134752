// What every path builds from its own vectors: partial loads, powers of two, dot products.
#pragma once

#if defined(PATH_AVX512) || defined(PATH_AVX512_BF16)
#include "simd_avx512.hpp"
#elif defined(PATH_AVX2)
#include "simd_avx2.hpp"
#else
#include "simd_portable.hpp"
#endif

// Before a loop whose length is known: its arrays become registers only if it is unrolled early.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

// 2^x by a polynomial, to about two units in the last place; below 2^-126 it stays there.
inline Floats power_of_two(Floats x) {
    Floats broken;
    const Floats whole = whole_power(clamped(x), &broken);
    Floats value = splat(1.5403530e-4f);  // ln(2)^k / k! from k = 6 down
    value = multiply_add(value, broken, splat(1.3333558e-3f));
    value = multiply_add(value, broken, splat(9.6181291e-3f));
    value = multiply_add(value, broken, splat(5.5504109e-2f));
    value = multiply_add(value, broken, splat(2.4022651e-1f));
    value = multiply_add(value, broken, splat(6.9314718e-1f));
    value = multiply_add(value, broken, splat(1.0f));
    return multiply(whole, value);
}

// WIDTH elements as float32, in an order of their own that `put_in_order` undoes: sums over all of
// them need none, and a bfloat16 is widened faster in pairs.
template <typename T>
struct Pack {
    static constexpr int VECTORS = 1, WIDTH = LANES;
    Floats vectors[VECTORS];

    static Pack load(const T* from) { return {{widen(from)}}; }
    static void put_in_order(Floats (&)[VECTORS]) {}
};

template <>
struct Pack<Bf16> {
    static constexpr int VECTORS = 2, WIDTH = 2 * LANES;
    Floats vectors[VECTORS];

    static Pack load(const Bf16* from) {
        Pack pack;
        split(from, pack.vectors[0], pack.vectors[1]);
        return pack;
    }
    static void put_in_order(Floats (&pair)[VECTORS]) { interleave(pair[0], pair[1]); }
};

// The first `count` of a pack's elements, then zeros.
template <typename T>
Pack<T> load_part(const T* from, int64_t count) {
    T padded[Pack<T>::WIDTH] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return Pack<T>::load(padded);
}

// Dot products of rows, STEP elements at a time, into LANES sums.
template <typename T>
struct Dot {
    using Operand = Pack<T>;
    static constexpr int STEP = Operand::WIDTH;

    static Operand load(const T* from) { return Operand::load(from); }
    static Operand part(const T* from, int64_t count) { return load_part(from, count); }

    static Floats step(Floats sums, const Operand& a, const Operand& b) {
        UNROLL
        for (int v = 0; v < Operand::VECTORS; ++v) {
            sums = multiply_add(a.vectors[v], b.vectors[v], sums);
        }
        return sums;
    }

    // A row that is used again and again is widened once. It is padded with zeros.
    static void prepare(const T* row, int64_t count, float* prepared) {
        for (int64_t i = 0; i < count; i += STEP, prepared += STEP) {
            const Operand pack = i + STEP <= count ? load(row + i) : part(row + i, count - i);
            for (int v = 0; v < Operand::VECTORS; ++v) store(prepared + v * LANES, pack.vectors[v]);
        }
    }

    static Operand prepared(const float* row, int64_t i) {
        Operand pack;
        UNROLL
        for (int v = 0; v < Operand::VECTORS; ++v) pack.vectors[v] = widen(row + i + v * LANES);
        return pack;
    }
};

#ifdef PATH_AVX512_BF16
template <>
struct Dot<Bf16> {
    using Operand = __m512bh;
    static constexpr int STEP = 2 * LANES;

    static Operand load(const Bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

    static Operand part(const Bf16* from, int64_t count) {
        const __mmask32 mask = (1u << count) - 1u;
        return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
    }

    static Floats step(Floats sums, Operand a, Operand b) { return _mm512_dpbf16_ps(sums, a, b); }

    static void prepare(const Bf16* row, int64_t count, float* prepared) {
        std::memcpy(prepared, row, count * sizeof(Bf16));
        std::memset(reinterpret_cast<Bf16*>(prepared) + count, 0, (-count & (STEP - 1)) * 2);
    }

    static Operand prepared(const float* row, int64_t i) {
        return load(reinterpret_cast<const Bf16*>(row) + i);
    }
};
#endif

// targets[i] = the sum over the lanes of partial[i].
inline void finish_sums(const Floats (&partial)[SUMS], float* targets) {
#if defined(PATH_AVX512) || defined(PATH_AVX512_BF16)
    // A tree of transpositions: each level halves the vectors and adds what they hold.
    __m512 eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i) {
        const int first = i < 4 ? i : i + 4;
        const __m512 a = partial[first], b = partial[first + 4];
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 a = eight[i], b = eight[i + 4];
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512 a = four[i], b = four[i + 2];
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    // In each 128 bits: (a, c, a, c) and (b, d, b, d), each twice with half of its sum.
    const __m512 low = _mm512_unpacklo_ps(two[0], two[1]), high = _mm512_unpackhi_ps(two[0], two[1]);
    _mm512_storeu_ps(targets, _mm512_add_ps(low, high));
#else
    UNROLL
    for (int i = 0; i < SUMS; ++i) targets[i] = sum(partial[i]);
#endif
}

}  // namespace
