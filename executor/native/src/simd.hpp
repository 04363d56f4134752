// What every path builds from its own vectors: partial loads, powers of two, dot products.
#pragma once

// Before a loop whose length is known: its arrays become registers only if it is unrolled early.
#define UNROLL _Pragma("GCC unroll 16")
#define NO_UNROLL _Pragma("GCC unroll 1")

#if defined(PATH_AVX512) || defined(PATH_AVX512_BF16)
#include "simd_avx512.hpp"
#elif defined(PATH_AVX2)
#include "simd_avx2.hpp"
#else
#include "simd_portable.hpp"
#endif

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

// WIDTH elements as VECTORS of float32, in an order of their own that `put_in_order` undoes: sums
// over all of them need none, and a bfloat16 is widened faster in pairs.
template <typename T>
struct Pack {
    static constexpr int VECTORS = 1, WIDTH = LANES;

    template <int VECTOR>
    static Floats vector(const T* from) {
        return widen(from);
    }
    static void put_in_order(Floats (&)[VECTORS]) {}
};

template <>
struct Pack<Bf16> {
    static constexpr int VECTORS = 2, WIDTH = 2 * LANES;

    template <int VECTOR>
    static Floats vector(const Bf16* from) {
        return VECTOR == 0 ? widen_even(from) : widen_odd(from);
    }
    static void put_in_order(Floats (&pair)[VECTORS]) { interleave(pair[0], pair[1]); }
};

// The last, partial step of a row of T, padded with zeros.
template <typename T, int WIDTH>
struct Padded {
    T elements[WIDTH];

    const T* from(const T* row, int64_t count) {
        std::memset(elements, 0, sizeof elements);
        std::memcpy(elements, row, count * sizeof(T));
        return elements;
    }
};

// Dot products of rows, STEP elements at a time in PASSES passes, into LANES sums.
template <typename T>
struct Dot {
    static constexpr int STEP = Pack<T>::WIDTH, PASSES = Pack<T>::VECTORS;
    static constexpr bool IN_PLACE = sizeof(T) == sizeof(float);  // `prepare` only copies
    using Operand = Floats;

    template <int PASS>
    static Operand load(const T* from) {
        return Pack<T>::template vector<PASS>(from);
    }

    static Floats step(Floats sums, Operand a, Operand b) { return multiply_add(a, b, sums); }

    // A row that is used again and again is widened once. It is padded with zeros.
    static void prepare(const T* row, int64_t count, float* prepared) {
        Padded<T, STEP> padded;
        for (int64_t i = 0; i < count; i += STEP, prepared += STEP) {
            const T* from = i + STEP <= count ? row + i : padded.from(row + i, count - i);
            store(prepared, load<0>(from));
            if constexpr (PASSES == 2) store(prepared + LANES, load<1>(from));
        }
    }

    template <int PASS>
    static Operand prepared(const float* row, int64_t i) {
        return widen(row + i + PASS * LANES);
    }

    // Where in a prepared row element i lies, a multiple of STEP.
    static float* place(float* row, int64_t i) { return row + i; }
};

#ifdef PATH_AVX512_BF16
template <>
struct Dot<Bf16> {
    static constexpr int STEP = 2 * LANES, PASSES = 1;
    static constexpr bool IN_PLACE = true;
    using Operand = __m512bh;

    template <int PASS>
    static Operand load(const Bf16* from) {
        return (__m512bh)_mm512_loadu_si512(from);
    }

    static Floats step(Floats sums, Operand a, Operand b) { return _mm512_dpbf16_ps(sums, a, b); }

    static void prepare(const Bf16* row, int64_t count, float* prepared) {
        std::memcpy(prepared, row, count * sizeof(Bf16));
        std::memset(reinterpret_cast<Bf16*>(prepared) + count, 0, (-count & (STEP - 1)) * 2);
    }

    template <int PASS>
    static Operand prepared(const float* row, int64_t i) {
        return load<PASS>(reinterpret_cast<const Bf16*>(row) + i);
    }

    static float* place(float* row, int64_t i) { return row + i / 2; }
};
#endif

#if defined(PATH_AVX512) || defined(PATH_AVX512_BF16)
// In each 128 bits the sums of those of four vectors.
inline Floats four_sums(Floats a, Floats b, Floats c, Floats d) {
    const auto folded = [](Floats x, Floats y) {  // in each 128 bits: (x, y, x, y)
        return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)));
    };
    const __m512d ab = folded(a, b), cd = folded(c, d);
    return _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}
#endif

// 16 rows of 16 words become as many columns, `apart` words from row to row; they may lie where those do.
inline void transpose(const void* const (&rows)[16], float* to, int64_t apart) {
#if defined(PATH_AVX512) || defined(PATH_AVX512_BF16)
    __m512 row[16], four[16];
    UNROLL
    for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(rows[i]);
    UNROLL
    for (int i = 0; i < 16; i += 4) {  // four[i + c] has in its 128 bits k column 4 k + c of rows i to i + 3
        const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(row[i], row[i + 1]));
        const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(row[i], row[i + 1]));
        const __m512d next_low = _mm512_castps_pd(_mm512_unpacklo_ps(row[i + 2], row[i + 3]));
        const __m512d next_high = _mm512_castps_pd(_mm512_unpackhi_ps(row[i + 2], row[i + 3]));
        four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, next_low));
        four[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, next_low));
        four[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, next_high));
        four[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, next_high));
    }
    UNROLL
    for (int c = 0; c < 4; ++c) {
        const __m512 first = _mm512_shuffle_f32x4(four[c], four[c + 4], 0x44);
        const __m512 second = _mm512_shuffle_f32x4(four[c + 8], four[c + 12], 0x44);
        const __m512 third = _mm512_shuffle_f32x4(four[c], four[c + 4], 0xee);
        const __m512 last = _mm512_shuffle_f32x4(four[c + 8], four[c + 12], 0xee);
        _mm512_storeu_ps(to + c * apart, _mm512_shuffle_f32x4(first, second, 0x88));
        _mm512_storeu_ps(to + (c + 4) * apart, _mm512_shuffle_f32x4(first, second, 0xdd));
        _mm512_storeu_ps(to + (c + 8) * apart, _mm512_shuffle_f32x4(third, last, 0x88));
        _mm512_storeu_ps(to + (c + 12) * apart, _mm512_shuffle_f32x4(third, last, 0xdd));
    }
#else
    float words[16][16];
    for (int i = 0; i < 16; ++i) std::memcpy(words[i], rows[i], sizeof words[i]);
    for (int c = 0; c < 16; ++c) {
        for (int i = 0; i < 16; ++i) std::memcpy(to + c * apart + i, &words[i][c], sizeof(float));
    }
#endif
}

// targets[i] = the sum over the lanes of partial[i].
inline void finish_sums(const Floats* partial, float* targets) {
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

// targets[i] += the sum over the lanes of partial[i].
template <int NUM>
inline void add_sums(const Floats (&partial)[NUM], float* targets) {
#if defined(PATH_AVX512) || defined(PATH_AVX512_BF16)
    if constexpr (NUM == 4) {
        const __m512 all = four_sums(partial[0], partial[1], partial[2], partial[3]);
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        _mm_storeu_ps(targets, _mm_add_ps(_mm_loadu_ps(targets), four));
        return;
    }
#endif
    UNROLL
    for (int i = 0; i < NUM; ++i) targets[i] += sum(partial[i]);
}

}  // namespace
