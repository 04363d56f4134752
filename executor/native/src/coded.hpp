// Rows of packed codes, multiplied with a few tokens as they are read: the sums of each lane's codes are
// multiplied with its scale.
#pragma once

#include "codes.hpp"

namespace {

using native::COLUMNS;

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

// Call each(step, codes of each row) for every step of a stretch.
template <typename C, int ROWS, typename Each>
inline void for_each_step(const uint8_t* codes, int64_t row_bytes, int64_t columns, const Each& each) {
    constexpr int64_t BYTES = sizeof(Codes);
    const int64_t whole = columns / C::COLUMNS, left = columns - whole * C::COLUMNS;
    uint8_t last[ROWS][BYTES];  // what is left, padded with zeros
    if (left > 0) {
        std::memset(last, 0, sizeof last);
        const int64_t num_bytes = (left * BYTES + C::COLUMNS - 1) / C::COLUMNS;
        for (int r = 0; r < ROWS; ++r) std::memcpy(last[r], codes + r * row_bytes + whole * BYTES, num_bytes);
    }
    for (int64_t s = 0; s < whole + (left > 0); ++s) {
        Codes rows[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; ++r) rows[r] = codes_at(s < whole ? codes + r * row_bytes + s * BYTES : last[r]);
        each(s, rows);
    }
}

template <typename C, int ROWS, int TOKENS>
__attribute__((noinline)) void multiply_codes(const CodedTile<C>& tile) {
    using D = Dot<typename C::Number>;
    const C kind = tile.kind;
    const typename C::Number* tokens[TOKENS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) tokens[t] = tile.tokens[t];
    Floats sums[TOKENS][ROWS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) sums[t][r] = zeros();
    }
    for_each_step<C, ROWS>(tile.codes, tile.row_bytes, tile.columns, [&](int64_t s, const Codes (&rows)[ROWS]) {
        if (ROWS * sizeof(Codes) >= 64 || s * sizeof(Codes) % 64 == 0) {
            const char* const ahead = reinterpret_cast<const char*>(tile.ahead) + s * ROWS * sizeof(Codes);
            UNROLL
            for (size_t i = 0; i < ROWS * sizeof(Codes); i += 64) prefetch(ahead + i);
        }
        Floats parts[TOKENS][ROWS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            UNROLL
            for (int r = 0; r < ROWS; ++r) parts[t][r] = zeros();
        }
        if (tile.less) {
            UNROLL
            for (int r = 0; r < ROWS; ++r) {
                const Floats less = spread(tile.less + r * tile.apart + s * tile.units, tile.lanes);
                UNROLL
                for (int t = 0; t < TOKENS; ++t) parts[t][r] = multiply(less, widen(tile.totals[t] + s * LANES));
            }
        }
        const auto multiply_operand = [&]<int K>() {
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
        [&]<int... K>(std::integer_sequence<int, K...>) {
            (multiply_operand.template operator()<K>(), ...);
        }(std::make_integer_sequence<int, C::OPERANDS>{});
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const Floats scales = spread(tile.scales + r * tile.apart + s * tile.units, tile.lanes);
            const Floats scale = C::checked(rows[r], scales);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) sums[t][r] = multiply_add(parts[t][r], scale, sums[t][r]);
        }
    });
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
template <typename C, int TOKENS = CODE_TOKENS>
void multiply_coded(const CodedTile<C>& tile, int rows, int tokens) {
    if constexpr (TOKENS > 1) {
        if (tokens < TOKENS) return multiply_coded<C, TOKENS - 1>(tile, rows, tokens);
    }
    if (rows == 1) {
        multiply_codes<C, 1, TOKENS>(tile);
    } else {
        multiply_codes<C, rows_with<C>(TOKENS), TOKENS>(tile);
    }
}

}  // namespace
