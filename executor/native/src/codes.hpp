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

// A scale, or no number if any of the codes is none, as their kind may have one that is.
template <typename KIND>
inline Floats checked(Codes codes, Floats scale) {
    if constexpr (requires { KIND::checked(codes, scale); }) return KIND::checked(codes, scale);
    return scale;
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

#if defined(PATH_AVX512_BF16) || defined(PATH_AMX)
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
            sums = _mm512_dpbf16_ps(sums, ones, (__m512bh)vectors[k]);
            _mm512_storeu_si512(to + k * 2 * LANES, (__m512i)vectors[k]);
        }
        return sums;
    }
};

struct HalfByteWords {
    static constexpr int LANE_COLUMNS = 8;
    __m512i values;
    const HalfByteTable& table;

    explicit HalfByteWords(const HalfByteTable& table) : values(_mm512_loadu_si512(table.twice)), table(table) {}


    template <int K>
    __m512i words(Codes codes) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * K), values);
    }
    static void order(Words (&vectors)[4]) { deal<4>(vectors); }
};

// Both bytes of the bfloat16s that magnitudes of seven bits mean, put together for eight of every sixteen.
struct ByteWords {
    static constexpr int LANE_COLUMNS = 4;
    __m512i high[2], low[2];

    explicit ByteWords(const MagnitudeTable& table)
        : high{_mm512_loadu_si512(table.high), _mm512_loadu_si512(table.high + 64)},
          low{_mm512_loadu_si512(table.low), _mm512_loadu_si512(table.low + 64)} {}

    // Magnitudes times a scale, rounded.
    ByteWords(const MagnitudeTable& table, float scale) {
        __m512i words[4];
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const Bf16* const from = reinterpret_cast<const Bf16*>(table.bits) + i * 2 * LANES;
            const Floats first = multiply(widen(from), splat(scale));
            const Floats second = multiply(widen(from + LANES), splat(scale));
            words[i] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        }
        alignas(64) uint8_t bytes[64];
        for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(2 * i);
        const __m512i even = _mm512_load_si512(bytes), odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
        UNROLL
        for (int i = 0; i < 2; ++i) {
            low[i] = _mm512_permutex2var_epi8(words[2 * i], even, words[2 * i + 1]);
            high[i] = _mm512_permutex2var_epi8(words[2 * i], odd, words[2 * i + 1]);
        }
    }

    __m512i high_of(__m512i magnitude) const { return _mm512_permutex2var_epi8(high[0], magnitude, high[1]); }
    __m512i low_of(__m512i magnitude) const { return _mm512_permutex2var_epi8(low[0], magnitude, low[1]); }

    template <int K>
    static __m512i words_of(__m512i lows, __m512i highs, __m512i codes) {
        constexpr int WITH_SIGN = 0x78;  // a ^ (b & c)
        const __m512i above = _mm512_ternarylogic_epi32(highs, codes, _mm512_set1_epi8(-128), WITH_SIGN);
        return K == 0 ? _mm512_unpacklo_epi8(lows, above) : _mm512_unpackhi_epi8(lows, above);
    }
    static void order(Words (&vectors)[2]) {
        const __m512i a = (__m512i)vectors[0], b = (__m512i)vectors[1];
        vectors[0] = (Words)_mm512_shuffle_i64x2(a, b, 0x88);
        vectors[1] = (Words)_mm512_shuffle_i64x2(a, b, 0xdd);
    }
};

constexpr MagnitudeTable E4M3_MAGNITUDES(e4m3_bits), WHOLE_MAGNITUDES(whole_bits);

struct E4m3Words : ByteWords {
    using Scaled = E4m3Words;

    explicit E4m3Words(const HalfByteTable&) : ByteWords(E4M3_MAGNITUDES) {}
    explicit E4m3Words(float scale) : ByteWords(E4M3_MAGNITUDES, scale) {}

    template <int K>
    __m512i words(Codes codes) const {
        return words_of<K>(low_of(codes), high_of(codes), codes);
    }
};

template <bool IS_SCALED>
struct SignedWordsOf : ByteWords {
    using Scaled = SignedWordsOf<true>;
    Bf16 least;  // 128 is the one magnitude of eight bits

    explicit SignedWordsOf(const HalfByteTable&) : ByteWords(WHOLE_MAGNITUDES) { narrow(128.0f, &least); }
    explicit SignedWordsOf(float scale) : ByteWords(WHOLE_MAGNITUDES, scale) { narrow(128.0f * scale, &least); }

    template <int K>
    __m512i words(Codes codes) const {
        const __m512i magnitude = _mm512_abs_epi8(codes);
        const __mmask64 is_least = _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(-128));
        const auto or_least = [&](__m512i bytes, int byte) {
            return _mm512_mask_mov_epi8(bytes, is_least, _mm512_set1_epi8(static_cast<char>(byte)));
        };
        // Of what is not scaled the lower byte is 0, as that of 0 is.
        const __m512i lows = IS_SCALED ? or_least(low_of(magnitude), least.bits & 255) : low_of(magnitude);
        const __m512i highs = or_least(high_of(magnitude), IS_SCALED ? least.bits >> 8 : 0x43);
        return words_of<K>(lows, highs, codes);
    }
};

using SignedWords = SignedWordsOf<false>;
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

// The kind by which codes are written out for tiles, as bfloat16s in the order of their columns.
template <typename C>
struct Rounded : C {
    using Number = Bf16;
    using C::C;
};

template <typename C>
struct TiledOf {
    using Kind = Rounded<C>;
};

#ifdef PATH_AMX
template <>
struct TiledOf<Singles<HalfBytes, Bf16>> {
    using Kind = Pairs<HalfByteWords>;
};
template <>
struct TiledOf<Singles<SignedBytes, Bf16>> {
    using Kind = Pairs<SignedWords>;
};
template <>
struct TiledOf<Singles<E4m3Bytes, Bf16>> {
    using Kind = Pairs<E4m3Words>;
};
#endif

template <typename C>
using Tiled = typename TiledOf<C>::Kind;

}  // namespace
