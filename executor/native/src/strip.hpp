// Scales and zero points of packed weights as float32, one for some columns at a time.
#pragma once

#include <numeric>

#include "fetcher.hpp"
#include "simd.hpp"

namespace {

using native::Matrix;
using native::Packing;

constexpr int STRIP_ROWS = 8;         // whose scales are widened together
constexpr int64_t CODED_BYTES = 8192;  // of a token's stretch, which stays in the first cache
constexpr int64_t LEAST_GROUP = 16;   // columns

template <typename S>
void widen_scales(const void* from, int64_t first, int64_t count, float* to) {
    const S* const scales = static_cast<const S*>(from) + first;
    int64_t i = 0;
    if constexpr (requires { widen(scales); }) {
        for (; i + LANES <= count; i += LANES) store(to + i, widen(scales + i));
    }
    for (; i < count; ++i) to[i] = widened(scales[i]);
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
    int64_t units;           // from step to step: none where a row has one scale
    int64_t apart;           // from row to row: none where all have the same
    int32_t lanes[LANES];    // which of a step's scales each lane has
    alignas(64) float scales[STRIP_ROWS * APART];
    alignas(64) float less[STRIP_ROWS * APART];  // negative zero points

    Strip(const Packing& of, int64_t width)
        : packing(of),
          unit(of.columns ? std::gcd(of.columns, STEP) : STEP),
          groups(of.columns ? (width + of.columns - 1) / of.columns : 1),
          units(of.columns ? STEP / unit : 0),
          apart(APART) {
        for (int lane = 0; lane < LANES; ++lane) {
            lanes[lane] = static_cast<int32_t>(lane * (STEP / LANES) / unit);
        }
    }

    int64_t first_group(int64_t start) const { return packing.columns ? start / packing.columns : 0; }

    void read(const Matrix& matrix, int64_t row, int64_t rows, int64_t start, int64_t columns) {
        const int64_t first = first_group(start), count = first_group(start + columns - 1) + 1 - first;
        const bool are_same = row / packing.rows == (row + rows - 1) / packing.rows && !matrix.row_scales;
        apart = are_same ? 0 : APART;
        for (int64_t r = 0; r < (are_same ? 1 : rows); ++r) {
            const int64_t offset = (row + r) / packing.rows * groups + first;
            float* const to = scales + r * APART;
            widen_scales(packing.scale, matrix.scales, offset, count, to);
            if (matrix.row_scales) {
                const float factor = matrix.row_scales[row + r];
                for (int64_t i = 0; i < count; ++i) to[i] *= factor;
            }
            repeat(to, count, start, columns);
            if (matrix.zeros) {
                float* const points = less + r * APART;
                for (int64_t i = 0; i < count; ++i) points[i] = -static_cast<float>(matrix.zeros[offset + i]);
                repeat(points, count, start, columns);
            }
        }
    }

    // Fetchers of scales and zero points from a row on, and how many bytes of both each row has of its own.
    Fetcher scales_from(const Matrix& matrix, int64_t row) const {
        return Fetcher(static_cast<const char*>(matrix.scales) + row / packing.rows * groups * scale_size());
    }
    Fetcher zeros_from(const Matrix& matrix, int64_t row) const {
        return Fetcher(matrix.zeros ? matrix.zeros + row / packing.rows * groups : nullptr);
    }
    int64_t scale_bytes() const { return groups * scale_size() / packing.rows; }
    int64_t zero_bytes() const { return groups / packing.rows; }

  private:
    int64_t scale_size() const {
        return packing.scale == native::SCALE_FLOAT32 ? 4 : packing.scale >= native::SCALE_E8M0 ? 1 : 2;
    }

    // Make one for each unit of one for each group, where these are larger; zeros follow.
    void repeat(float* values, int64_t count, int64_t start, int64_t columns) const {
        if (units == 0) return;
        const int64_t needed = (columns + STEP - 1) / STEP * units;
        if (unit == packing.columns) {
            for (int64_t i = count; i < needed; ++i) values[i] = 0.0f;
            return;
        }
        int64_t group = count - 1, first = (first_group(start) + group) * packing.columns - start;
        for (int64_t i = needed - 1; i >= 0; --i) {
            for (; i * unit < first && group > 0; first -= packing.columns) --group;
            values[i] = values[group];
        }
    }
};

}  // namespace
