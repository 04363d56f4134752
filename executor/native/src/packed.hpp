// Products of packed matrices with tokens. A few tokens are multiplied with codes as they are read,
// and the sums of each lane's codes with its scale, so that packed weights are read from memory once
// and lie in no other form. For more tokens some rows are unpacked into a core's own cache and then
// multiplied as plain ones are.
#pragma once

#include <numeric>

#include "codes.hpp"
#include "gemm.hpp"

namespace {

using native::Matrix;
using native::Packing;

constexpr int CODED_TOKENS = 16;      // at most; more are multiplied with unpacked weights
constexpr int STRIP_ROWS = 8;         // whose scales are widened together
constexpr int64_t CODED_BYTES = 4096;  // of a token's stretch, which stays in the first cache
constexpr int64_t PANEL_BYTES = native::PANEL_ROW_BYTES - 64;
constexpr int64_t LEAST_GROUP = 16;   // columns

template <typename S>
void widen_scales(const void* from, int64_t first, int64_t count, float* to) {
    const S* const scales = static_cast<const S*>(from) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = widened(scales[i]);
}

inline void widen_scales(native::ScaleType type, const void* from, int64_t first, int64_t count, float* to) {
    switch (type) {
        case native::SCALE_FLOAT32: return widen_scales<float>(from, first, count, to);
        case native::SCALE_BFLOAT16: return widen_scales<Bf16>(from, first, count, to);
        case native::SCALE_FLOAT16: return widen_scales<Fp16>(from, first, count, to);
        case native::SCALE_E8M0: return widen_scales<E8m0>(from, first, count, to);
        default: return widen_scales<E4m3>(from, first, count, to);
    }
}

// Scales, and zero points if there are any, of some rows over a stretch of STEP columns at a time: one
// for each `unit` of them, as float32.
template <int STEP>
struct Strip {
    static constexpr int64_t MOST_UNITS = CODED_BYTES / 2 / LEAST_GROUP, APART = MOST_UNITS + LANES;
    const Packing& packing;
    int64_t unit, groups;    // groups of a row
    int32_t lanes[LANES];    // which of a step's scales each lane has
    alignas(64) float scales[STRIP_ROWS * APART];
    alignas(64) float zeros[STRIP_ROWS * APART];

    Strip(const Packing& of, int64_t width)
        : packing(of),
          unit(of.columns ? std::gcd(of.columns, STEP) : STEP),
          groups(of.columns ? (width + of.columns - 1) / of.columns : 1) {
        for (int lane = 0; lane < LANES; ++lane) {
            lanes[lane] = static_cast<int32_t>(lane * (STEP / LANES) / unit);
        }
    }

    int64_t first_group(int64_t start) const { return packing.columns ? start / packing.columns : 0; }

    void read(const Matrix& matrix, int64_t row, int64_t rows, int64_t start, int64_t columns) {
        const int64_t first = first_group(start), count = first_group(start + columns - 1) + 1 - first;
        const int64_t needed = (columns + STEP - 1) / STEP * (STEP / unit);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t offset = (row + r) / packing.rows * groups + first;
            float* const to = scales + r * APART;
            widen_scales(packing.scale, matrix.scales, offset, count, to);
            if (matrix.row_scales) {
                for (int64_t i = 0; i < count; ++i) to[i] *= matrix.row_scales[row + r];
            }
            repeat(to, count, needed, start);
            if (matrix.zeros) {
                float* const points = zeros + r * APART;
                for (int64_t i = 0; i < count; ++i) points[i] = matrix.zeros[offset + i];
                repeat(points, count, needed, start);
            }
        }
    }

    void prefetch_scales(const Matrix& matrix, int64_t row, int64_t rows) const {
        const int64_t size = packing.scale == native::SCALE_FLOAT32 ? 4 : packing.scale >= native::SCALE_E8M0 ? 1 : 2;
        const char* const from = static_cast<const char*>(matrix.scales);
        const int64_t last = ((row + rows - 1) / packing.rows + 1) * groups * size;
        for (int64_t i = row / packing.rows * groups * size; i < last; i += 64) prefetch(from + i);
    }

  private:
    // Make one for each unit of one for each group, where these are larger; zeros follow.
    void repeat(float* values, int64_t count, int64_t needed, int64_t start) const {
        if (unit != packing.columns) {
            int64_t group = count - 1;
            for (int64_t i = needed - 1; i >= 0; --i) {
                while (group > 0 && start + i * unit < (first_group(start) + group) * packing.columns) --group;
                values[i] = values[group];
            }
        } else {
            for (int64_t i = count; i < needed; ++i) values[i] = 0.0f;
        }
    }
};

// A stretch of some rows of codes, and the same stretch of the tokens that it is multiplied with.
template <typename C>
struct CodedTile {
    const C& kind;
    const uint8_t* codes;
    int64_t row_bytes, columns;
    const uint8_t* ahead;        // codes that come next, to be fetched now
    const float *scales, *zeros;  // of the first row; zeros may be null
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
    Codes rows[ROWS];
    const int64_t whole = columns / C::COLUMNS;
    for (int64_t s = 0; s < whole; ++s) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) rows[r] = codes_at(codes + r * row_bytes + s * BYTES);
        each(s, rows);
    }
    if (const int64_t left = columns - whole * C::COLUMNS) {
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t* const from = codes + r * row_bytes + whole * BYTES;
            rows[r] = codes_at(from, (left * BYTES + C::COLUMNS - 1) / C::COLUMNS);
        }
        each(whole, rows);
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
        if (sizeof(Codes) == 64 || s * sizeof(Codes) % 64 == 0) {
            UNROLL
            for (int r = 0; r < ROWS; ++r) {
                prefetch(reinterpret_cast<const char*>(tile.ahead + r * tile.row_bytes + s * sizeof(Codes)));
            }
        }
        Floats parts[TOKENS][ROWS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            UNROLL
            for (int r = 0; r < ROWS; ++r) parts[t][r] = zeros();
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
            const int64_t place = r * tile.apart + s * tile.units;
            const Floats scale = C::checked(rows[r], spread(tile.scales + place, tile.lanes));
            if (tile.zeros) {
                const Floats less = multiply(spread(tile.zeros + place, tile.lanes), splat(-1.0f));
                UNROLL
                for (int t = 0; t < TOKENS; ++t) {
                    parts[t][r] = multiply_add(less, widen(tile.totals[t] + s * LANES), parts[t][r]);
                }
            }
            UNROLL
            for (int t = 0; t < TOKENS; ++t) sums[t][r] = multiply_add(parts[t][r], scale, sums[t][r]);
        }
    });
    UNROLL
    for (int t = 0; t < TOKENS; ++t) add_sums<ROWS>(sums[t], tile.results + t * COLUMNS);
}

template <typename C, int ROWS, int TOKENS = CODE_TOKENS>
void multiply_coded(const CodedTile<C>& tile, int tokens) {
    if constexpr (TOKENS > 1) {
        if (tokens < TOKENS) return multiply_coded<C, ROWS, TOKENS - 1>(tile, tokens);
    }
    multiply_codes<C, ROWS, TOKENS>(tile);
}

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
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const T* const* tokens, int64_t,
        int count, float* scratch) const {
        for (const Slice& slice : slices) std::memset(slice.results, 0, count * COLUMNS * sizeof(float));
        if (count <= CODED_TOKENS) {
            by_codes(slices, rows, width, tokens, count);
        } else {
            by_panels(slices, rows, width, tokens, count, reinterpret_cast<Number*>(scratch));
        }
    }

    template <int NUM>
    void multiply_kept(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, float* kept, int64_t stride,
        int count, float* scratch) const {
        const T* tokens[TOKENS];
        for (int t = 0; t < count; ++t) tokens[t] = reinterpret_cast<const T*>(kept + t * stride);
        multiply(slices, rows, width, tokens, stride, count, scratch);
    }

  private:
    const Packing& packing_;

    // Stretches of about the same length, of whole steps but for the last.
    static int64_t stretch_of(int64_t width, int64_t most) {
        const int64_t stretches = (width + most - 1) / most;
        return native::rounded_up((width + stretches - 1) / stretches, C::COLUMNS);
    }

    int64_t bytes_of(int64_t columns) const {
        return packing_.code == native::INT4 || packing_.code == native::FP4 ? columns / 2 : columns;
    }

    C kind_of(const Matrix& matrix) const { return C(half_byte_table(packing_.code, matrix.zeros)); }

    template <int NUM>
    void by_codes(
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const T* const* tokens, int count) const {
        using Inputs = Ordered<T, C, CODE_TOKENS, CODED_BYTES>;
        const int64_t stretch = stretch_of(width, Inputs::STRETCH), row_bytes = bytes_of(width);
        const int tiles = (count + CODE_TOKENS - 1) / CODE_TOKENS;
        Inputs inputs;
        Strip<C::COLUMNS> strip(packing_, width);
        for (int64_t start = 0; start < width; start += stretch) {
            const int64_t columns = width - start < stretch ? width - start : stretch;
            const bool is_last = start + columns == width;
            for (int tile = 0, token = 0; tile < tiles; ++tile) {
                const int end = (tile + 1) * count / tiles;
                inputs.take(tokens + token, end - token, start, columns);
                for (const Slice& slice : slices) {
                    const C kind = kind_of(slice.matrix);
                    const uint8_t* const codes = codes_at_row(slice.matrix, slice.first, row_bytes, bytes_of(start));
                    const uint8_t* next = codes + bytes_of(columns);
                    if (is_last) next = slice.next ? codes_at_row(*slice.next, slice.next_first, row_bytes, 0) : codes;
                    int64_t in_strip = STRIP_ROWS;
                    for (int64_t row = 0; row < rows;) {
                        if (in_strip == STRIP_ROWS) {
                            const int64_t some = rows - row < STRIP_ROWS ? rows - row : STRIP_ROWS;
                            strip.read(slice.matrix, slice.first + row, some, start, columns);
                            if (is_last && slice.next && tile == 0) {
                                strip.prefetch_scales(*slice.next, slice.next_first + row, some);
                            }
                            in_strip = 0;
                        }
                        const int together = row + CODE_ROWS <= rows ? CODE_ROWS : 1;
                        // Each tile fetches its share of the rows that come next.
                        const bool fetches = row / CODE_ROWS % tiles == tile;
                        const CodedTile<C> work = {
                            kind, codes + row * row_bytes, row_bytes, columns,
                            (fetches ? next : codes) + row * row_bytes,
                            strip.scales + in_strip * strip.APART,
                            slice.matrix.zeros ? strip.zeros + in_strip * strip.APART : nullptr,
                            strip.APART, C::COLUMNS / strip.unit, strip.lanes, inputs.tokens, inputs.totals,
                            slice.results + token * COLUMNS + row,
                        };
                        if (together == CODE_ROWS) {
                            multiply_coded<C, CODE_ROWS>(work, end - token);
                        } else {
                            multiply_coded<C, 1>(work, end - token);
                        }
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
        const Slice (&slices)[NUM], int64_t rows, int64_t width, const T* const* tokens, int count,
        Number* panels) const {
        using Inputs = Ordered<T, C, GEMM_TOKENS, PANEL_BYTES>;
        constexpr int64_t APART = native::PANEL_ROW_BYTES / sizeof(Number);
        const int64_t stretch = stretch_of(width, Inputs::STRETCH);
        const int tiles = (count + GEMM_TOKENS - 1) / GEMM_TOKENS;
        Inputs inputs;
        for (int64_t start = 0; start < width; start += stretch) {
            const int64_t columns = width - start < stretch ? width - start : stretch;
            for (int i = 0; i < NUM; ++i) {
                unpack(slices[i], rows, width, start, columns, panels + i * COLUMNS * APART);
            }
            for (int tile = 0, token = 0; tile < tiles; ++tile) {
                const int end = (tile + 1) * count / tiles;
                inputs.take(tokens + token, end - token, start, columns);
                const float* numbers[GEMM_TOKENS];
                for (int t = 0; t < end - token; ++t) numbers[t] = reinterpret_cast<const float*>(inputs.tokens[t]);
                for (int i = 0; i < NUM; ++i) {
                    const Number* const panel = panels + i * COLUMNS * APART;
                    for (int64_t row = 0; row < rows;) {
                        const int together = row + GEMM_ROWS <= rows ? GEMM_ROWS : 1;
                        const Tile<Number> work = {
                            panel + row * APART, APART, native::rounded_up(columns, C::COLUMNS), nullptr, numbers,
                            slices[i].results + token * COLUMNS + row, COLUMNS,
                        };
                        multiply_rows(work, together, end - token, 0);
                        row += together;
                    }
                }
                token = end;
            }
        }
    }

    void unpack(
        const Slice& slice, int64_t rows, int64_t width, int64_t start, int64_t columns, Number* panel) const {
        using D = Dot<Number>;
        constexpr int64_t APART = native::PANEL_ROW_BYTES / sizeof(Number);
        const C kind = kind_of(slice.matrix);
        const int64_t row_bytes = bytes_of(width), offset = bytes_of(start);
        Strip<C::COLUMNS> strip(packing_, width);
        const int64_t units = C::COLUMNS / strip.unit;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t in_strip = row % STRIP_ROWS;
            if (in_strip == 0) {
                const int64_t some = rows - row < STRIP_ROWS ? rows - row : STRIP_ROWS;
                strip.read(slice.matrix, slice.first + row, some, start, columns);
            }
            const float* const scales = strip.scales + in_strip * strip.APART;
            const float* const points = strip.zeros + in_strip * strip.APART;
            Number* const to = panel + row * APART;
            const uint8_t* const codes = codes_at_row(slice.matrix, slice.first + row, row_bytes, offset);
            for_each_step<C, 1>(codes, row_bytes, columns, [&](int64_t s, const Codes (&rows)[1]) {
                const Floats scale = C::checked(rows[0], spread(scales + s * units, strip.lanes));
                const Floats zero = slice.matrix.zeros ? spread(points + s * units, strip.lanes) : zeros();
                [&]<int... K>(std::integer_sequence<int, K...>) {
                    (::store(to + s * C::COLUMNS + K * D::STEP,
                             C::meant(kind.template operand<K>(rows[0]), zero, scale)), ...);
                }(std::make_integer_sequence<int, C::OPERANDS>{});
            });
        }
    }
};

constexpr int64_t PRODUCTS = 2 * native::MOST_TOKENS * COLUMNS;  // floats of scratch before panels

template <typename W>
int at_once(int64_t tokens) {
    return static_cast<int>(tokens < W::TOKENS ? tokens : W::TOKENS);
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
            const int tokens = at_once<W>(shape.tokens - t);
            const T* rows[W::TOKENS];
            for (int i = 0; i < tokens; ++i) rows[i] = x + (t + i) * shape.x_stride;
            const bool is_last = t + tokens == shape.tokens && next >= 0;
            float* const products = scratch;
            const Slice all[] = {{shape.w, first, is_last ? &shape.w : nullptr, next, products}};
            weights.multiply(all, last - first, shape.width, rows, shape.x_stride, tokens, scratch + PRODUCTS);
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
