// What codes mean, and scales: one by one, and in tables that are made when this is compiled.
#pragma once

#include "kernels.hpp"
#include "scalars.hpp"

namespace {

// What the 16 codes of half a byte mean, which bfloat16 holds exactly.
struct alignas(64) HalfByteTable {
    uint16_t twice[32];  // as bfloat16, and again for codes with a bit of the next one's before them
    float values[16];
    uint8_t high[16], low[16];  // bytes of the bfloat16s

    constexpr explicit HalfByteTable(const uint16_t (&bits)[16], const float (&meant)[16])
        : twice(), values(), high(), low() {
        for (int i = 0; i < 16; ++i) {
            twice[i] = twice[i + 16] = bits[i];
            values[i] = meant[i];
            high[i] = static_cast<uint8_t>(bits[i] >> 8);
            low[i] = static_cast<uint8_t>(bits[i] & 255);
        }
    }
};

constexpr HalfByteTable FP4_TABLE(
    {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
     0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0},
    {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
     -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f});
constexpr HalfByteTable INT4_TABLE(
    {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
     0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0},
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7});
constexpr HalfByteTable UINT4_TABLE(
    {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
     0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});

// Which of them a code needs; with zero points, int4 counts from nought.
inline const HalfByteTable& half_byte_table(native::Code code, bool has_zeros) {
    return code == native::FP4 ? FP4_TABLE : has_zeros ? UINT4_TABLE : INT4_TABLE;
}

// The magnitude of an e4m3 in bfloat16's bits: seven bits, of which the last number is none.
constexpr uint16_t e4m3_bits(int magnitude) {
    if (magnitude == 127) return 0x7fc0;
    if (magnitude >= 8) return static_cast<uint16_t>((magnitude << 4) + (120 << 7));
    if (magnitude == 0) return 0;
    const int power = magnitude >= 4 ? 2 : magnitude >= 2 ? 1 : 0;  // of magnitude * 2^-9
    return static_cast<uint16_t>(((power - 9 + 127) << 7) | ((magnitude << (7 - power)) & 127));
}

constexpr uint16_t whole_bits(int magnitude) {  // 0 to 127 as bfloat16
    if (magnitude == 0) return 0;
    int power = 0;
    while (magnitude >> (power + 1)) ++power;
    return static_cast<uint16_t>(((power + 127) << 7) | ((magnitude << (7 - power)) & 127));
}

// The bfloat16s of 128 magnitudes, and their bytes.
struct alignas(64) MagnitudeTable {
    uint16_t bits[128];
    uint8_t high[128], low[128];

    constexpr explicit MagnitudeTable(uint16_t (*bits)(int)) : bits(), high(), low() {
        for (int i = 0; i < 128; ++i) {
            this->bits[i] = bits(i);
            high[i] = static_cast<uint8_t>(bits(i) >> 8);
            low[i] = static_cast<uint8_t>(bits(i) & 255);
        }
    }
};

constexpr float E4M3_UNIT = 0x1p120f;  // of an e4m3 whose bits lie where float32 has those

struct E4m3 {
    uint8_t bits;
};
struct E8m0 {
    uint8_t bits;
};

inline float widened(E4m3 value) {
    const uint32_t magnitude = value.bits & 0x7fu, sign = static_cast<uint32_t>(value.bits & 0x80u) << 24;
    const uint32_t scaled = bits_of(float_of(magnitude << 20) * E4M3_UNIT);
    return float_of(sign | (magnitude == 0x7fu ? 0x7fc00000u : scaled));
}

// An exponent alone: 0 is the power of two below float32's least normal one, 255 no number.
inline float widened(E8m0 value) {
    const uint32_t bits = value.bits == 0 ? 1u << 22 : static_cast<uint32_t>(value.bits) << 23;
    return float_of(value.bits == 255 ? 0x7fc00000u : bits);
}

}  // namespace
