// Tiles of AMX: eight registers of 16 rows, each of 16 float32s or of as many pairs of bfloat16s.
//
// In assembly, as compilers' own names take numbers of registers from no template, and those of some (GCC 12) do not
// say that memory is read: what was just written to it might come too late.
#pragma once

#include "simd.hpp"

namespace {

// The calling thread's tiles while it lives: 2 of a matrix's rows, 2 of tokens, and the sums of each two. Others
// that compute here, as torch does, configure them for themselves; who is done leaves nothing to be saved.
class Tiles {
  public:
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } const shapes;
        asm volatile("ldtilecfg %0" : : "m"(shapes));
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() { asm volatile("tilerelease"); }

    template <int R, int T>
    void zero_sums() {
        asm volatile("tilezero %%tmm%c0" : : "i"(SUMS_OF<R, T>));
    }
    template <int R, int T>
    void load_sums(const float* from, int64_t apart) {
        load<SUMS_OF<R, T>>(from, apart * static_cast<int64_t>(sizeof(float)));
    }
    template <int R, int T>
    void store_sums(float* to, int64_t apart) const {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)"
                     : : "i"(SUMS_OF<R, T>), "r"(to), "r"(apart * static_cast<int64_t>(sizeof(float))) : "memory");
    }
    template <int R>
    void load_rows(const Bf16* from, int64_t apart) {
        load<ROWS_OF<R>>(from, apart * static_cast<int64_t>(sizeof(Bf16)));
    }
    template <int T>
    void load_tokens(const Bf16* from) {
        load<TOKENS_OF<T>>(from, 64);
    }
    template <int R, int T>
    void multiply_add() {
        asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2"
                     : : "i"(TOKENS_OF<T>), "i"(ROWS_OF<R>), "i"(SUMS_OF<R, T>));
    }

  private:
    template <int R, int T>
    static constexpr int SUMS_OF = 2 * R + T;
    template <int R>
    static constexpr int ROWS_OF = 4 + R;
    template <int T>
    static constexpr int TOKENS_OF = 6 + T;

    template <int TILE>
    static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(stride) : "memory");
    }
};

}  // namespace
