// What tiles_amx.hpp does, by the vectors of any path and in the same order of sums: so what is built of tiles
// is tested wherever there are none. Numbers too small to be normal, which AMX takes for nought, are kept.
#pragma once

#include "simd.hpp"

namespace {

class Tiles {
    static constexpr int SIDE = 16, VECTORS = SIDE / LANES;

  public:
    template <int R, int T>
    void zero_sums() {
        std::memset(sums_[R][T], 0, sizeof sums_[R][T]);
    }
    template <int R, int T>
    void load_sums(const float* from, int64_t apart) {
        for (int r = 0; r < SIDE; ++r) std::memcpy(sums_[R][T][r], from + r * apart, sizeof sums_[R][T][r]);
    }
    template <int R, int T>
    void store_sums(float* to, int64_t apart) const {
        for (int r = 0; r < SIDE; ++r) std::memcpy(to + r * apart, sums_[R][T][r], sizeof sums_[R][T][r]);
    }
    template <int R>
    void load_rows(const Bf16* from, int64_t apart) {
        for (int r = 0; r < SIDE; ++r) std::memcpy(rows_[R][r], from + r * apart, sizeof rows_[R][r]);
    }
    template <int T>
    void load_tokens(const Bf16* from) {
        for (int i = 0; i < SIDE * VECTORS; ++i) {
            const Bf16* const pairs = from + i * 2 * LANES;
            store(&even_[T][0][0] + i * LANES, widen_even(pairs));
            store(&odd_[T][0][0] + i * LANES, widen_odd(pairs));
        }
    }
    template <int R, int T>
    void multiply_add() {
        for (int r = 0; r < SIDE; ++r) {
            Floats even[VECTORS], odd[VECTORS];
            UNROLL
            for (int v = 0; v < VECTORS; ++v) even[v] = odd[v] = zeros();
            for (int pair = 0; pair < SIDE; ++pair) {
                const Floats first = splat(widened(rows_[R][r][2 * pair]));
                const Floats second = splat(widened(rows_[R][r][2 * pair + 1]));
                UNROLL
                for (int v = 0; v < VECTORS; ++v) {
                    even[v] = ::multiply_add(first, widen(even_[T][pair] + v * LANES), even[v]);
                    odd[v] = ::multiply_add(second, widen(odd_[T][pair] + v * LANES), odd[v]);
                }
            }
            float* const sums = sums_[R][T][r];
            UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                store(sums + v * LANES, add(widen(sums + v * LANES), add(even[v], odd[v])));
            }
        }
    }

  private:
    alignas(64) float sums_[2][2][SIDE][SIDE];
    alignas(64) Bf16 rows_[2][SIDE][2 * SIDE];
    alignas(64) float even_[2][SIDE][SIDE], odd_[2][SIDE][SIDE];  // elements of each pair of tokens
};

}  // namespace
