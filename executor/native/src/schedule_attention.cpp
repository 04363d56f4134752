// Attention over stretches of a cache, however many requests there are.
#include <algorithm>
#include <utility>

#include "pieces.hpp"
#include "schedule.hpp"

namespace native {
namespace {

constexpr int64_t TILE_BYTES = 16 << 10;     // of the cache: more come slower from the memory
constexpr int64_t MAX_TILE_TOKENS = 128;
constexpr int64_t SPLIT_BYTES = 512 << 10;   // of the cache for one thread, at least
constexpr int64_t MAX_SPLITS = 32;           // of one request: bounds what partial results need

// Requests that attend to stretches of a cache of rows of `token_bytes`.
struct Requests {
    const Heads& shape;
    const char* cache;
    int64_t token_bytes;
    const std::vector<int64_t>&starts, &lengths;

    int64_t count() const { return static_cast<int64_t>(lengths.size()); }

    const char* cache_at(int64_t request, int64_t token) const {
        return cache + (starts[request] + token) * token_bytes;
    }

    int64_t split_tokens(int64_t request) const {
        const int64_t bytes = (SPLIT_BYTES + token_bytes - 1) / token_bytes;
        const int64_t share = (lengths[request] + MAX_SPLITS - 1) / MAX_SPLITS;
        return rounded_up(std::max(bytes, share), shape.tile_tokens);
    }

    int64_t total_bytes() const {
        int64_t tokens = 0;
        for (int64_t length : lengths) tokens += length;
        return tokens * token_bytes;
    }
};

// Call attend(request, cache, tokens, next, state, temporary) for the splits of all requests, merge
// those of one request in their order, and call finish(request, state). `temporary` has room for
// `room` floats; what begins at `next`, if it is not null, is probably attended to next.
template <typename Attend, typename Finish>
void attend_in_splits(
    const Path& path, const Requests& requests, int64_t room, int threads, const Attend& attend,
    const Finish& finish) {
    const Heads& shape = requests.shape;
    const int64_t state_size = state_floats(shape);
    const auto attend_split = [&](int64_t request, int64_t first, const void* next, float* state,
                                  float* temporary) {
        const int64_t rest = requests.lengths[request] - first;
        const int64_t tokens = std::min(requests.split_tokens(request), rest);
        attend(request, requests.cache_at(request, first), tokens, next, state, temporary);
    };
    Helpers& helpers = Helpers::mine();
    if (threads == 1 || requests.count() >= 8 * threads) {
        helpers.run(threads, requests.count(), [&](int64_t request) {
            float* state = scratch(2 * state_size + room);
            float *later = state + state_size, *temporary = later + state_size;
            const int64_t length = requests.lengths[request], step = requests.split_tokens(request);
            for (int64_t first = 0; first < length; first += step) {
                const int64_t upcoming = helpers.upcoming();
                const void* const next =
                    first + step < length ? requests.cache_at(request, first + step)
                    : upcoming < 0        ? nullptr
                                          : requests.cache_at(upcoming, 0);
                attend_split(request, first, next, first == 0 ? state : later, temporary);
                if (first > 0) path.merge(shape, state, later);
            }
            finish(request, state);
        });
        return;
    }
    // Too few requests to share them out evenly: their splits are.
    std::vector<std::pair<int64_t, int64_t>> splits;
    std::vector<int64_t> firsts;  // among the splits, of each request
    for (int64_t request = 0; request < requests.count(); ++request) {
        const int64_t length = requests.lengths[request], step = requests.split_tokens(request);
        firsts.push_back(static_cast<int64_t>(splits.size()));
        for (int64_t first = 0; first < length; first += step) splits.emplace_back(request, first);
    }
    const int64_t count = static_cast<int64_t>(splits.size());
    firsts.push_back(count);
    Floats states(count * state_size);
    float* const all_states = states.data();
    helpers.run(threads, count, [&](int64_t i) {
        const auto [request, first] = splits[i];
        const int64_t upcoming = helpers.upcoming();
        const void* const next =
            upcoming < 0 ? nullptr
                         : requests.cache_at(splits[upcoming].first, splits[upcoming].second);
        attend_split(request, first, next, all_states + i * state_size, scratch(room));
    });
    const int64_t state_bytes = count * state_size * static_cast<int64_t>(sizeof(float));
    helpers.run(threads_for(threads, state_bytes), requests.count(), [&](int64_t request) {
        float* state = all_states + firsts[request] * state_size;
        for (int64_t i = firsts[request] + 1; i < firsts[request + 1]; ++i) {
            path.merge(shape, state, all_states + i * state_size);
        }
        finish(request, state);
    });
}

}  // namespace

void decode_attention(const Path& path, const AttentionCall& call, int threads) {
    const int64_t token_elements = 2 * call.kv_heads * call.head_dim;
    const int64_t token_bytes = token_elements * element_size(call.dtype);
    const bool is_capped = call.softcap > 0.0;
    const Heads shape{
        call.heads, call.kv_heads, call.head_dim, rounded_up(call.head_dim, ACCUMULATOR_UNIT),
        token_elements,
        std::clamp(
            TILE_BYTES / token_bytes / TILE_UNIT * TILE_UNIT, TILE_UNIT, MAX_TILE_TOKENS),
        static_cast<float>(LOG2_E * (is_capped ? call.softcap : call.scale)),
        static_cast<float>(is_capped ? 2.0 * LOG2_E * call.scale / call.softcap : 0.0),
        call.sinks,
    };
    const Requests requests{shape, call.cache, token_bytes, call.starts, call.lengths};
    threads = threads_for(threads, requests.total_bytes());
    attend_in_splits(
        path, requests, scratch_floats(shape), threads,
        [&](int64_t request, const char* cache, int64_t tokens, const void* next, float* state,
            float* temporary) {
            const char* query = call.queries + request * call.query_stride;
            path.attend[call.dtype](shape, query, cache, tokens, next, state, temporary);
        },
        [&](int64_t request, const float* state) {
            path.finish[call.dtype](shape, state, call.out + request * call.out_stride);
        });
}

}  // namespace native
