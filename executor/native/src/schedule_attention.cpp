// Attention over stretches of a cache, however many requests there are, and the gated delta rule.
#include <algorithm>
#include <utility>

#include "pieces.hpp"
#include "schedule.hpp"

namespace native {
namespace {

constexpr int64_t TILE_BYTES = 16 << 10;     // of the cache: more come slower from the memory
constexpr int64_t MANY_SHARE = 8;            // queries on a key: then products take the time, and
constexpr int64_t SHARED_TILE_TOKENS = 64;   // it is dear to load and store all sums for each tile
constexpr int64_t SHARED_TILE_BYTES = 128 << 10;
constexpr int64_t MAX_TILE_TOKENS = 128;
constexpr int64_t HEADS_TOGETHER = 8;        // whose splits are merged by one thread
constexpr int64_t SPLIT_BYTES = 512 << 10;   // of the cache for one thread, about
constexpr int64_t MAX_SPLITS = 32;           // of one request: bounds what partial results need

constexpr int64_t LATENT_TILE_TOKENS = 120;       // long enough that few sums are loaded and stored
constexpr int64_t LATENT_SPLIT_BYTES = 1 << 20;   // each split has its sums of every head, which are merged
constexpr int64_t LATENT_ALONE_BYTES = LATENT_SPLIT_BYTES / 4;  // products with more are worth two threads
constexpr int64_t LATENT_REQUESTS = 64;           // at once: bounds what is held between the steps

constexpr int64_t DELTA_REQUESTS = 8;  // that a head steps together: its convolution is widened once

// Requests that attend to stretches of a cache of rows of `token_bytes`, in splits of about `split_bytes`, but in
// two from `alone_bytes` on.
struct Requests {
    const Heads& shape;
    const char* cache;
    int64_t token_bytes, split_bytes, alone_bytes;
    const std::vector<int64_t>&starts, &lengths;

    int64_t count() const { return static_cast<int64_t>(lengths.size()); }

    const char* cache_at(int64_t request, int64_t token) const {
        return cache + (starts[request] + token) * token_bytes;
    }

    int64_t split_tokens(int64_t request) const {
        const int64_t length = lengths[request];
        const int64_t num_bytes = length * token_bytes;
        int64_t splits = std::clamp<int64_t>((num_bytes + split_bytes / 2) / split_bytes, 1, MAX_SPLITS);
        if (splits == 1 && num_bytes >= alone_bytes) splits = 2;
        if (splits > 2) splits = (splits + 2) / 4 * 4;  // as many for each of two or four threads
        return rounded_up((length + splits - 1) / splits, TILE_UNIT);  // not tiles: threads would wait for each other
    }

    int64_t total_bytes() const {
        int64_t tokens = 0;
        for (int64_t length : lengths) tokens += length;
        return tokens * token_bytes;
    }
};

// Call attend(request, cache, tokens, next, state, temporary) for the splits of all requests, merge
// those of one request in their order, and call finish(request, first, last, state) for all its heads.
// `temporary` has room for `room` floats; what begins at `next`, if it is not null, is probably attended
// to next.
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
            const int64_t upcoming = helpers.upcoming();
            for (int64_t first = 0; first < length; first += step) {
                const void* const next =
                    first + step < length ? requests.cache_at(request, first + step)
                    : upcoming < 0        ? nullptr
                                          : requests.cache_at(upcoming, 0);
                attend_split(request, first, next, first == 0 ? state : later, temporary);
                if (first > 0) path.merge(shape, 0, shape.heads, state, later);
            }
            finish(request, 0, shape.heads, state);
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
    const int64_t parts = (shape.heads + HEADS_TOGETHER - 1) / HEADS_TOGETHER;
    helpers.run(threads_for(threads, state_bytes), requests.count() * parts, [&](int64_t part) {
        const int64_t request = part / parts, head = part % parts * HEADS_TOGETHER;
        const int64_t end = std::min(head + HEADS_TOGETHER, shape.heads);
        float* state = all_states + firsts[request] * state_size;
        for (int64_t i = firsts[request] + 1; i < firsts[request + 1]; ++i) {
            path.merge(shape, head, end, state, all_states + i * state_size);
        }
        finish(request, head, end, state);
    });
}

// Tokens of so many bytes each that are computed together, where `group` queries share a key.
int64_t tile_tokens(int64_t element_bytes, int64_t group) {
    const int64_t shared =
        group >= MANY_SHARE ? std::min(SHARED_TILE_TOKENS, SHARED_TILE_BYTES / element_bytes) : 0;
    const int64_t tokens = std::max(TILE_BYTES / element_bytes, shared);
    return std::clamp(tokens / TILE_UNIT * TILE_UNIT, TILE_UNIT, MAX_TILE_TOKENS);
}

}  // namespace

void decode_attention(const Path& path, const AttentionCall& call, int threads) {
    const int64_t token_elements = 2 * call.kv_heads * call.head_dim;
    const int64_t element_bytes = token_elements * element_size(call.dtype);
    const bool is_coded = call.coded.row_bytes > 0;
    const int64_t token_bytes = is_coded ? call.coded.row_bytes : element_bytes;
    const bool is_capped = call.softcap > 0.0;
    const Heads shape{
        call.heads, call.kv_heads, call.head_dim, rounded_up(call.head_dim, ACCUMULATOR_UNIT),
        token_elements,
        tile_tokens(element_bytes, call.heads / call.kv_heads),
        static_cast<float>(LOG2_E * (is_capped ? call.softcap : call.scale)),
        static_cast<float>(is_capped ? 2.0 * LOG2_E * call.scale / call.softcap : 0.0),
        call.sinks, token_bytes, is_coded ? &call.coded : nullptr,
    };
    const Requests requests{shape, call.cache, token_bytes, SPLIT_BYTES, 2 * SPLIT_BYTES, call.starts, call.lengths};
    threads = threads_for(threads, requests.total_bytes());
    attend_in_splits(
        path, requests, scratch_floats(shape), threads,
        [&](int64_t request, const char* cache, int64_t tokens, const void* next, float* state,
            float* temporary) {
            const char* query = call.queries + request * call.query_stride;
            path.attend[call.dtype](shape, query, cache, tokens, next, state, temporary);
        },
        [&](int64_t request, int64_t first, int64_t last, const float* state) {
            path.finish[call.dtype](shape, first, last, state, call.out + request * call.out_stride);
        });
}

namespace {

// One block of requests: queries are absorbed, contexts summed, and values projected from these.
void attend_to_latents(const Path& path, const LatentCall& call, int threads) {
    const Latent& block = call.shape;
    const int64_t size = element_size(call.dtype), dim = block.rank + block.rope;
    const int64_t up_rows = block.nope + block.value_dim;
    const bool is_coded = call.coded.row_bytes > 0;
    const int64_t token_bytes = is_coded ? call.coded.row_bytes : dim * size;
    const bool is_tiled = path.least_tiled > 0 && call.dtype == BFLOAT16 && block.heads % TILE == 0;
    const Heads shape{
        block.heads, 1, block.rank, padded_rank(block), dim, is_tiled ? TILED_LATENT_TOKENS : LATENT_TILE_TOKENS,
        static_cast<float>(LOG2_E * call.scale), 0.0f, nullptr, token_bytes, is_coded ? &call.coded : nullptr, is_tiled,
    };
    const Requests requests{
        shape, call.cache, token_bytes, LATENT_SPLIT_BYTES, LATENT_ALONE_BYTES, call.starts, call.lengths};
    const char* const kv_up = static_cast<const char*>(block.kv_up);
    const auto up_row = [&](int64_t head, int64_t row) {
        return kv_up + (head * up_rows + row) * block.rank * size;
    };
    Helpers& helpers = Helpers::mine();
    const int all = threads_for(threads, block.heads * up_rows * block.rank * size);
    helpers.run(all, block.heads, [&](int64_t head) {
        const int64_t next = helpers.upcoming();
        const char* const following = next < 0 ? nullptr : up_row(next, 0);
        path.absorb[call.dtype](block, head, following, scratch(absorbing_floats(block)));
    });
    Floats contexts(block.requests * block.heads * block.rank * size / 4 + 1);
    char* const context = reinterpret_cast<char*>(contexts.data());
    const int64_t query_bytes = block.heads * dim * size, context_bytes = block.heads * block.rank * size;
    const int of = threads_for(threads, requests.total_bytes() * (1 + block.heads / 8));
    attend_in_splits(
        path, requests, latent_floats(shape), of,
        [&](int64_t request, const char* cache, int64_t tokens, const void* next, float* state,
            float* temporary) {
            const char* query = static_cast<const char*>(block.absorbed) + request * query_bytes;
            path.attend_latent[call.dtype](shape, query, cache, tokens, next, state, temporary);
        },
        [&](int64_t request, int64_t first, int64_t last, const float* state) {
            path.finish[call.dtype](shape, first, last, state, context + request * context_bytes);
        });
    helpers.run(all, block.heads, [&](int64_t head) {
        const int64_t upcoming = helpers.upcoming();
        const Linear values{
            block.requests, block.rank, block.value_dim, context + head * block.rank * size,
            {up_row(head, block.nope), nullptr, nullptr, nullptr}, nullptr, block.heads * block.rank,
            call.out + head * block.value_dim * size, call.out_stride, false,
        };
        for (int64_t first = 0; first < block.value_dim; first += COLUMNS) {
            const int64_t last = std::min<int64_t>(first + COLUMNS, block.value_dim);
            // What is fetched meanwhile, as many rows, may be the next head's.
            const bool is_in_head = last + COLUMNS <= block.value_dim;
            const bool is_in_next = block.value_dim >= COLUMNS && upcoming >= 0;
            const int64_t next = is_in_head ? last : is_in_next ? (upcoming - head) * up_rows : -1;
            path.linear[call.dtype](values, first, last, next, scratch(PIECE_FLOATS));
        }
    });
}

}  // namespace

void latent_attention(const Path& path, const LatentCall& call, int threads) {
    const int64_t requests = static_cast<int64_t>(call.lengths.size());
    const int64_t size = element_size(call.dtype), most = std::min(requests, LATENT_REQUESTS);
    const int64_t dim = call.shape.rank + call.shape.rope;
    Floats absorbed(most * call.shape.heads * dim * size / 4 + 1);
    for (int64_t first = 0; first < requests; first += LATENT_REQUESTS) {
        const int64_t last = std::min(first + LATENT_REQUESTS, requests);
        LatentCall block = call;
        Latent& shape = block.shape;
        shape.requests = last - first;
        shape.q_nope = static_cast<const char*>(shape.q_nope) + first * shape.nope_stride * size;
        shape.q_rope = static_cast<const char*>(shape.q_rope) + first * shape.rope_stride * size;
        shape.absorbed = absorbed.data();
        block.out += first * call.out_stride * size;
        block.starts.assign(call.starts.begin() + first, call.starts.begin() + last);
        block.lengths.assign(call.lengths.begin() + first, call.lengths.begin() + last);
        attend_to_latents(path, block, threads);
    }
}

void gated_delta_step(const Path& path, Dtype dtype, const GatedDelta& shape, int threads) {
    const int64_t chunks = (shape.requests + DELTA_REQUESTS - 1) / DELTA_REQUESTS;
    const int64_t head_elements = shape.value_heads / shape.key_heads * shape.key_dim * shape.value_dim;
    const auto first_of = [&](int64_t piece) { return piece / shape.key_heads * DELTA_REQUESTS; };
    const int64_t num_bytes = 4 * shape.requests * shape.key_heads * head_elements;
    Helpers& helpers = Helpers::mine();
    helpers.run(threads_for(threads, num_bytes), chunks * shape.key_heads, [&](int64_t piece) {
        const int64_t first = first_of(piece), last = std::min(first + DELTA_REQUESTS, shape.requests);
        const int64_t head = piece % shape.key_heads, upcoming = helpers.upcoming();
        const float* following = nullptr;
        if (upcoming >= 0) {
            following = shape.states + shape.rows[first_of(upcoming)] * shape.state_stride +
                        upcoming % shape.key_heads * head_elements;
        }
        path.delta_step[dtype](shape, head, first, last, following, scratch(delta_floats(shape)));
    });
}

}  // namespace native
