// Eight lanes: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "tables.hpp"

namespace {

constexpr int SUMS = 8;        // dot products that are taken together in attention
constexpr int VALUE_SUMS = 8;  // vectors of weighted values that are summed together
constexpr int LANES = 8;
constexpr int GEMM_ROWS = 2;   // rows of a weight matrix that are multiplied together
constexpr int GEMM_TOKENS = 4; // by so many tokens at most
constexpr int GEMM_IN_TURN = 0; // tokens: rows are multiplied together however few there are
constexpr int CODE_ROWS = 1;   // rows of packed codes that are multiplied together
constexpr int CODE_TOKENS = 4; // by so many tokens at most

using Floats = __m256;

inline Floats splat(float value) { return _mm256_set1_ps(value); }
inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats lesser(Floats a, Floats b) { return _mm256_min_ps(a, b); }

inline Floats widen(const float* from) { return _mm256_loadu_ps(from); }

// Every other one of 2 * LANES elements: one instruction each.
inline __m256i pairs_of(const Bf16* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline Floats widen_even(const Bf16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs_of(from), 16));
}

inline Floats widen_odd(const Bf16* from) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs_of(from), _mm256_set1_epi32(-65536)));
}

// The reverse: `even` becomes the first LANES of them, `odd` the others.
inline void interleave(Floats& even, Floats& odd) {
    const Floats low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    even = _mm256_permute2f128_ps(low, high, 0x20);
    odd = _mm256_permute2f128_ps(low, high, 0x31);
}

inline Floats widen(const Fp16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }

inline float sum(Floats values) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// 2^x split into its whole and its broken power; x is within -126 and 127.
inline Floats whole_power(Floats x, Floats* broken) {
    const Floats rounded = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    *broken = _mm256_sub_ps(x, rounded);
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(rounded), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

inline Floats clamped(Floats x) {
    return _mm256_min_ps(_mm256_max_ps(x, splat(-126.0f)), splat(127.0f));
}

// Inlined before GCC asks which functions do nothing: it thinks that of this one, and leaves calls out.
__attribute__((always_inline)) inline void prefetch(const char* address) { _mm_prefetch(address, _MM_HINT_T1); }

// Copy 64 bytes to where a cache line begins, past the caches; `streamed` comes after the last.
inline void stream_line(char* to, const char* from) {
    const __m256i* const halves = reinterpret_cast<const __m256i*>(from);
    const __m256i first = _mm256_loadu_si256(halves), second = _mm256_loadu_si256(halves + 1);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), first);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, second);
}
inline void streamed() { _mm_sfence(); }

// A vector of packed codes: each lane has those of columns that follow one another.
using Codes = __m256i;

inline Codes codes_at(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// For each lane one of up to eight floats.
inline Floats spread(const float* from, const int32_t* lanes) {
    const __m256i which = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), which);
}

// Codes as float32, one for each lane at a time: number CODE of those that it has.
struct HalfBytes {
    static constexpr int LANE_COLUMNS = 8;
    __m256i high, low;  // bytes of the bfloat16 that each means

    explicit HalfBytes(const HalfByteTable& table) : high(twice(table.high)), low(twice(table.low)) {}

    static __m256i twice(const uint8_t* bytes) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    }

    // Bytes and then words are unpacked within each 128 bits, so that byte b of lane l has to be
    // byte 4b + l of them before. The compiler does once what several codes have in common.
    template <int CODE>
    Floats floats(Codes codes) const {
        const __m256i order = _mm256_set_epi32(
            0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400, 0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
        const __m256i ordered = _mm256_shuffle_epi8(codes, order);
        const __m256i halves = CODE & 1 ? _mm256_srli_epi16(ordered, 4) : ordered;
        const __m256i four_bits = _mm256_and_si256(halves, _mm256_set1_epi8(15));
        const __m256i highs = _mm256_shuffle_epi8(high, four_bits), lows = _mm256_shuffle_epi8(low, four_bits);
        const __m256i words = CODE & 4 ? _mm256_unpackhi_epi8(lows, highs) : _mm256_unpacklo_epi8(lows, highs);
        const __m256i none = _mm256_setzero_si256();
        return _mm256_castsi256_ps(
            CODE & 2 ? _mm256_unpackhi_epi16(none, words) : _mm256_unpacklo_epi16(none, words));
    }
};

struct SignedBytes {
    static constexpr int LANE_COLUMNS = 4;

    explicit SignedBytes(const HalfByteTable&) {}

    template <int CODE>
    Floats floats(Codes codes) const {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(codes, 24 - 8 * CODE), 24));
    }
};

struct E4m3Bytes {
    static constexpr int LANE_COLUMNS = 4;

    explicit E4m3Bytes(const HalfByteTable&) {}

    template <int CODE>
    Floats floats(Codes codes) const {
        const __m256i first = _mm256_srai_epi32(_mm256_slli_epi32(codes, 24 - 8 * CODE), 4);
        const __m256i bits = _mm256_and_si256(first, _mm256_set1_epi32(static_cast<int>(0x87f00000u)));
        return _mm256_mul_ps(_mm256_castsi256_ps(bits), splat(E4M3_UNIT));
    }

    // The scale, or no number if any of the codes is none.
    static Floats checked(Codes codes, Floats scale) {
        const __m256i most = _mm256_set1_epi8(0x7f);
        const int any = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(codes, most), most));
        return __builtin_expect(any, 0) ? splat(__builtin_nanf("")) : scale;
    }
};

}  // namespace
