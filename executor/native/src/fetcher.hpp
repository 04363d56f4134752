// Reading ahead while there is something to compute.
#pragma once

#include "simd.hpp"

namespace {

// Fetches memory in the order of its addresses, as much whenever it is asked to as is then read.
struct Fetcher {
    const char *next, *until;

    explicit Fetcher(const void* from) : next(static_cast<const char*>(from)), until(next) {}

    void fetch(int64_t num_bytes) {
        if (next == nullptr) return;
        until += num_bytes;
        for (; next < until; next += 64) prefetch(next);
    }
};

}  // namespace
