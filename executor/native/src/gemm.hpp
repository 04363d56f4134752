// Products of rows of a weight matrix with tokens, for any number of tokens; float32 sums.
//
// A piece of work is a few rows, which stay in a core's own cache while token after token is
// multiplied with them; meanwhile the rows of the piece that comes next are fetched. So weights are
// read from memory once, and while there is much to compute, too.
#pragma once

#include "in_turn.hpp"
#include "tiles.hpp"

namespace {

using native::COLUMNS;
using native::SAME_LINES;

constexpr int BLOCK_TOKENS = 8 * GEMM_TOKENS;  // whose results are held at a time
constexpr int64_t STRETCH = 1024;  // of the rows and tokens: so many tokens' stay in the first cache

// A stretch of some rows, and the same stretch of the tokens that it is multiplied with.
template <typename T>
struct Tile {
    const T* rows;
    int64_t width;        // from row to row
    int64_t length;       // of the stretch
    const T* ahead;       // rows of a stretch that comes next, to be fetched now,
    int64_t ahead_width;  // from one to the next
    const float* const* tokens;  // the stretch of each, prepared
    float* results;       // of each token with each row
    int64_t apart;        // from one token's results to the next one's
};

// results[token][row] += row . token over the stretch, fetching FETCH lines a step ahead. Each is summed in
// the same order whatever its neighbours; what is left over at the end is padded with zeros.
template <typename T, int ROWS, int TOKENS, int FETCH>
__attribute__((noinline)) void multiply_tile(const Tile<T>& tile) {
    using D = Dot<T>;
    constexpr int LINE = 64 / sizeof(T);
    const T* const weights = tile.rows;
    const int64_t width = tile.width;
    const float* tokens[TOKENS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) tokens[t] = tile.tokens[t];
    Floats sums[TOKENS][ROWS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) sums[t][r] = zeros();
    }
    const auto pass = [&]<int PASS>(int64_t i, const auto& row_of) {
        typename D::Operand w[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; ++r) w[r] = D::template load<PASS>(row_of(r));
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const auto x = D::template prepared<PASS>(tokens[t], i);
            UNROLL
            for (int r = 0; r < ROWS; ++r) sums[t][r] = D::step(sums[t][r], w[r], x);
        }
    };
    const auto step = [&](int64_t i, const auto& row_of) {
        pass.template operator()<0>(i, row_of);
        if constexpr (D::PASSES == 2) pass.template operator()<1>(i, row_of);
    };
    int64_t i = 0;
    for (; i + D::STEP <= tile.length; i += D::STEP) {
        if (D::STEP >= LINE || i % LINE == 0) {
            // A line of each row in turn, however few at a time: memory delivers several rows at once faster.
            const int64_t line = i / (D::STEP < LINE ? LINE : D::STEP) * FETCH;
            const T* const ahead = tile.ahead + line % ROWS * tile.ahead_width + line / ROWS * LINE;
            UNROLL
            for (int r = 0; r < FETCH; ++r) prefetch(reinterpret_cast<const char*>(ahead + r * tile.ahead_width));
        }
        step(i, [&](int r) { return weights + r * width + i; });
    }
    if (i < tile.length) {
        Padded<T, D::STEP> rows[ROWS];
        for (int r = 0; r < ROWS; ++r) rows[r].from(weights + r * width + i, tile.length - i);
        step(i, [&](int r) { return rows[r].elements; });
    }
    UNROLL
    for (int t = 0; t < TOKENS; ++t) add_sums<ROWS>(sums[t], tile.results + t * tile.apart);
}

template <typename T, int ROWS, int FETCH, int TOKENS = GEMM_TOKENS>
void multiply_tokens(const Tile<T>& tile, int tokens) {
    if constexpr (TOKENS > 1) {
        if (tokens < TOKENS) {
            multiply_tokens<T, ROWS, FETCH, TOKENS - 1>(tile, tokens);
            return;
        }
    }
    multiply_tile<T, ROWS, TOKENS, FETCH>(tile);
}

template <typename T>
void multiply_rows(const Tile<T>& tile, int rows, int tokens, int fetch) {
    if (rows == 1) {
        fetch ? multiply_tokens<T, 1, 1>(tile, tokens) : multiply_tokens<T, 1, 0>(tile, tokens);
    } else if (fetch == 0) {
        multiply_tokens<T, GEMM_ROWS, 0>(tile, tokens);
    } else if (fetch == 1) {
        multiply_tokens<T, GEMM_ROWS, 1>(tile, tokens);
    } else if (fetch == GEMM_ROWS) {
        multiply_tokens<T, GEMM_ROWS, GEMM_ROWS>(tile, tokens);
    } else {
        multiply_tokens<T, GEMM_ROWS, GEMM_ROWS / 2>(tile, tokens);
    }
}

// At most COLUMNS rows of a weight matrix, and those that come next or null.
template <typename T>
struct Rows {
    const T *first, *following;
    int64_t next_tokens;  // that the following are multiplied with
    float* results;  // [token][row], tokens COLUMNS apart
};

// Tokens that are rows of T wherever they lie. They are prepared unless they can be read in place: if
// they are what would be prepared and do not compete for the same lines of the first cache.
template <typename T>
struct Gathered {
    const T* const* rows;
    bool in_place;
    const float* stretches[GEMM_TOKENS];
    alignas(64) float prepared[GEMM_TOKENS * STRETCH];

    Gathered(const T* const* of, int64_t stride, int64_t width, int count)
        : rows(of),
          in_place(
              Dot<T>::IN_PLACE && width % Dot<T>::STEP == 0 &&
              (stride * sizeof(T) % SAME_LINES || count <= FEW_TOKENS<T>)) {}

    // Whether all of a token is there at once.
    bool lie_prepared() const { return in_place; }

    const char* at(int token, int64_t start) const { return reinterpret_cast<const char*>(rows[token] + start); }

    const float* const* tokens(int first, int count, int64_t start, int64_t length) {
        for (int t = 0; t < count; ++t) {
            const T* const row = rows[first + t] + start;
            if (in_place) {
                stretches[t] = reinterpret_cast<const float*>(row);
            } else {
                stretches[t] = prepared + t * STRETCH;
                Dot<T>::prepare(row, length, prepared + t * STRETCH);
            }
        }
        return stretches;
    }
};

// Tokens that lie prepared, one after the other.
template <typename T>
struct Prepared {
    float* first;
    int64_t width;
    const float* stretches[GEMM_TOKENS];

    bool lie_prepared() const { return true; }

    const char* at(int token, int64_t start) const {
        return reinterpret_cast<const char*>(Dot<T>::place(first + token * width, start));
    }

    const float* const* tokens(int token, int count, int64_t start, int64_t) {
        for (int t = 0; t < count; ++t) {
            stretches[t] = Dot<T>::place(first + (token + t) * width, start);
        }
        return stretches;
    }
};

// A stretch of tokens [token, end), fetched a part at a time: many tokens outgrow a core's own caches.
template <typename Tokens>
struct TokensAhead {
    const Tokens& inputs;
    int64_t start, num_bytes;  // of a token's stretch
    int token, end;
    int64_t offset = 0;

    // As much as it takes to fetch all in so many parts.
    int64_t lines_of(int64_t parts) const {
        const int64_t lines = (end - token) * ((num_bytes + 63) / 64);
        return (lines + parts - 1) / parts;
    }

    void fetch(int64_t lines) {
        for (; lines > 0 && token < end; --lines) {
            prefetch(inputs.at(token, start) + offset);
            offset += 64;
            if (offset >= num_bytes) {
                offset = 0;
                ++token;
            }
        }
    }
};

// The products of at most FEW_TOKENS tokens with rows of at most WHOLE_STRETCHES, which follow one another without a
// gap. Rows that come next are fetched as they are needed then: all of them now, if more tokens come with them.
template <typename T, int NUM, typename Tokens>
void multiply_contiguous(
    const Rows<T> (&sets)[NUM], int64_t rows, int64_t width, int64_t stretch, Tokens& inputs, int tokens) {
    const float* const* const whole = inputs.tokens(0, tokens, 0, width);
    const bool many_next = sets[0].following != nullptr && sets[0].next_tokens > FEW_TOKENS<T>;
    for (int i = 0; i < NUM; ++i) {
        const T* const next_set = i + 1 < NUM ? sets[i + 1].first : sets[0].following;
        for (int64_t row = 0; row < rows;) {
            const Run<T> run = {
                sets[i].first + row * width, sets[i].first + rows * width, width, stretch, next_set,
                many_next ? sets[i].following + row * width : nullptr, whole, sets[i].results + row,
            };
            const bool is_whole = row + GEMM_ROWS <= rows;
            is_whole ? multiply_few<T, GEMM_ROWS>(run, tokens) : multiply_few<T, 1>(run, tokens);
            row += is_whole ? GEMM_ROWS : 1;
        }
    }
}

// results = rows . tokens for each of NUM sets of `rows` rows and at most BLOCK_TOKENS tokens.
template <typename T, int NUM, typename Tokens>
void multiply(
    const Rows<T> (&sets)[NUM], int64_t rows, int64_t width, Tokens& inputs, int tokens) {
    for (const Rows<T>& set : sets) std::memset(set.results, 0, tokens * COLUMNS * sizeof(float));
    const int tiles = (tokens + GEMM_TOKENS - 1) / GEMM_TOKENS;
    const int64_t stretches = (width + STRETCH - 1) / STRETCH;
    const int64_t stretch = native::rounded_up((width + stretches - 1) / stretches, 2 * LANES);
    if constexpr (FEW_TOKENS<T> > 0) {
        if (tokens <= FEW_TOKENS<T> && stretches <= (inputs.lie_prepared() ? WHOLE_STRETCHES : 1)) {
            multiply_contiguous(sets, rows, width, stretch, inputs, tokens);
            return;
        }
    }
    for (int64_t start = 0; start < width; start += stretch) {
        const int64_t length = width - start < stretch ? width - start : stretch;
        const bool is_last = start + length == width;
        for (int tile = 0, token = 0; tile < tiles; ++tile) {
            const int end = (tile + 1) * tokens / tiles, count = end - token;
            const float* const* stretches = inputs.tokens(token, count, start, length);
            const int next_end = tile + 1 < tiles ? (tile + 2) * tokens / tiles : end;
            TokensAhead<Tokens> ahead{inputs, start, length * int64_t{sizeof(T)}, end, next_end};
            const int64_t lines = ahead.lines_of(NUM * ((rows + GEMM_ROWS - 1) / GEMM_ROWS));
            // Of each GEMM_ROWS rows that come next, this tile's part is fetched.
            const int fetched = tile * GEMM_ROWS / tiles;
            const int fetch = (tile + 1) * GEMM_ROWS / tiles - fetched;
            for (const Rows<T>& set : sets) {
                const T* next = is_last ? set.following : set.first + start + length;
                for (int64_t row = 0; row < rows;) {
                    const int together = row + GEMM_ROWS <= rows ? GEMM_ROWS : 1;
                    const Tile<T> work = {
                        set.first + row * width + start, width, length,
                        next + row * width + (together == 1 ? 0 : fetched * (length / GEMM_ROWS)), width,
                        stretches, set.results + token * COLUMNS + row, COLUMNS,
                    };
                    ahead.fetch(lines);
                    multiply_rows(work, together, count, next ? fetch : 0);
                    row += together;
                }
            }
            token = end;
        }
    }
}

// Some rows of a matrix, and those that come next if there is one that they are of.
struct Slice {
    const native::Matrix& matrix;
    int64_t first;
    const native::Matrix* next;
    int64_t next_first;
    int64_t next_tokens;  // that they are multiplied with
    float* results;  // [token][row], tokens COLUMNS apart
};

// Matrices of T as they are multiplied with tokens of T.
template <typename T>
struct Plain {
    static constexpr int TOKENS = BLOCK_TOKENS;  // at a time
    static_assert(TOKENS <= native::MOST_TOKENS);

    explicit Plain(const native::Packing*) {}

    // Take activations of a token, from column `first` on, into its row of them.
    static void keep(const T* activations, int64_t count, float* row, int64_t first) {
        Dot<T>::prepare(activations, count, Dot<T>::place(row, first));
    }

    // Products of `rows` rows of each slice with tokens that lie somewhere, or whose rows were kept.
    template <int NUM>
    void multiply(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const T* const* tokens,
        int64_t stride, int count, float*) const {
        Gathered<T> inputs(tokens, stride, width, count);
        multiply_slices(slices, rows, width, inputs, count);
    }

    template <int NUM>
    void multiply_kept(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, float* kept, int64_t stride,
        int count, float*) const {
        Prepared<T> inputs{kept, stride, {}};
        multiply_slices(slices, rows, width, inputs, count);
    }

    // Products with tokens that lie arranged.
    template <int NUM>
    void multiply_arranged(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const Bf16* arranged, int count, float*) const {
        constexpr int64_t SIZE = sizeof(T);
        TileRows sets[NUM];
        multiply_by_tiles(sets, rows, width, arranged, count, [&](int64_t start, int64_t length) {
            for (int i = 0; i < NUM; ++i) {
                const Slice& slice = slices[i];
                const T* const here = row_of(slice.matrix, slice.first, width) + start;
                const bool is_last = start + length == width;
                const T* const next = !is_last     ? here + length
                                      : slice.next ? row_of(*slice.next, slice.next_first, width)
                                                   : nullptr;
                const RowsAhead ahead(next, width * SIZE, length * SIZE, rows);
                sets[i] = {here, width, false, ahead, piece_sums(slice.results)};
            }
        });
    }

  private:
    template <int NUM, typename Tokens>
    static void multiply_slices(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, Tokens& inputs, int count) {
        Rows<T> sets[NUM];
        for (int i = 0; i < NUM; ++i) {
            const Slice& slice = slices[i];
            const T* following = slice.next ? row_of(*slice.next, slice.next_first, width) : nullptr;
            sets[i] = {row_of(slice.matrix, slice.first, width), following, slice.next_tokens, slice.results};
        }
        ::multiply(sets, rows, width, inputs, count);
    }

    static const T* row_of(const native::Matrix& matrix, int64_t row, int64_t width) {
        return static_cast<const T*>(matrix.numbers) + row * width;
    }
};

}  // namespace
