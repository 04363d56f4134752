// Products of rows of a bfloat16 matrix with many tokens by tiles, in the matrix' own order: its rows are tiles'
// rows as they lie, so that weights move and are stored as ever, and tokens, arranged once, are the other factor.
#pragma once

#include "kernels.hpp"

#ifdef PATH_AMX
#include "tiles_amx.hpp"
#else
#include "tiles_portable.hpp"
#endif

namespace {

using native::COLUMNS;

// Whether a path can multiply tokens of T by tiles: by AMX's, or to test what is built of them.
template <typename T>
constexpr bool TILED = false;
#if defined(PATH_AMX) || defined(PATH_PORTABLE)
template <>
constexpr bool TILED<Bf16> = true;
#endif

// Fewer are multiplied as the path would without tiles. TDPBF16PS takes 16 cycles for 16 rows, 32 columns and up
// to 16 tokens, AVX-512's multiply-adds as many for each token; but reading these 1,024 bytes from memory takes the
// 100 to 200 cycles of 6 to 12 tokens. So that is reckoned, and was measured by nobody yet.
constexpr int64_t LEAST_TILED = 9;

using native::TILE;
using native::TILE_COLUMNS;
constexpr int64_t TILE_ELEMENTS = TILE * TILE_COLUMNS;
static_assert(COLUMNS % TILE_COLUMNS == 0 && native::MOST_TOKENS % TILE == 0);

// Of rows and tokens: 2 * TILE tokens' stretch stays in the first cache while all rows are multiplied with it. Each
// line of the rows is used but once then, so it matters little that rows 4 KiB apart drive one another out of there.
constexpr int64_t TILE_STRETCH = 512;

// Tokens as the second factor of tiles: of each TILE_COLUMNS columns in turn, pair by pair, every token's. What is
// not there of TILE tokens or of the last columns is nought.
inline void arrange(const Bf16* const* rows, int tokens, int64_t columns, Bf16* to) {
    static constexpr Bf16 NOTHING[TILE_COLUMNS] = {};
    for (int64_t i = 0; i < columns; i += TILE_COLUMNS, to += TILE_ELEMENTS) {
        Padded<Bf16, TILE_COLUMNS> padded[TILE];
        const void* from[TILE];
        for (int t = 0; t < TILE; ++t) {
            const int64_t rest = columns - i;
            from[t] = t >= tokens ? NOTHING : rest >= TILE_COLUMNS ? rows[t] + i : padded[t].from(rows[t] + i, rest);
        }
        transpose(from, reinterpret_cast<float*>(to), TILE);
    }
}

// Rows to be fetched a part at a time, in the order of their addresses.
struct RowsAhead {
    const char* row;
    int64_t apart, row_bytes, rows, offset = 0;  // bytes from row to row, and of each

    explicit RowsAhead(const void* first = nullptr, int64_t apart = 0, int64_t row_bytes = 0, int64_t rows = 0)
        : row(static_cast<const char*>(first)), apart(apart), row_bytes(row_bytes), rows(first ? rows : 0) {}

    // Of each part, if all are fetched in so many.
    int64_t lines_of(int64_t parts) const { return (rows * ((row_bytes + 63) / 64) + parts - 1) / parts; }

    void fetch(int64_t lines) {
        for (; lines > 0 && rows > 0; --lines) {
            prefetch(row + offset);
            offset += 64;
            if (offset < row_bytes) continue;
            offset = 0;
            row += apart;
            --rows;
        }
    }
};

// Where sums lie: a tile is 16 rows, each of so many tokens' sums.
struct TileSums {
    float* first;
    int64_t apart;                    // from row to row of a tile
    int64_t rows_apart, tokens_apart; // from a tile to that of the next rows, and of the next tokens
};

// A stretch of some rows.
struct TileRows {
    const Bf16* first;
    int64_t apart;    // elements from row to row
    bool is_padded;   // to whole tiles with memory that may be read
    RowsAhead ahead;  // what comes next, to be fetched meanwhile
    TileSums sums;
};

// The stretch of the tokens that they are multiplied with.
struct TileTokens {
    const Bf16* first;
    int64_t apart;  // elements from TILE tokens to the next
    int64_t tiles;
};

// Up to 2 x 2 tiles of sums.
struct TileBlock {
    const Bf16* rows[2];
    int64_t apart[2];
    const Bf16* tokens[2];
    int64_t steps;
    bool is_first;  // stretch: sums begin with it
    TileSums sums;
};

template <int ROWS, int TOKENS, typename Ahead>
__attribute__((noinline)) void multiply_block(Tiles& tiles, const TileBlock& block, const Ahead& fetch_ahead) {
    const auto for_sums = [&](const auto& work) {
        const TileSums& sums = block.sums;
        const auto place = [&](int r, int t) { return sums.first + r * sums.rows_apart + t * sums.tokens_apart; };
        work.template operator()<0, 0>(place(0, 0));
        if constexpr (TOKENS > 1) work.template operator()<0, 1>(place(0, 1));
        if constexpr (ROWS > 1) work.template operator()<1, 0>(place(1, 0));
        if constexpr (ROWS > 1 && TOKENS > 1) work.template operator()<1, 1>(place(1, 1));
    };
    if (block.is_first) {
        for_sums([&]<int R, int T>(float*) { tiles.zero_sums<R, T>(); });
    } else {
        for_sums([&]<int R, int T>(const float* sums) { tiles.load_sums<R, T>(sums, block.sums.apart); });
    }
    for (int64_t step = 0; step < block.steps; ++step) {
        tiles.load_rows<0>(block.rows[0] + step * TILE_COLUMNS, block.apart[0]);
        tiles.load_tokens<0>(block.tokens[0] + step * TILE_ELEMENTS);
        if constexpr (TOKENS > 1) tiles.load_tokens<1>(block.tokens[1] + step * TILE_ELEMENTS);
        if constexpr (ROWS > 1) tiles.load_rows<1>(block.rows[1] + step * TILE_COLUMNS, block.apart[1]);
        for_sums([&]<int R, int T>(const float*) { tiles.multiply_add<R, T>(); });
        fetch_ahead();
    }
    for_sums([&]<int R, int T>(float* sums) { tiles.store_sums<R, T>(sums, block.sums.apart); });
}

// Add the products of a stretch of `length` columns of each set's rows with all tokens.
template <int NUM>
void multiply_stretch(
    Tiles& tiles, TileRows (&sets)[NUM], int64_t rows, int64_t length, const TileTokens& tokens, bool is_first) {
    constexpr int64_t SIZE = sizeof(Bf16);
    const int64_t steps = (length + TILE_COLUMNS - 1) / TILE_COLUMNS, row_tiles = (rows + TILE - 1) / TILE;
    alignas(64) Bf16 padded[2][TILE * TILE_STRETCH];
    TileBlock block = {{}, {}, {}, steps, is_first, {}};
    const int64_t row_blocks = (row_tiles + 1) / 2, token_blocks = (tokens.tiles + 1) / 2;
    const auto take_rows = [&](const TileRows& set, int which, int64_t first) {
        const Bf16* const from = set.first + first * set.apart;
        block.rows[which] = from;
        block.apart[which] = set.apart;
        const int64_t there = rows - first < TILE ? rows - first : TILE;
        if (set.is_padded || (there == TILE && length % TILE_COLUMNS == 0)) return;
        block.rows[which] = padded[which];
        block.apart[which] = TILE_STRETCH;
        std::memset(padded[which], 0, sizeof padded[which]);
        for (int64_t r = 0; r < there; ++r) {
            std::memcpy(padded[which] + r * TILE_STRETCH, from + r * set.apart, length * sizeof(Bf16));
        }
    };
    for (int64_t t = 0; t < tokens.tiles; t += 2) {
        const Bf16* const here = tokens.first + t * tokens.apart;
        const int64_t beyond = tokens.tiles - t - 2, next = beyond > 2 ? 2 : beyond > 0 ? beyond : 0;
        RowsAhead tokens_ahead(here + 2 * tokens.apart, tokens.apart * SIZE, steps * TILE_ELEMENTS * SIZE, next);
        const int64_t token_lines = tokens_ahead.lines_of(NUM * row_blocks * steps);
        const bool two_tokens = t + 1 < tokens.tiles;
        block.tokens[0] = here;
        block.tokens[1] = here + tokens.apart;
        for (TileRows& set : sets) {
            const int64_t lines = set.ahead.lines_of((token_blocks - t / 2) * row_blocks * steps);
            const auto fetch_ahead = [&] {
                set.ahead.fetch(lines);
                tokens_ahead.fetch(token_lines);
            };
            for (int64_t r = 0; r < row_tiles; r += 2) {
                const bool two_rows = r + 1 < row_tiles;
                block.sums = set.sums;
                block.sums.first += r * set.sums.rows_apart + t * set.sums.tokens_apart;
                take_rows(set, 0, r * TILE);
                if (two_rows) take_rows(set, 1, (r + 1) * TILE);
                if (two_rows && two_tokens) {
                    multiply_block<2, 2>(tiles, block, fetch_ahead);
                } else if (two_rows) {
                    multiply_block<2, 1>(tiles, block, fetch_ahead);
                } else if (two_tokens) {
                    multiply_block<1, 2>(tiles, block, fetch_ahead);
                } else {
                    multiply_block<1, 1>(tiles, block, fetch_ahead);
                }
            }
        }
    }
}

// After the last stretch: tiles of sums as [token][row], where they lie.
inline void turn_sums(float* results, int64_t rows, int64_t token_tiles) {
    for (int64_t t = 0; t < token_tiles; ++t) {
        for (int64_t r = 0; r < rows; r += TILE) {
            float* const sums = results + t * TILE * COLUMNS + r;
            const void* from[TILE];
            for (int i = 0; i < TILE; ++i) from[i] = sums + i * COLUMNS;
            transpose(from, sums, COLUMNS);
        }
    }
}

// A piece's results, [token][row]. Until all stretches are added, each tile of them is [row][token].
inline TileSums piece_sums(float* results) { return {results, COLUMNS, TILE, TILE * COLUMNS}; }

// results = rows . tokens for each set; prepare(start, length) says where a stretch of their rows lies.
template <int NUM, typename Prepare>
void multiply_by_tiles(
    TileRows (&sets)[NUM], int64_t rows, int64_t width, const Bf16* arranged, int count, const Prepare& prepare) {
    TileTokens tokens = {arranged, native::arranged_elements(TILE, width), (count + TILE - 1) / TILE};
    Tiles tiles;
    for (int64_t start = 0; start < width; start += TILE_STRETCH) {
        const int64_t length = width - start < TILE_STRETCH ? width - start : TILE_STRETCH;
        prepare(start, length);
        multiply_stretch(tiles, sets, rows, length, tokens, start == 0);
        tokens.first += length / TILE_COLUMNS * TILE_ELEMENTS;
    }
    for (const TileRows& set : sets) turn_sums(set.sums.first, rows, tokens.tiles);
}

}  // namespace
