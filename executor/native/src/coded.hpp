// Rows of packed codes, multiplied with a few tokens as they are read: the sums of each lane's codes are
// multiplied with its scale.
#pragma once

#include "codes.hpp"

namespace {

using native::COLUMNS;

// How many tokens are multiplied together at most. To look bytes up as bfloat16s costs about as much as four products
// with them: more tokens share it where RUN steps share their scales, as fewer sums are scaled then.
template <typename C, int RUN>
constexpr int TOKENS_WITH =
    RUN > 1 && C::LANE_COLUMNS == 4 && sizeof(typename C::Number) < sizeof(float) ? 2 * CODE_TOKENS : CODE_TOKENS;

// How many rows are multiplied together with so many tokens: bytes' tables take registers from the sums.
template <typename C>
constexpr int rows_with(int tokens) {
    return C::LANE_COLUMNS == 4 && tokens > 2 && CODE_ROWS > 1 ? CODE_ROWS / 2 : CODE_ROWS;
}

// A stretch of some rows of codes, and the same stretch of the tokens that it is multiplied with.
template <typename C>
struct CodedTile {
    const C& kind;
    const uint8_t* codes;
    int64_t row_bytes, columns;
    const uint8_t* ahead;        // codes that come next, to be fetched now
    const float *scales, *less;  // of the first row: negative zero points, or null
    int64_t apart, units;        // from row to row, and of a step
    const int32_t* lanes;
    const typename C::Number* const* tokens;  // in order
    const float* const* totals;  // of each token's steps, for zero points
    float* results;              // [token][row], tokens COLUMNS apart
};

// What is left of a row, padded with zeros.
template <typename C>
const uint8_t* last_step(const uint8_t* codes, int64_t columns, uint8_t* padded) {
    std::memset(padded, 0, sizeof(Codes));
    std::memcpy(padded, codes, (columns * sizeof(Codes) + C::COLUMNS - 1) / C::COLUMNS);
    return padded;
}

// The products of RUN steps, which share their scales, are added up before they are scaled.
template <typename C, int RUN, int ROWS, int TOKENS>
__attribute__((noinline)) void multiply_codes(const CodedTile<C>& tile) {
    using D = Dot<typename C::Number>;
    constexpr int64_t BYTES = sizeof(Codes);
    constexpr int IN_LINE = TOKENS > 2 || RUN < 2 ? RUN : 2;  // with fewer tokens shorter loops are sooner
    const C kind = tile.kind;
    const typename C::Number* tokens[TOKENS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) tokens[t] = tile.tokens[t];
    Floats sums[TOKENS][ROWS], parts[TOKENS][ROWS], checks[ROWS];  // checks are 1, or no number
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) sums[t][r] = zeros();
    }
    // All are inlined where they are called, or sums would lie in memory.
    const auto begin = [&](int64_t s) __attribute__((always_inline)) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            checks[r] = splat(1.0f);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) parts[t][r] = zeros();
        }
        if (tile.less) {
            UNROLL
            for (int r = 0; r < ROWS; ++r) {
                const Floats less = spread(tile.less + r * tile.apart + s * tile.units, tile.lanes);
                UNROLL
                for (int t = 0; t < TOKENS; ++t) parts[t][r] = multiply(less, widen(tile.totals[t] + s * LANES));
            }
        }
    };
    const auto step = [&](int64_t s, const uint8_t* from, int64_t apart) __attribute__((always_inline)) {
        Codes rows[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; ++r) rows[r] = codes_at(from + r * apart);
        if (ROWS * BYTES >= 64 || s * BYTES % 64 == 0) {
            const char* const ahead = reinterpret_cast<const char*>(tile.ahead) + s * ROWS * BYTES;
            UNROLL
            for (int64_t i = 0; i < ROWS * BYTES; i += 64) prefetch(ahead + i);
        }
        const auto multiply_operand = [&]<int K>() __attribute__((always_inline)) {
            typename D::Operand w[ROWS];
            UNROLL
            for (int r = 0; r < ROWS; ++r) w[r] = kind.template operand<K>(rows[r]);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                const auto x = D::template load<0>(tokens[t] + s * C::COLUMNS + K * D::STEP);
                UNROLL
                for (int r = 0; r < ROWS; ++r) parts[t][r] = D::step(parts[t][r], w[r], x);
            }
        };
        [&]<int... K>(std::integer_sequence<int, K...>) __attribute__((always_inline)) {
            (multiply_operand.template operator()<K>(), ...);
        }(std::make_integer_sequence<int, C::OPERANDS>{});
        UNROLL
        for (int r = 0; r < ROWS; ++r) checks[r] = checked<C>(rows[r], checks[r]);
    };
    const auto end = [&](int64_t s) __attribute__((always_inline)) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const Floats scale = multiply(spread(tile.scales + r * tile.apart + s * tile.units, tile.lanes), checks[r]);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) sums[t][r] = multiply_add(parts[t][r], scale, sums[t][r]);
        }
    };
    const int64_t whole = tile.columns / C::COLUMNS;
    int64_t s = 0;
    for (; s + RUN <= whole; s += RUN) {
        begin(s);
        NO_UNROLL
        for (int i = 0; i < RUN; i += IN_LINE) {
            UNROLL
            for (int j = 0; j < IN_LINE; ++j) step(s + i + j, tile.codes + (s + i + j) * BYTES, tile.row_bytes);
        }
        end(s);
    }
    for (; s * C::COLUMNS < tile.columns; ++s) {  // what is left, padded with zeros
        uint8_t last[ROWS][BYTES];
        const int64_t left = tile.columns - s * C::COLUMNS, columns = left < C::COLUMNS ? left : C::COLUMNS;
        for (int r = 0; r < ROWS; ++r) last_step<C>(tile.codes + r * tile.row_bytes + s * BYTES, columns, last[r]);
        begin(s);
        step(s, last[0], BYTES);
        end(s);
    }
    // Lanes are added in one order, however many rows there are.
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        Floats four[4] = {zeros(), zeros(), zeros(), zeros()};
        float added[4] = {};
        UNROLL
        for (int r = 0; r < ROWS; ++r) four[r] = sums[t][r];
        add_sums<4>(four, added);
        UNROLL
        for (int r = 0; r < ROWS; ++r) tile.results[t * COLUMNS + r] += added[r];
    }
}

// With `rows` rows, which are one or as many as go together.
template <typename C, int RUN, int TOKENS = TOKENS_WITH<C, RUN>>
void multiply_coded(const CodedTile<C>& tile, int rows, int tokens) {
    if constexpr (TOKENS > 1) {
        if (tokens < TOKENS) return multiply_coded<C, RUN, TOKENS - 1>(tile, rows, tokens);
    }
    if (rows == 1) {
        multiply_codes<C, RUN, 1, TOKENS>(tile);
    } else {
        multiply_codes<C, RUN, rows_with<C>(TOKENS), TOKENS>(tile);
    }
}

}  // namespace
