// Reading ahead while there is something to compute.
#pragma once

#include "simd.hpp"

namespace {

// Fetches memory in the order of its addresses, as much whenever it is asked to as is then read; or
// 2^narrower times less, where what is read was made of so much less. It asks for every STEP bytes: of what
// is read in one piece processors fetch lines in pairs, and every other one leaves them more to wait for.
template <int STEP = 64>
struct FetcherOf {
    const char *next, *until;
    int narrower;

    explicit FetcherOf(const void* from = nullptr, int narrower = 0)
        : next(static_cast<const char*>(from)), until(next), narrower(narrower) {}

    void fetch(int64_t num_bytes) {
        if (next == nullptr) return;
        until += num_bytes >> narrower;
        for (; next < until; next += STEP) prefetch(next);
    }
};

using Fetcher = FetcherOf<>;

}  // namespace
