// Writes codes out as the numbers that they mean, rounded: what a vector of codes becomes, with its scales.
#pragma once

#include "codes.hpp"
#include "strip.hpp"

namespace {

// In the order in which codes are multiplied, each with the scale of its lane.
template <typename C>
struct Unpacker {
    static constexpr bool IN_ORDER = false;  // of columns
    const C& kind;
    const Strip<C::COLUMNS>& strip;

    void write(Codes codes, const float* scales, const float* less, typename C::Number* to) {
        const Floats scale = checked<C>(codes, spread(scales, strip.lanes));
        const Floats zero = less ? spread(less, strip.lanes) : zeros();
        [&]<int... K>(std::integer_sequence<int, K...>) {
            (::store(to + K * Dot<typename C::Number>::STEP,
                     C::meant(kind.template operand<K>(codes), less, zero, scale)), ...);
        }(std::make_integer_sequence<int, C::OPERANDS>{});
    }
};

template <typename C>
struct Unpacker<Rounded<C>> {
    static constexpr bool IN_ORDER = true;
    Unpacker<C> unpacker;

    Unpacker(const C& kind, const Strip<C::COLUMNS>& strip) : unpacker{kind, strip} {}

    void write(Codes codes, const float* scales, const float* less, Bf16* to) {
        float numbers[C::COLUMNS];
        unpacker.write(codes, scales, less, numbers);
        for (int lane = 0; lane < LANES; ++lane) {
            for (int k = 0; k < C::OPERANDS; ++k) narrow(numbers[k * LANES + lane], to + lane * C::OPERANDS + k);
        }
    }
};

#if defined(PATH_AVX512_BF16) || defined(PATH_AMX)
// All 16 codes are scaled and rounded, and then looked up: groups have 16 columns, or 32 and more.
template <>
struct Unpacker<Pairs<HalfByteWords>> {
    static constexpr bool IN_ORDER = true;
    static constexpr int VECTORS = 4;  // of a step
    Floats values;
    int64_t units;
    __m512i bytes[VECTORS];  // which of them has each word's code

    Unpacker(const Pairs<HalfByteWords>& kind, const Strip<Pairs<HalfByteWords>::COLUMNS>& strip)
        : values(widen(kind.table.values)), units(strip.units ? strip.units : 1) {
        uint8_t which[64];
        for (int i = 0; i < 64; ++i) which[i] = static_cast<uint8_t>(i / 4);
        for (int k = 0; k < VECTORS; ++k) {
            bytes[k] = _mm512_add_epi8(_mm512_loadu_si512(which), _mm512_set1_epi8(static_cast<char>(16 * k)));
        }
    }

    void write(Codes codes, const float* scales, const float* less, Bf16* to) const {
        constexpr int OF_GROUP = 0xea;  // (a & b) | c
        const __m512i shifts = _mm512_set1_epi32(4 << 16), halves = _mm512_inserti64x4(
            _mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        const auto meant = [&](int64_t unit) {
            return multiply(less ? add(values, splat(less[unit])) : values, splat(scales[unit]));
        };
        __m512i table = _mm512_setzero_si512();
        UNROLL
        for (int k = 0; k < VECTORS; ++k) {
            __m512i which = _mm512_srlv_epi16(_mm512_permutexvar_epi8(bytes[k], codes), shifts);
            if (units == 2 * VECTORS) {
                table = (__m512i)_mm512_cvtne2ps_pbh(meant(2 * k + 1), meant(2 * k));
                which = _mm512_ternarylogic_epi32(which, _mm512_set1_epi16(15), halves, OF_GROUP);
            } else if (k * units % VECTORS == 0) {
                const Floats both = meant(k * units / VECTORS);
                table = (__m512i)_mm512_cvtne2ps_pbh(both, both);
            }
            _mm512_storeu_si512(to + k * 2 * LANES, _mm512_permutexvar_epi16(which, table));
        }
    }
};

// Of bytes that share a scale all magnitudes are scaled, if that was not done just before, and looked up.
template <typename KIND>
struct Unpacker<Pairs<KIND>> {
    static constexpr bool IN_ORDER = true;
    const Pairs<KIND>& kind;
    int64_t units;
    int32_t lanes[2][LANES];  // which of a step's scales each lane has, in both vectors
    typename KIND::Scaled scaled{1.0f};
    float scale = 1.0f;

    Unpacker(const Pairs<KIND>& kind, const Strip<Pairs<KIND>::COLUMNS>& strip) : kind(kind), units(strip.units) {
        for (int k = 0; k < 2; ++k) {
            for (int lane = 0; lane < LANES; ++lane) {
                lanes[k][lane] = static_cast<int32_t>(2 * (k * LANES + lane) / strip.unit);
            }
        }
    }

    void write(Codes codes, const float* scales, const float* less, Bf16* to) {
        // So that each 128 bits have eight bytes of either vector.
        const __m512i ordered = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);
        const auto put = [&]<int K>(const auto& words) {
            ::store(to + K * 2 * LANES, words.template operator()<K>());
        };
        if (units > 1 || less) {
            const auto each = [&]<int K>() {
                const Floats zero = less ? spread(less, lanes[K]) : zeros();
                return kind.meant(kind.template operand<K>(ordered), less, zero, spread(scales, lanes[K]));
            };
            put.template operator()<0>(each);
            put.template operator()<1>(each);
        } else {
            if (*scales != scale) scaled = typename KIND::Scaled(scale = *scales);
            const auto looked_up = [&]<int K>() { return (__m512bh)scaled.template words<K>(ordered); };
            put.template operator()<0>(looked_up);
            put.template operator()<1>(looked_up);
        }
    }
};
#endif

}  // namespace
