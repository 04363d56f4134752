// Vectors of packed codes as operands of dot products, and tokens in the order in which those have
// their columns: operand k has column k of every lane's columns, or of every half lane's.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.hpp"

namespace {

template <int ODD, typename Vector, size_t... I>
inline Vector every_other(Vector a, Vector b, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (2 * I + ODD)...);
#else
    using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int16_t>;
    typedef Index Indices __attribute__((vector_size(sizeof(Vector))));
    return __builtin_shuffle(a, b, Indices{static_cast<Index>(2 * I + ODD)...});
#endif
}

// Vector k becomes every NUM-th element of all of them from element k on.
template <int NUM, typename Vector>
inline void deal(Vector* vectors) {
    if constexpr (NUM > 1) {
        constexpr std::make_index_sequence<sizeof(Vector) / sizeof(vectors[0][0])> all;
        Vector dealt[NUM];
        UNROLL
        for (int i = 0; i < NUM / 2; ++i) {
            dealt[i] = every_other<0>(vectors[2 * i], vectors[2 * i + 1], all);
            dealt[NUM / 2 + i] = every_other<1>(vectors[2 * i], vectors[2 * i + 1], all);
        }
        deal<NUM / 2>(dealt);
        deal<NUM / 2>(dealt + NUM / 2);
        UNROLL
        for (int k = 0; k < NUM; ++k) vectors[k] = dealt[k % 2 * (NUM / 2) + k / 2];
    }
}

// Codes of a KIND, multiplied with numbers of T as float32.
template <typename KIND, typename T>
struct Singles : KIND {
    using Number = float;
    static constexpr int OPERANDS = KIND::LANE_COLUMNS, COLUMNS = OPERANDS * LANES;

    using KIND::KIND;

    template <int K>
    Floats operand(Codes codes) const {
        return KIND::template floats<K>(codes);
    }

    // What is meant by codes, in float32, and rounded to a number.
    static Floats meant(Floats codes, bool has_zero, Floats less, Floats scale) {
        return multiply(has_zero ? add(codes, less) : codes, scale);
    }

    // COLUMNS elements of a token in order; returns their sums in each lane.
    static Floats order(const T* from, float* to) {
        constexpr int VECTORS = Pack<T>::VECTORS;
        Floats vectors[OPERANDS];
        UNROLL
        for (int k = 0; k < OPERANDS; k += VECTORS) {
            Floats pack[VECTORS];
            pack[0] = Pack<T>::template vector<0>(from + k * LANES);
            if constexpr (VECTORS == 2) pack[1] = Pack<T>::template vector<1>(from + k * LANES);
            Pack<T>::put_in_order(pack);
            UNROLL
            for (int i = 0; i < VECTORS; ++i) vectors[k + i] = pack[i];
        }
        deal<OPERANDS>(vectors);
        Floats sums = zeros();
        UNROLL
        for (int k = 0; k < OPERANDS; ++k) {
            sums = add(sums, vectors[k]);
            store(to + k * LANES, vectors[k]);
        }
        return sums;
    }
};

#ifdef PATH_AVX512_BF16
typedef uint16_t Words __attribute__((vector_size(64)));

inline void store(Bf16* to, __m512bh numbers) { _mm512_storeu_si512(to, (__m512i)numbers); }

inline Words words_at(const Bf16* from) { return (Words)_mm512_loadu_si512(from); }

// Codes as bfloat16, whose dot products take two columns a lane at a time.
template <typename KIND>
struct Pairs : KIND {
    using Number = Bf16;
    static constexpr int OPERANDS = KIND::LANE_COLUMNS / 2, COLUMNS = KIND::LANE_COLUMNS * LANES;

    using KIND::KIND;

    template <int K>
    __m512bh operand(Codes codes) const {
        return (__m512bh)KIND::template words<K>(codes);
    }

    static __m512bh meant(__m512bh codes, bool has_zero, Floats less, Floats scale) {
        const __m512i both = (__m512i)codes;
        Floats odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
        Floats even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        if (has_zero) {
            odd = add(odd, less);
            even = add(even, less);
        }
        odd = multiply(odd, scale);
        even = multiply(even, scale);
        const Words rounded = (Words)_mm512_cvtne2ps_pbh(odd, even);
        const Words order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (__m512bh)_mm512_permutexvar_epi16((__m512i)order, (__m512i)rounded);
    }

    static Floats order(const Bf16* from, Bf16* to) {
        Words vectors[OPERANDS];
        UNROLL
        for (int k = 0; k < OPERANDS; ++k) vectors[k] = words_at(from + k * 2 * LANES);
        KIND::order(vectors);
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        Floats sums = zeros();
        UNROLL
        for (int k = 0; k < OPERANDS; ++k) {
            sums = Dot<Bf16>::step(sums, ones, (__m512bh)vectors[k]);
            _mm512_storeu_si512(to + k * 2 * LANES, (__m512i)vectors[k]);
        }
        return sums;
    }
};

struct HalfByteWords {
    static constexpr int LANE_COLUMNS = 8;
    __m512i values;

    explicit HalfByteWords(const HalfByteTable& table) : values(_mm512_loadu_si512(table.twice)) {}

    template <int K>
    __m512i words(Codes codes) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * K), values);
    }
    static Floats checked(Codes, Floats scale) { return scale; }
    static void order(Words (&vectors)[4]) { deal<4>(vectors); }
};

// Both bytes of the bfloat16s that magnitudes of seven bits mean, put together for eight of every sixteen.
struct ByteWords {
    static constexpr int LANE_COLUMNS = 4;
    __m512i high[2], low[2];

    explicit ByteWords(const MagnitudeTable& table)
        : high{_mm512_loadu_si512(table.high), _mm512_loadu_si512(table.high + 64)},
          low{_mm512_loadu_si512(table.low), _mm512_loadu_si512(table.low + 64)} {}

    __m512i high_of(__m512i magnitude) const { return _mm512_permutex2var_epi8(high[0], magnitude, high[1]); }

    template <int K>
    __m512i words_of(__m512i magnitude, __m512i highs, __m512i codes) const {
        constexpr int WITH_SIGN = 0xf8;  // a | (b & c)
        const __m512i sign = _mm512_set1_epi8(-128);
        const __m512i above = _mm512_ternarylogic_epi32(highs, codes, sign, WITH_SIGN);
        const __m512i below = _mm512_permutex2var_epi8(low[0], magnitude, low[1]);
        return K == 0 ? _mm512_unpacklo_epi8(below, above) : _mm512_unpackhi_epi8(below, above);
    }
    static Floats checked(Codes, Floats scale) { return scale; }
    static void order(Words (&vectors)[2]) {
        const __m512i a = (__m512i)vectors[0], b = (__m512i)vectors[1];
        vectors[0] = (Words)_mm512_shuffle_i64x2(a, b, 0x88);
        vectors[1] = (Words)_mm512_shuffle_i64x2(a, b, 0xdd);
    }
};

constexpr MagnitudeTable E4M3_MAGNITUDES(e4m3_bits), WHOLE_MAGNITUDES(whole_bits);

struct E4m3Words : ByteWords {
    explicit E4m3Words(const HalfByteTable&) : ByteWords(E4M3_MAGNITUDES) {}

    template <int K>
    __m512i words(Codes codes) const {
        return words_of<K>(codes, high_of(codes), codes);
    }
};

struct SignedWords : ByteWords {
    explicit SignedWords(const HalfByteTable&) : ByteWords(WHOLE_MAGNITUDES) {}

    template <int K>
    __m512i words(Codes codes) const {
        const __m512i magnitude = _mm512_abs_epi8(codes), least = _mm512_set1_epi8(-128);
        // 128 is the one magnitude of eight bits.
        const __mmask64 is_least = _mm512_cmpeq_epi8_mask(codes, least);
        const __m512i highs = _mm512_mask_mov_epi8(high_of(magnitude), is_least, _mm512_set1_epi8(0x43));
        return words_of<K>(magnitude, highs, codes);
    }
};
#endif

// The kinds of codes as they are multiplied with numbers of T.
template <typename T>
struct Kinds {
    using Halves = Singles<HalfBytes, T>;
    using Whole = Singles<SignedBytes, T>;
    using Narrow = Singles<E4m3Bytes, T>;
};

#ifdef PATH_AVX512_BF16
template <>
struct Kinds<Bf16> {
    using Halves = Pairs<HalfByteWords>;
    using Whole = Pairs<SignedWords>;
    using Narrow = Pairs<E4m3Words>;
};
#endif

}  // namespace
