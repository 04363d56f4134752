// Element types as they lie in memory, and their conversions one by one. Included by files that are
// compiled for different instruction sets: everything here is internal to each of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Round to nearest, ties to even; what is not a number stays so.
inline void narrow(float value, float* target) { *target = value; }

inline void narrow(float value, Bf16* target) {
    const uint32_t bits = bits_of(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    target->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

inline void narrow(float value, Fp16* target) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // All are computed and one is chosen, which compilers turn into vectors where a loop has branches.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // adding rounds and lines up
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t beyond = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t half = magnitude < 0x47800000u ? finite : beyond;  // 65536 and more are beyond
    target->bits = static_cast<uint16_t>(sign | half);
}

inline float widened(float value) { return value; }

inline float widened(Bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float widened(Fp16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
    const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);  // subnormals come out right
    const bool special = (value.bits & 0x7c00u) == 0x7c00u;           // infinite or not a number
    return float_of(sign | (special ? magnitude | 0x7f800000u : scaled));
}

}  // namespace
