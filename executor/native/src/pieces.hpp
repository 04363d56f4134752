// What the schedulers share: memory of the calling thread, and how many threads a call is worth.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernels.hpp"
#include "threads.hpp"

namespace native {

constexpr double LOG2_E = 1.4426950408889634;
constexpr int64_t BYTES_PER_THREAD = 128 << 10;  // less work is done sooner than a thread wakes

inline int64_t element_size(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Bytes of so many weights, but for scales that groups of them share.
inline int64_t weight_bytes(int64_t count, Dtype dtype, const Packing* packing) {
    if (packing == nullptr) return count * element_size(dtype);
    return packing->code == INT4 || packing->code == FP4 ? count / 2 : count;
}

// Floats, as yet unwritten, that begin with a cache line: vectors that straddle two take twice as long to load.
class Floats {
  public:
    explicit Floats(int64_t count = 0)
        : count_(count), memory_(new float[static_cast<size_t>(count + LINE)]) {}

    float* data() {
        const auto address = reinterpret_cast<uintptr_t>(memory_.get());
        return memory_.get() + (-address / sizeof(float)) % LINE;
    }
    int64_t count() const { return count_; }

  private:
    static constexpr int64_t LINE = 64 / sizeof(float);
    int64_t count_;
    std::unique_ptr<float[]> memory_;
};

inline float* at_least(int64_t count, Floats& memory) {
    if (memory.count() < count) memory = Floats(count);
    return memory.data();
}

// Scratch of the calling thread, kept between calls: of a piece of work, and what all pieces of its calls read.
inline float* scratch(int64_t count) {
    thread_local Floats memory;
    return at_least(count, memory);
}
inline float* shared_scratch(int64_t count) {
    thread_local Floats memory;
    return at_least(count, memory);
}

inline int threads_for(int threads, int64_t num_bytes) {
    return static_cast<int>(std::min<int64_t>(threads, 1 + num_bytes / BYTES_PER_THREAD));
}

}  // namespace native
