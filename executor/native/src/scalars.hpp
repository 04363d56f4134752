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
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x47800000u) {  // 65536 and more
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lines the bits up and rounds
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
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
