// Sixteen lanes: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "tables.hpp"

namespace {

constexpr int SUMS = 16;       // dot products that are taken together in attention
constexpr int VALUE_SUMS = 16; // vectors of weighted values that are summed together
constexpr int LANES = 16;
constexpr int GEMM_ROWS = 4;   // rows of a weight matrix that are multiplied together
constexpr int GEMM_TOKENS = 6; // by so many tokens at most
constexpr int GEMM_IN_TURN = 6; // tokens at most, with which rows are multiplied one after the other
constexpr int CODE_ROWS = 4;   // rows of packed codes that are multiplied together
constexpr int CODE_TOKENS = 4; // by so many tokens at most

using Floats = __m512;

inline Floats splat(float value) { return _mm512_set1_ps(value); }
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats lesser(Floats a, Floats b) { return _mm512_min_ps(a, b); }

inline Floats widen(const float* from) { return _mm512_loadu_ps(from); }

// Every other one of 2 * LANES elements: one instruction each.
inline Floats widen_even(const Bf16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16));
}

inline Floats widen_odd(const Bf16* from) {
    const __m512i high = _mm512_set1_epi32(-65536);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), high));
}

// The reverse: `even` becomes the first LANES of them, `odd` the others.
inline void interleave(Floats& even, Floats& odd) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const Floats low = _mm512_permutex2var_ps(even, first, odd);
    odd = _mm512_permutex2var_ps(even, second, odd);
    even = low;
}

inline Floats widen(const Fp16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline Floats widen(const Bf16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Floats widen(const E4m3* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m512i most = _mm512_set1_epi32(0x7f << 20);
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepi8_epi32(bytes), 20);  // the sign is the last one too
    const __m512i magnitude = _mm512_and_si512(bits, most);
    const __m512i scaled = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(magnitude), splat(E4M3_UNIT)));
    const __mmask16 is_none = _mm512_cmpeq_epi32_mask(magnitude, most);
    const __m512i value = _mm512_mask_mov_epi32(scaled, is_none, _mm512_set1_epi32(0x7fc00000));
    constexpr int WITH_SIGN = 0xf8;  // a | (b & c)
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(value, bits, _mm512_set1_epi32(-2147483647 - 1), WITH_SIGN));
}

inline Floats widen(const E8m0* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23), none = _mm512_set1_epi32(255 << 23);
    const __m512i powers = _mm512_max_epi32(exponents, _mm512_set1_epi32(1 << 22));
    const __mmask16 is_none = _mm512_cmpeq_epi32_mask(exponents, none);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(powers, is_none, _mm512_set1_epi32(0x7fc00000)));
}

inline void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }

inline float sum(Floats values) { return _mm512_reduce_add_ps(values); }

// 2^x split into its whole and its broken power; x is within -126 and 127.
inline Floats whole_power(Floats x, Floats* broken) {
    const Floats rounded = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    *broken = _mm512_sub_ps(x, rounded);
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(rounded), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

inline Floats clamped(Floats x) {
    return _mm512_min_ps(_mm512_max_ps(x, splat(-126.0f)), splat(127.0f));
}

// Inlined before GCC asks which functions do nothing: it thinks that of this one, and leaves calls out.
__attribute__((always_inline)) inline void prefetch(const char* address) { _mm_prefetch(address, _MM_HINT_T1); }

// Copy 64 bytes to where a cache line begins, past the caches; `streamed` comes after the last.
inline void stream_line(char* to, const char* from) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
inline void streamed() { _mm_sfence(); }

// A vector of packed codes: each lane has those of columns that follow one another.
using Codes = __m512i;

inline Codes codes_at(const uint8_t* from) {
    Codes codes = _mm512_loadu_si512(from);
    asm("" : "+v"(codes));  // or each use of them would load them again
    return codes;
}

// For each lane one of up to sixteen floats.
inline Floats spread(const float* from, const int32_t* lanes) {
    return _mm512_permutexvar_ps(_mm512_loadu_si512(lanes), _mm512_loadu_ps(from));
}

// Codes as float32, one for each lane at a time: number CODE of those that it has.
struct HalfBytes {
    static constexpr int LANE_COLUMNS = 8;
    Floats values;

    explicit HalfBytes(const HalfByteTable& table) : values(_mm512_loadu_ps(table.values)) {}

    template <int CODE>
    Floats floats(Codes codes) const {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * CODE), values);
    }
};

struct SignedBytes {
    static constexpr int LANE_COLUMNS = 4;

    explicit SignedBytes(const HalfByteTable&) {}

    template <int CODE>
    Floats floats(Codes codes) const {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * CODE), 24));
    }
};

struct E4m3Bytes {
    static constexpr int LANE_COLUMNS = 4;

    explicit E4m3Bytes(const HalfByteTable&) {}

    template <int CODE>
    Floats floats(Codes codes) const {
        const __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * CODE), 4);
        const __m512i bits = _mm512_and_si512(first, _mm512_set1_epi32(static_cast<int>(0x87f00000u)));
        return _mm512_mul_ps(_mm512_castsi512_ps(bits), splat(E4M3_UNIT));
    }

    // The scale, or no number if any of the codes is none.
    static Floats checked(Codes codes, Floats scale) {
        const __m512i most = _mm512_set1_epi8(0x7f);
        const bool any = _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, most), most);
        return __builtin_expect(any, 0) ? splat(__builtin_nanf("")) : scale;
    }
};

}  // namespace
