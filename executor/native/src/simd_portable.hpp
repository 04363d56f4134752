// Four lanes in the compiler's own vectors: SSE2 on x86, NEON on ARM, plain code elsewhere.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "tables.hpp"

namespace {

constexpr int SUMS = 8;        // dot products that are taken together in attention
constexpr int VALUE_SUMS = 8;  // vectors of weighted values that are summed together
constexpr int LANES = 4;
constexpr int GEMM_ROWS = 2;   // rows of a weight matrix that are multiplied together
constexpr int GEMM_TOKENS = 4; // by so many tokens at most
constexpr int GEMM_IN_TURN = 0; // tokens: rows are multiplied together however few there are
constexpr int CODE_ROWS = 1;   // rows of packed codes that are multiplied together
constexpr int CODE_TOKENS = 4; // by so many tokens at most

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

inline Floats splat(float value) { return Floats{value, value, value, value}; }
inline Floats zeros() { return splat(0.0f); }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats subtract(Floats a, Floats b) { return a - b; }
inline Floats multiply(Floats a, Floats b) { return a * b; }
inline Floats divide(Floats a, Floats b) { return a / b; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }
inline Floats lesser(Floats a, Floats b) { return a < b ? a : b; }

inline Floats widen(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline Words widen_bits(const void* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Words);
}

// Every other one of 2 * LANES elements: one instruction each.
inline Words pairs_of(const Bf16* from) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return pairs;
}

inline Floats widen_even(const Bf16* from) { return (Floats)(pairs_of(from) << 16); }
inline Floats widen_odd(const Bf16* from) { return (Floats)(pairs_of(from) & 0xffff0000u); }

// The reverse: `even` becomes the first LANES of them, `odd` the others.
inline void interleave(Floats& even, Floats& odd) {
    const Floats first = {even[0], odd[0], even[1], odd[1]};
    odd = Floats{even[2], odd[2], even[3], odd[3]};
    even = first;
}

inline Floats widen(const Fp16* from) {
    const Words bits = widen_bits(from), magnitude = (bits & 0x7fffu) << 13;
    const Words scaled = (Words)((Floats)magnitude * splat(0x1p112f));
    const Words special = magnitude | 0x7f800000u;
    const Words is_special = (Words)((bits & 0x7c00u) == 0x7c00u);
    return (Floats)(((bits & 0x8000u) << 16) | (is_special & special) | (~is_special & scaled));
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline float sum(Floats values) { return (values[0] + values[2]) + (values[1] + values[3]); }

// 2^x split into its whole and its broken power; x is within -126 and 127.
inline Floats whole_power(Floats x, Floats* broken) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    const Floats rounded = x + magic;
    *broken = x - (rounded - magic);
    const Integers whole = (Integers)rounded - 0x4b400000;
    return (Floats)((whole + 127) << 23);
}

inline Floats clamped(Floats x) {
    const Floats low = splat(-126.0f), high = splat(127.0f);
    const Floats raised = greater(x, low);
    return raised < high ? raised : high;
}

// Inlined before GCC asks which functions do nothing: it thinks that of this one, and leaves calls out.
__attribute__((always_inline)) inline void prefetch(const char* address) { __builtin_prefetch(address, 0, 2); }

// Copy 64 bytes to where a cache line begins, past the caches where the compiler knows how to;
// `streamed` comes after the last.
inline void stream_line(char* to, const char* from) {
#ifdef __SSE2__
    UNROLL
    for (int part = 0; part < 64; part += 16) {
        const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + part), here);
    }
#else
    std::memcpy(to, from, 64);
#endif
}
inline void streamed() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// A vector of packed codes: each lane has those of columns that follow one another.
using Codes = Words;

inline Codes codes_at(const uint8_t* from) {
    Codes codes;
    std::memcpy(&codes, from, sizeof codes);
    return codes;
}

// For each lane one of some floats.
inline Floats spread(const float* from, const int32_t* lanes) {
    return Floats{from[lanes[0]], from[lanes[1]], from[lanes[2]], from[lanes[3]]};
}

// Codes as float32, one for each lane at a time: number CODE of those that it has.
struct HalfBytes {
    static constexpr int LANE_COLUMNS = 8;
    const float* values;

    explicit HalfBytes(const HalfByteTable& table) : values(table.values) {}

    template <int CODE>
    Floats floats(Codes codes) const {
        const Words which = codes >> (4 * CODE) & 15u;
        return Floats{values[which[0]], values[which[1]], values[which[2]], values[which[3]]};
    }
};

template <int BYTE>
Integers first_byte(Codes codes) {
    return (Integers)(codes << (24 - 8 * BYTE));
}

struct SignedBytes {
    static constexpr int LANE_COLUMNS = 4;

    explicit SignedBytes(const HalfByteTable&) {}

    template <int CODE>
    Floats floats(Codes codes) const {
        return __builtin_convertvector(first_byte<CODE>(codes) >> 24, Floats);
    }
};

struct E4m3Bytes {
    static constexpr int LANE_COLUMNS = 4;

    explicit E4m3Bytes(const HalfByteTable&) {}

    template <int CODE>
    Floats floats(Codes codes) const {
        const Words bits = (Words)(first_byte<CODE>(codes) >> 4) & 0x87f00000u;
        return (Floats)bits * splat(E4M3_UNIT);
    }

    // The scale, or no number if any of the codes is none: then adding one carries into its sign.
    static Floats checked(Codes codes, Floats scale) {
        const Words carried = ((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
        const bool any = carried[0] | carried[1] | carried[2] | carried[3];
        return __builtin_expect(any, 0) ? splat(__builtin_nanf("")) : scale;
    }
};

}  // namespace
