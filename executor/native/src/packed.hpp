// Products of packed matrices with tokens. A few tokens are multiplied with codes as they are read,
// and the sums of each lane's codes with its scale, so that packed weights are read from memory once
// and lie in no other form. For more tokens some rows are unpacked into a core's own cache and then
// multiplied as plain ones are.
#pragma once

#include "coded.hpp"
#include "gemm.hpp"
#include "unpacker.hpp"

namespace {

// At most; more are multiplied with unpacked weights: sooner in float32, of which registers hold fewer sums.
template <typename Number>
constexpr int CODED_TOKENS = sizeof(Number) == sizeof(float) ? 4 : 8;
// Steps of int8 whose sums are scaled together where they share a scale, however many tokens there are: results would
// depend on it. One token's fp8 would be later so.
constexpr int LONG_RUN = 8;
constexpr int64_t PANEL_BYTES = native::PANEL_ROW_BYTES - 64;

// Tokens of T over a stretch in the order of the codes, and their totals.
template <typename T, typename C, int TOKENS, int64_t BYTES>
struct Ordered {
    using Number = typename C::Number;
    static constexpr int64_t STRETCH = BYTES / sizeof(Number), TOTALS = STRETCH / C::COLUMNS * LANES;
    alignas(64) Number numbers[TOKENS * STRETCH];
    alignas(64) float sums[TOKENS * TOTALS];
    const Number* tokens[TOKENS];
    const float* totals[TOKENS];

    void take(const T* const* rows, int count, int64_t start, int64_t columns) {
        for (int t = 0; t < count; ++t) {
            const T* const from = rows[t] + start;
            Number* const to = numbers + t * STRETCH;
            float* const total = sums + t * TOTALS;
            for (int64_t i = 0, s = 0; i < columns; i += C::COLUMNS, s += LANES) {
                Padded<T, C::COLUMNS> padded;
                const bool whole = i + C::COLUMNS <= columns;
                ::store(total + s, C::order(whole ? from + i : padded.from(from + i, columns - i), to + i));
            }
            tokens[t] = to;
            totals[t] = total;
        }
    }
};

// The same for panels, as `Gathered` has them.
template <typename T, typename C, int64_t LONGEST>
struct Reordered {
    using Number = typename C::Number;
    const T* const* rows;
    const float* stretches[GEMM_TOKENS];
    Ordered<T, C, GEMM_TOKENS, LONGEST * sizeof(Number)> ordered;

    Reordered(const T* const* of, int64_t, int64_t, int) : rows(of) {}

    bool lie_prepared() const { return false; }

    const char* at(int token, int64_t start) const { return reinterpret_cast<const char*>(rows[token] + start); }

    const float* const* tokens(int first, int count, int64_t start, int64_t columns) {
        ordered.take(rows + first, count, start, columns);
        for (int t = 0; t < count; ++t) stretches[t] = reinterpret_cast<const float*>(ordered.tokens[t]);
        return stretches;
    }
};

// Matrices packed in codes of the kind C, as they are multiplied with tokens of T.
template <typename T, typename C>
class PackedIn {
    using Number = typename C::Number;

  public:
    static constexpr int TOKENS = native::MOST_TOKENS;

    explicit PackedIn(const Packing* packing) : packing_(*packing) {}

    static void keep(const T* activations, int64_t count, float* row, int64_t first) {
        std::memcpy(reinterpret_cast<T*>(row) + first, activations, count * sizeof(T));
    }

    template <int NUM>
    void multiply(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const T* const* tokens, int64_t stride,
        int count, float* scratch) const {
        for (const Slice& slice : slices) std::memset(slice.results, 0, count * COLUMNS * sizeof(float));
        if (count <= CODED_TOKENS<Number>) {
            // Sums with zero points are of a step.
            const int64_t shared = slices[0].matrix.zeros ? 1 : packing_.columns;
            constexpr bool IS_INT8 = std::is_same_v<C, typename Kinds<T>::Whole>;
            constexpr bool MAY_BE_LONG = IS_INT8 && sizeof(Number) < sizeof(float);
            constexpr int64_t LONG = LONG_RUN * C::COLUMNS;
            if (MAY_BE_LONG && shared % LONG == 0 && width % LONG == 0) {
                by_codes<MAY_BE_LONG ? LONG_RUN : 1>(slices, rows, width, tokens, count);
            } else if (shared % (2 * C::COLUMNS) == 0) {
                by_codes<2>(slices, rows, width, tokens, count);
            } else {
                by_codes<1>(slices, rows, width, tokens, count);
            }
        } else {
            by_panels(slices, rows, width, tokens, stride, count, reinterpret_cast<Number*>(scratch));
        }
    }

    template <int NUM>
    void multiply_kept(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, float* kept, int64_t stride,
        int count, float* scratch) const {
        const T* tokens[TOKENS];
        for (int t = 0; t < count; ++t) tokens[t] = reinterpret_cast<const T*>(kept + t * stride);
        constexpr int64_t ELEMENTS = sizeof(float) / sizeof(T);
        multiply(slices, rows, width, tokens, stride * ELEMENTS, count, scratch);
    }

    // Products with tokens that lie arranged: each stretch of the rows is unpacked into a panel.
    template <int NUM>
    void multiply_arranged(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const Bf16* arranged, int count,
        float* scratch) const {
        constexpr int64_t APART = native::PANEL_ROW_BYTES / sizeof(Bf16);
        Bf16* const panels = reinterpret_cast<Bf16*>(scratch);
        TileRows sets[NUM];
        multiply_by_tiles(sets, rows, width, arranged, count, [&](int64_t start, int64_t length) {
            for (int i = 0; i < NUM; ++i) {
                const Slice& slice = slices[i];
                Bf16* const panel = panels + i * COLUMNS * APART;
                unpack<Tiled<C>>(slice, rows, width, start, length, panel);
                if constexpr (Tiled<C>::COLUMNS < TILE_COLUMNS) {  // the last tile may begin where codes end
                    const int64_t written = native::rounded_up(length, Tiled<C>::COLUMNS);
                    const int64_t left = native::rounded_up(length, TILE_COLUMNS) - written;
                    for (int64_t r = 0; r < rows; ++r) std::memset(panel + r * APART + written, 0, left * sizeof(Bf16));
                }
                const Matrix* const next = slice.next;
                const int64_t passed = rows * bytes_of(start);
                const RowsAhead ahead(
                    next ? codes_at_row(*next, slice.next_first, bytes_of(width), passed) : nullptr, 0,
                    rows * bytes_of(start + length) - passed, 1);
                sets[i] = {panel, APART, true, ahead, piece_sums(slice.results)};
            }
        });
    }

  private:
    const Packing& packing_;

    // Stretches of about the same length, of whole units but for the last.
    static int64_t stretch_of(int64_t width, int64_t most, int64_t unit = C::COLUMNS) {
        const int64_t stretches = (width + most - 1) / most;
        return native::rounded_up((width + stretches - 1) / stretches, unit);
    }

    int64_t bytes_of(int64_t columns) const {
        return packing_.code == native::INT4 || packing_.code == native::FP4 ? columns / 2 : columns;
    }

    template <typename K = C>
    K kind_of(const Matrix& matrix) const {
        return K(half_byte_table(packing_.code, matrix.zeros));
    }

    template <int RUN, int NUM>
    void by_codes(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const T* const* tokens, int count) const {
        constexpr int MOST = TOKENS_WITH<C, RUN>;
        using Inputs = Ordered<T, C, MOST, CODED_BYTES * CODE_TOKENS / MOST>;
        const int64_t stretch = stretch_of(width, Inputs::STRETCH, RUN * C::COLUMNS), row_bytes = bytes_of(width);
        const int tiles = (count + MOST - 1) / MOST;
        Inputs inputs;
        Strip<C::COLUMNS> strip(packing_, width);
        // What comes next is fetched in the order of its addresses, by each tile its share of it.
        const uint8_t* following[NUM];
        Fetcher scales[NUM], points[NUM];
        for (int i = 0; i < NUM; ++i) {
            const Matrix* const next = slices[i].next;
            following[i] = next ? codes_at_row(*next, slices[i].next_first, row_bytes, 0) : nullptr;
            if (next) scales[i] = strip.scales_from(*next, slices[i].next_first);
            if (next) points[i] = strip.zeros_from(*next, slices[i].next_first);
        }
        for (int64_t start = 0; start < width; start += stretch) {
            const int64_t columns = width - start < stretch ? width - start : stretch;
            for (int tile = 0, token = 0; tile < tiles; ++tile) {
                const int end = (tile + 1) * count / tiles, rows_at_once = rows_with<C>(end - token);
                inputs.take(tokens + token, end - token, start, columns);
                for (int i = 0; i < NUM; ++i) {
                    const Slice& slice = slices[i];
                    const C kind = kind_of(slice.matrix);
                    const uint8_t* const codes = codes_at_row(slice.matrix, slice.first, row_bytes, bytes_of(start));
                    int64_t in_strip = STRIP_ROWS;
                    for (int64_t row = 0; row < rows;) {
                        if (in_strip == STRIP_ROWS) {
                            const int64_t some = rows - row < STRIP_ROWS ? rows - row : STRIP_ROWS;
                            strip.read(slice.matrix, slice.first + row, some, start, columns);
                            in_strip = 0;
                        }
                        const int together = row + rows_at_once <= rows ? rows_at_once : 1;
                        const bool fetches = row / rows_at_once % tiles == tile && slice.next;
                        if (fetches) {
                            scales[i].fetch(together * strip.scale_bytes() * columns / width);
                            points[i].fetch(together * strip.zero_bytes() * columns / width);
                        }
                        const CodedTile<C> work = {
                            kind, codes + row * row_bytes, row_bytes, columns,
                            fetches ? following[i] : codes + row * row_bytes,
                            strip.scales + in_strip * strip.apart,
                            slice.matrix.zeros ? strip.less + in_strip * strip.apart : nullptr,
                            strip.apart, strip.units, strip.lanes, inputs.tokens, inputs.totals,
                            slice.results + token * COLUMNS + row,
                        };
                        multiply_coded<C, RUN>(work, together, end - token);
                        if (fetches) following[i] += together * bytes_of(columns);
                        row += together;
                        in_strip += together;
                    }
                }
                token = end;
            }
        }
    }

    static const uint8_t* codes_at_row(const Matrix& matrix, int64_t row, int64_t row_bytes, int64_t offset) {
        return static_cast<const uint8_t*>(matrix.numbers) + row * row_bytes + offset;
    }

    template <int NUM>
    void by_panels(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const T* const* tokens, int64_t stride, int count,
        Number* panels) const {
        constexpr bool IN_ORDER = Unpacker<C>::IN_ORDER;
        constexpr int64_t LONGEST = PANEL_BYTES / sizeof(Number);
        using Inputs = std::conditional_t<IN_ORDER, Gathered<T>, Reordered<T, C, LONGEST>>;
        constexpr int64_t APART = native::PANEL_ROW_BYTES / sizeof(Number);
        const int64_t stretch = stretch_of(width, LONGEST);
        const int tiles = (count + GEMM_TOKENS - 1) / GEMM_TOKENS;
        Inputs inputs(tokens, stride, width, count);
        // Each group of rows fetches as much of what comes next as one of them is long.
        const uint8_t *following[NUM] = {}, *end_of[NUM] = {};
        for (int i = 0; i < NUM; ++i) {
            if (slices[i].next == nullptr) continue;
            following[i] = codes_at_row(*slices[i].next, slices[i].next_first, bytes_of(width), 0);
            end_of[i] = following[i] + rows * bytes_of(width);
        }
        for (int64_t start = 0; start < width; start += stretch) {
            const int64_t columns = width - start < stretch ? width - start : stretch;
            const int64_t length = IN_ORDER ? columns : native::rounded_up(columns, C::COLUMNS);
            for (int i = 0; i < NUM; ++i) {
                unpack<C>(slices[i], rows, width, start, columns, panels + i * COLUMNS * APART);
            }
            for (int tile = 0, token = 0; tile < tiles; ++tile) {
                const int end = (tile + 1) * count / tiles;
                const float* const* const numbers = inputs.tokens(token, end - token, start, columns);
                const int next_end = tile + 1 < tiles ? (tile + 2) * count / tiles : end;
                TokensAhead<Inputs> ahead{inputs, start, columns * int64_t{sizeof(T)}, end, next_end};
                const int64_t lines = ahead.lines_of(NUM * ((rows + GEMM_ROWS - 1) / GEMM_ROWS));
                for (int i = 0; i < NUM; ++i) {
                    const Number* const panel = panels + i * COLUMNS * APART;
                    for (int64_t row = 0; row < rows;) {
                        const int together = row + GEMM_ROWS <= rows ? GEMM_ROWS : 1;
                        const bool fetches = following[i] < end_of[i];
                        const Tile<Number> work = {
                            panel + row * APART, APART, length, reinterpret_cast<const Number*>(following[i]),
                            length / GEMM_ROWS, numbers, slices[i].results + token * COLUMNS + row, COLUMNS,
                        };
                        ahead.fetch(lines);
                        multiply_rows(work, together, end - token, fetches);
                        if (fetches) following[i] += length * sizeof(Number);
                        row += together;
                    }
                }
                token = end;
            }
        }
    }

    // Write a stretch of some rows out as codes of the kind K are.
    template <typename K>
    void unpack(
        const Slice& slice, int64_t rows, int64_t width, int64_t start, int64_t columns,
        typename K::Number* panel) const {
        constexpr int64_t APART = native::PANEL_ROW_BYTES / sizeof(*panel);
        const K kind = kind_of<K>(slice.matrix);
        const int64_t row_bytes = bytes_of(width), offset = bytes_of(start);
        Strip<K::COLUMNS> strip(packing_, width);
        Unpacker<K> unpacker{kind, strip};
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t in_strip = row % STRIP_ROWS;
            if (in_strip == 0) {
                const int64_t some = rows - row < STRIP_ROWS ? rows - row : STRIP_ROWS;
                strip.read(slice.matrix, slice.first + row, some, start, columns);
            }
            const float* const scales = strip.scales + in_strip * strip.apart;
            const float* const less = slice.matrix.zeros ? strip.less + in_strip * strip.apart : nullptr;
            auto* const to = panel + row * APART;
            const uint8_t* const codes = codes_at_row(slice.matrix, slice.first + row, row_bytes, offset);
            const auto write = [&](int64_t s, const uint8_t* from) {
                const int64_t place = s * strip.units;
                unpacker.write(codes_at(from), scales + place, less ? less + place : nullptr, to + s * K::COLUMNS);
            };
            constexpr int64_t BYTES = sizeof(Codes);
            const int64_t whole = columns / K::COLUMNS, left = columns % K::COLUMNS;
            for (int64_t s = 0; s < whole; ++s) write(s, codes + s * BYTES);
            if (left > 0) {
                uint8_t last[BYTES];
                write(whole, last_step<K>(codes + whole * BYTES, left, last));
            }
        }
    }
};

constexpr int64_t PRODUCTS = 2 * native::MOST_TOKENS * COLUMNS;  // floats of scratch before panels

template <typename W>
int at_once(int64_t tokens, bool are_arranged) {
    const int most = are_arranged ? native::MOST_TOKENS : W::TOKENS;
    return static_cast<int>(tokens < most ? tokens : most);
}

// Products of `rows` rows of each slice with tokens from `first` on, a multiple of TILE, that lie arranged.
template <typename T, typename W, int NUM>
void multiply_arranged(
    const W& weights, const Slice (&slices)[NUM], int64_t rows, int64_t width, const void* arranged,
    int64_t first, int count, float* scratch) {
    if constexpr (TILED<T>) {
        const Bf16* const tokens = static_cast<const Bf16*>(arranged) + native::arranged_elements(first, width);
        weights.multiply_arranged(slices, rows, width, tokens, count, scratch);
    }
}

// Call work(the kind of matrices that it says).
template <typename T, typename Work>
void with_packing(const Packing* packing, const Work& work) {
    if (packing == nullptr) {
        work(Plain<T>(packing));
    } else if (packing->code == native::FP8) {
        work(PackedIn<T, typename Kinds<T>::Narrow>(packing));
    } else if (packing->code == native::INT8) {
        work(PackedIn<T, typename Kinds<T>::Whole>(packing));
    } else {
        work(PackedIn<T, typename Kinds<T>::Halves>(packing));
    }
}

// Columns [first, last) of `out = x @ w.T`, or added to what `out` is.
template <typename T>
void linear(const native::Linear& shape, int64_t first, int64_t last, int64_t next, float* scratch) {
    with_packing<T>(shape.packing, [&]<typename W>(const W& weights) {
        const T* x = static_cast<const T*>(shape.x);
        T* out = static_cast<T*>(shape.out);
        for (int64_t t = 0; t < shape.tokens;) {
            const int tokens = at_once<W>(shape.tokens - t, shape.arranged);
            const bool is_last = t + tokens == shape.tokens && next >= 0;
            float* const products = scratch;
            const Slice all[] = {{shape.w, first, is_last ? &shape.w : nullptr, next, shape.tokens, products}};
            if (shape.arranged) {
                multiply_arranged<T>(
                    weights, all, last - first, shape.width, shape.arranged, t, tokens, scratch + PRODUCTS);
            } else {
                const T* rows[W::TOKENS];
                for (int i = 0; i < tokens; ++i) rows[i] = x + (t + i) * shape.x_stride;
                weights.multiply(all, last - first, shape.width, rows, shape.x_stride, tokens, scratch + PRODUCTS);
            }
            for (int i = 0; i < tokens; ++i) {
                T* row = out + (t + i) * shape.out_stride + first;
                const float* sums = products + i * COLUMNS;
                for (int64_t c = 0; c < last - first; ++c) {
                    narrow(shape.add ? widened(row[c]) + sums[c] : sums[c], row + c);
                }
            }
            t += tokens;
        }
    });
}

}  // namespace
