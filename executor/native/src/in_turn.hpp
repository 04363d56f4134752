// Products of rows of a weight matrix with so few tokens that reading the rows takes the time.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using native::COLUMNS;

// With so few, rows are multiplied one after the other: fewer the more often a line of them has to be.
template <typename T>
constexpr int FEW_TOKENS = GEMM_IN_TURN * Dot<T>::STEP / (Dot<T>::PASSES * (64 / static_cast<int>(sizeof(T))));
constexpr int WHOLE_STRETCHES = 2;        // of them that are multiplied with whole rows: more outgrow the first cache
constexpr int64_t AHEAD_BYTES = 8 << 10;  // that rows are fetched ahead

// Rows that follow one another without a gap, and what they are multiplied with.
template <typename T>
struct Run {
    const T *rows, *end;         // those to be multiplied now, and where all of them end
    int64_t width, stretch;      // of which sums are taken by themselves
    const T* ahead;              // what is read after the last row, or null
    const T* next;               // as many rows to be fetched besides, or null
    const float* const* tokens;  // prepared
    float* results;              // of each token with each row, tokens COLUMNS apart
};

// As `multiply_tile`, one row after the other: that is the order of their addresses, in which memory delivers most,
// but tokens are loaded for each of them. What is read AHEAD_BYTES later is fetched meanwhile.
template <typename T, int ROWS, int TOKENS>
__attribute__((noinline)) void multiply_in_turn(const Run<T>& run) {
    using D = Dot<T>;
    constexpr int64_t LINE = 64 / sizeof(T), AHEAD = AHEAD_BYTES / sizeof(T);
    const float* tokens[TOKENS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) tokens[t] = run.tokens[t];
    Floats sums[WHOLE_STRETCHES][TOKENS][ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const T* const row = run.rows + r * run.width;
        const int64_t beyond = row + AHEAD - run.end;
        const T* const ahead = beyond < 0 ? row + AHEAD : run.ahead ? run.ahead + beyond : row;
        const T* const next = run.next ? run.next + r * run.width : row;
        int64_t i = 0;
        for (int s = 0; i < run.width; ++s) {
            Floats of_row[TOKENS];
            UNROLL
            for (int t = 0; t < TOKENS; ++t) of_row[t] = zeros();
            const auto pass = [&]<int PASS>(const T* from) {
                const typename D::Operand w = D::template load<PASS>(from);
                UNROLL
                for (int t = 0; t < TOKENS; ++t) {
                    of_row[t] = D::step(of_row[t], w, D::template prepared<PASS>(tokens[t], i));
                }
            };
            const auto step = [&](const T* from) {
                pass.template operator()<0>(from);
                if constexpr (D::PASSES == 2) pass.template operator()<1>(from);
            };
            const int64_t until = i + run.stretch, end = until < run.width ? until : run.width;
            for (; i + D::STEP <= end; i += D::STEP) {
                if (D::STEP >= LINE || i % LINE == 0) {
                    prefetch(reinterpret_cast<const char*>(ahead + i));
                    prefetch(reinterpret_cast<const char*>(next + i));
                }
                step(row + i);
            }
            if (i < end) {
                Padded<T, D::STEP> rest;
                step(rest.from(row + i, end - i));
                i = end;
            }
            UNROLL
            for (int t = 0; t < TOKENS; ++t) sums[s][t][r] = of_row[t];
        }
    }
    for (int s = 0; s * run.stretch < run.width; ++s) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) add_sums<ROWS>(sums[s][t], run.results + t * COLUMNS);
    }
}

template <typename T, int ROWS, int TOKENS = FEW_TOKENS<T>>
void multiply_few(const Run<T>& run, int tokens) {
    if constexpr (TOKENS > 1) {
        if (tokens < TOKENS) {
            multiply_few<T, ROWS, TOKENS - 1>(run, tokens);
            return;
        }
    }
    multiply_in_turn<T, ROWS, TOKENS>(run);
}

}  // namespace
