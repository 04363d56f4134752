// Writes codes out as the numbers that they mean, rounded: what a vector of codes becomes, with its scales.
#pragma once

#include "codes.hpp"
#include "strip.hpp"

namespace {

template <typename C>
void write_each(
    const C& kind, const Strip<C::COLUMNS>& strip, Codes codes, const float* scales, const float* less,
    typename C::Number* to) {
    const Floats scale = C::checked(codes, spread(scales, strip.lanes));
    const Floats zero = less ? spread(less, strip.lanes) : zeros();
    [&]<int... K>(std::integer_sequence<int, K...>) {
        (::store(to + K * Dot<typename C::Number>::STEP,
                 C::meant(kind.template operand<K>(codes), less, zero, scale)), ...);
    }(std::make_integer_sequence<int, C::OPERANDS>{});
}

// Any kind's codes: each is multiplied with the scale of its lane.
template <typename C>
struct Unpacker {
    const C& kind;
    const Strip<C::COLUMNS>& strip;

    void write(Codes codes, const float* scales, const float* less, typename C::Number* to) {
        write_each(kind, strip, codes, scales, less, to);
    }
};

#ifdef PATH_AVX512_BF16
template <typename Words>
void write_words(const Words& words, Codes codes, Bf16* to) {
    [&]<int... K>(std::integer_sequence<int, K...>) {
        (_mm512_storeu_si512(to + K * 2 * LANES, words.template words<K>(codes)), ...);
    }(std::make_integer_sequence<int, Words::LANE_COLUMNS / 2>{});
}

// Both of two vectors as bfloat16, one after the other.
inline __m512i rounded(Floats first, Floats second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// What the codes of half a byte mean in up to eight groups of a step: which one, a code's place says.
struct GroupedHalves {
    static constexpr int LANE_COLUMNS = HalfByteWords::LANE_COLUMNS;
    __m512i tables[4], groups;
    bool are_eight;

    GroupedHalves(Floats values, int64_t units, const float* scales, const float* less, __m512i groups)
        : groups(groups), are_eight(units == 8) {
        const auto meant = [&](int64_t unit) {
            return multiply(less ? add(values, splat(less[unit])) : values, splat(scales[unit]));
        };
        UNROLL
        for (int64_t i = 0; i < 4; ++i) {
            if (2 * i < units) tables[i] = rounded(meant(2 * i), meant(2 * i + 1));
        }
    }

    template <int K>
    __m512i words(Codes codes) const {
        constexpr int CODE_OF_GROUP = 0xea;  // (a & b) | c
        const __m512i which = _mm512_ternarylogic_epi32(
            _mm512_srli_epi16(codes, 4 * K), _mm512_set1_epi16(15), groups, CODE_OF_GROUP);
        const __m512i first = _mm512_permutex2var_epi16(tables[0], which, tables[1]);
        if (!are_eight) return first;
        return _mm512_mask_blend_epi16(0xffff0000, first, _mm512_permutex2var_epi16(tables[2], which, tables[3]));
    }

    // Each word's group of a step that has so many, where the tables are looked up.
    static __m512i places(int64_t units) {
        uint16_t places[2 * LANES];
        for (int64_t i = 0; i < 2 * LANES; ++i) places[i] = static_cast<uint16_t>(i * units / (2 * LANES) << 4);
        return _mm512_loadu_si512(places);
    }
};

template <>
struct Unpacker<Pairs<HalfByteWords>> {
    const Pairs<HalfByteWords>& kind;
    const Strip<Pairs<HalfByteWords>::COLUMNS>& strip;
    const int64_t units = strip.units ? strip.units : 1;
    const Floats values = widen(kind.table.values);
    const __m512i groups = GroupedHalves::places(units);

    void write(Codes codes, const float* scales, const float* less, Bf16* to) {
        write_words(GroupedHalves(values, units, scales, less, groups), codes, to);
    }
};

// Of bytes that share a scale all their magnitudes are multiplied with it, if that was not done just before.
template <typename KIND>
struct Unpacker<Pairs<KIND>> {
    const Pairs<KIND>& kind;
    const Strip<Pairs<KIND>::COLUMNS>& strip;
    typename KIND::Scaled scaled{1.0f};
    float scale = 1.0f;

    void write(Codes codes, const float* scales, const float* less, Bf16* to) {
        if (strip.units > 1 || less) {
            write_each(kind, strip, codes, scales, less, to);
            return;
        }
        if (*scales != scale) scaled = typename KIND::Scaled(scale = *scales);
        write_words(scaled, codes, to);
    }
};
#endif

}  // namespace
