// Tokens of a cache as elements: where they lie, or made of their codes a tile at a time.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using native::CodedRows;

enum CacheCodes { INT8_CODES, FP8_CODES, NUM_CACHE_CODES };

int codes_named(const char* name) {
    const char* const names[NUM_CACHE_CODES] = {"int8", "fp8"};
    for (int codes = 0; codes < NUM_CACHE_CODES; ++codes) {
        if (std::strcmp(name, names[codes]) == 0) return codes;
    }
    return -1;
}

// LANES codes as float32: of int8 the numbers, of fp8 (e4m3) FP8_UNIT of them to a number.
constexpr float FP8_UNIT = 0x1p8f;

#if defined(PATH_AVX512) || defined(PATH_AVX512_BF16)
inline Floats of_int8(const uint8_t* from) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}

// As a float16, whose exponent is greater by 8: its sign is first, and moved past what is widened.
inline Floats of_fp8(const uint8_t* from) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(-16385)));
}

inline void store_as(Fp16* to, Floats values) {
    const __m256i halves = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}

inline void store_as(Bf16* to, Floats values) {
#if defined(PATH_AVX512_BF16) || defined(PATH_AMX)
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(values);
#else
    const __m512i bits = _mm512_castps_si512(values), one = _mm512_set1_epi32(1);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
#elif defined(PATH_AVX2)
inline Floats of_int8(const uint8_t* from) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

// As a float16, whose exponent is greater by 8: its sign is first, and moved past what is widened.
inline Floats of_fp8(const uint8_t* from) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(-16385)));
}

inline void store_as(Fp16* to, Floats values) {
    const __m128i halves = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}

inline void store_as(Bf16* to, Floats values) {
    const __m256i bits = _mm256_castps_si256(values), one = _mm256_set1_epi32(1);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    const __m256i halves = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#else
typedef uint8_t FourBytes __attribute__((vector_size(4)));

inline Words four_bytes(const uint8_t* from) {
    FourBytes codes;
    std::memcpy(&codes, from, sizeof codes);
    return __builtin_convertvector(codes, Words);
}

inline Floats of_int8(const uint8_t* from) {
    return __builtin_convertvector((Integers)(four_bytes(from) << 24) >> 24, Floats);
}

// As a float32 with the exponent that it has, and its share of the difference of 120.
inline Floats of_fp8(const uint8_t* from) {
    const Words codes = four_bytes(from);
    return (Floats)((codes & 0x80u) << 24 | (codes & 0x7fu) << 20) * splat(0x1p112f);
}

inline void store_as(Fp16* to, Floats values) {
    for (int i = 0; i < LANES; ++i) narrow(values[i], to + i);
}

inline void store_as(Bf16* to, Floats values) {
    const Words bits = (Words)values, halves = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Halves stored = __builtin_convertvector(halves, Halves);
    std::memcpy(to, &stored, sizeof stored);
}
#endif

inline void store_as(float* to, Floats values) { store(to, values); }

// Two vectors, one after the other.
template <typename T>
inline void store_both(T* to, Floats first, Floats second) {
    store_as(to, first);
    store_as(to + LANES, second);
}

#ifdef PATH_AVX512_BF16
inline void store_both(Bf16* to, Floats first, Floats second) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
#endif

// Numbers of one part: codes times their scale, rounded once.
template <typename T, typename Widen>
void widen_part(const uint8_t* codes, int64_t count, float scale, const Widen& widen_codes, T* to) {
    const Floats scales = splat(scale);
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        const Floats first = multiply(widen_codes(codes + i), scales);
        store_both(to + i, first, multiply(widen_codes(codes + i + LANES), scales));
    }
    for (; i + LANES <= count; i += LANES) store_as(to + i, multiply(widen_codes(codes + i), scales));
    if (i < count) {
        Padded<uint8_t, LANES> padded;
        T rest[LANES];
        store_as(rest, multiply(widen_codes(padded.from(codes + i, count - i)), scales));
        std::memcpy(to + i, rest, (count - i) * sizeof(T));
    }
}

template <typename T, typename Widen>
void widen_rows(
    const CodedRows& coded, const uint8_t* rows, int64_t tokens, float unit, const Widen& widen_codes, T* to) {
    for (int64_t t = 0; t < tokens; ++t, rows += coded.row_bytes) {
        const Bf16* const scales = reinterpret_cast<const Bf16*>(rows + coded.scales);
        const uint8_t* codes = rows;
        for (int64_t part = 0; part < coded.parts; ++part) {
            const int64_t count = part == 0 ? coded.first : coded.others;
            widen_part(codes, count, widened(scales[part]) * unit, widen_codes, to);
            codes += count;
            to += count;
        }
    }
}

// A tile's tokens as elements, one after the other; `room` is for those that are made.
template <typename T>
const T* rows_of(const CodedRows* coded, const char* tokens_at, int64_t tokens, float* room) {
    if (coded == nullptr) return reinterpret_cast<const T*>(tokens_at);
    T* const made = reinterpret_cast<T*>(room);
    const uint8_t* const rows = reinterpret_cast<const uint8_t*>(tokens_at);
    if (coded->codes == INT8_CODES) {
        widen_rows(*coded, rows, tokens, 1.0f, of_int8, made);
    } else {
        widen_rows(*coded, rows, tokens, FP8_UNIT, of_fp8, made);
    }
    return made;
}

// By how much fewer bytes of the cache are read than elements are computed with: a power of two.
template <typename T>
constexpr int narrower(const CodedRows* coded) {
    return coded == nullptr ? 0 : sizeof(T) == 4 ? 2 : 1;
}

}  // namespace
