// Reading ahead while there is something to compute.
#pragma once

#include "simd.hpp"

namespace {

// Fetches memory in the order of its addresses, as much whenever it is asked to as is then read; or
// 2^narrower times less, where what is read was made of so much less.
struct Fetcher {
    const char *next, *until;
    int narrower;

    explicit Fetcher(const void* from = nullptr, int narrower = 0)
        : next(static_cast<const char*>(from)), until(next), narrower(narrower) {}

    void fetch(int64_t num_bytes) {
        if (next == nullptr) return;
        until += num_bytes >> narrower;
        for (; next < until; next += 64) prefetch(next);
    }
};

}  // namespace
