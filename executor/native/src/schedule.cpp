#include "schedule.hpp"

#include <algorithm>
#include <cmath>

#include "threads.hpp"

namespace native {
namespace {

int64_t element_size(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

constexpr double LOG2_E = 1.4426950408889634;

constexpr int64_t TILE_BYTES = 16 << 10;    // of the cache: more come slower from the memory
constexpr int64_t MAX_TILE_TOKENS = 128;
constexpr int64_t SPLIT_BYTES = 512 << 10;   // of the cache for one thread, at least
constexpr int64_t MAX_SPLITS = 32;           // of one request: bounds what partial results need
constexpr int64_t BYTES_PER_THREAD = 128 << 10;  // less work is done sooner than a thread wakes
constexpr int64_t MEMORY_BOUND_TOKENS = 8;  // weights take as long to multiply by so many as to read
constexpr int64_t ROWS = 8;                // that are normed or rotated by a thread at a time
constexpr int64_t READ_BYTES = 2 << 20;
constexpr int64_t COPY_BYTES = 1 << 20;

// Floats that begin with a cache line: vectors that straddle two take twice as long to load.
class Floats {
  public:
    explicit Floats(int64_t count = 0) : memory_(static_cast<size_t>(count + LINE)) {}

    float* data() {
        const auto address = reinterpret_cast<uintptr_t>(memory_.data());
        return memory_.data() + (-address / sizeof(float)) % LINE;
    }
    int64_t count() const { return static_cast<int64_t>(memory_.size()) - LINE; }

  private:
    static constexpr int64_t LINE = 64 / sizeof(float);
    std::vector<float> memory_;
};

// Scratch of the calling thread, kept between calls.
float* scratch(int64_t count) {
    thread_local Floats memory;
    if (memory.count() < count) memory = Floats(count);
    return memory.data();
}

// Call work(first, last, next) for every COLUMNS columns of all; `next` are those that the same
// thread probably takes next, or negative.
template <typename Work>
void run_columns(int64_t columns, int threads, const Work& work) {
    Helpers::mine().run(threads, (columns + COLUMNS - 1) / COLUMNS, [&](int64_t i) {
        const int64_t first = i * COLUMNS, next = first + threads * COLUMNS;
        const int64_t last = std::min<int64_t>(first + COLUMNS, columns);
        work(first, last, next + COLUMNS <= columns ? next : -1);
    });
}

int threads_for(int threads, int64_t num_bytes) {
    return static_cast<int>(std::min<int64_t>(threads, 1 + num_bytes / BYTES_PER_THREAD));
}

// Call work(first, last) for a few rows of all at a time.
template <typename Work>
void run_rows(int64_t rows, int64_t row_bytes, int threads, const Work& work) {
    const int64_t pieces = (rows + ROWS - 1) / ROWS;
    Helpers::mine().run(threads_for(threads, rows * row_bytes), pieces, [&](int64_t i) {
        work(i * ROWS, std::min(rows, (i + 1) * ROWS));
    });
}

}  // namespace

void decode_attention(const Path& path, const AttentionCall& call, int threads) {
    const int64_t token_elements = 2 * call.kv_heads * call.head_dim;
    const int64_t token_bytes = token_elements * element_size(call.dtype);
    const Heads shape{
        call.heads, call.kv_heads, call.head_dim, rounded_up(call.head_dim, ACCUMULATOR_UNIT),
        token_elements,
        std::clamp(
            TILE_BYTES / token_bytes / TILE_UNIT * TILE_UNIT, TILE_UNIT, MAX_TILE_TOKENS),
        static_cast<float>(LOG2_E / std::sqrt(static_cast<double>(call.head_dim))),
    };

    const auto split_tokens = [&](int64_t length) {
        const int64_t tokens = std::max(
            (SPLIT_BYTES + token_bytes - 1) / token_bytes, (length + MAX_SPLITS - 1) / MAX_SPLITS);
        return rounded_up(tokens, shape.tile_tokens);
    };
    const auto cache_at = [&](int64_t request, int64_t token) {
        return call.cache + (call.starts[request] + token) * token_bytes;
    };
    const auto attend_split = [&](int64_t request, int64_t first, const void* next, float* state,
                                  float* temporary) {
        const int64_t length = call.lengths[request];
        path.attend[call.dtype](
            shape, call.queries + request * call.query_stride, cache_at(request, first),
            std::min(split_tokens(length), length - first), next, state, temporary);
    };
    const auto finish = [&](int64_t request, const float* state) {
        path.finish[call.dtype](shape, state, call.out + request * call.out_stride);
    };

    const int64_t requests = static_cast<int64_t>(call.lengths.size());
    const int64_t state_size = state_floats(shape);
    const int64_t room = scratch_floats(shape);
    int64_t tokens = 0;
    for (int64_t length : call.lengths) tokens += length;
    threads = threads_for(threads, tokens * token_bytes);

    Helpers& helpers = Helpers::mine();
    if (threads == 1 || requests >= 8 * threads) {
        helpers.run(threads, requests, [&](int64_t request) {
            float* state = scratch(2 * state_size + room);
            float *later = state + state_size, *temporary = later + state_size;
            const int64_t length = call.lengths[request], step = split_tokens(length);
            for (int64_t first = 0; first < length; first += step) {
                const int64_t upcoming = helpers.upcoming();
                const void* const next = first + step < length ? cache_at(request, first + step)
                                         : upcoming < 0        ? nullptr
                                                               : cache_at(upcoming, 0);
                attend_split(request, first, next, first == 0 ? state : later, temporary);
                if (first > 0) path.merge(shape, state, later);
            }
            finish(request, state);
        });
        return;
    }
    // Too few requests to share them out evenly: their splits are.
    std::vector<std::pair<int64_t, int64_t>> splits;
    for (int64_t request = 0; request < requests; ++request) {
        const int64_t length = call.lengths[request], step = split_tokens(length);
        for (int64_t first = 0; first < length; first += step) splits.emplace_back(request, first);
    }
    const int64_t count = static_cast<int64_t>(splits.size());
    Floats states(count * state_size);
    float* const all_states = states.data();
    helpers.run(threads, count, [&](int64_t i) {
        const auto [request, first] = splits[i];
        const int64_t upcoming = helpers.upcoming();
        const void* const next =
            upcoming < 0 ? nullptr : cache_at(splits[upcoming].first, splits[upcoming].second);
        attend_split(request, first, next, all_states + i * state_size, scratch(room));
    });
    for (int64_t i = 0; i < count;) {
        const int64_t request = splits[i].first;
        float* state = all_states + i * state_size;
        for (++i; i < count && splits[i].first == request; ++i) {
            path.merge(shape, state, all_states + i * state_size);
        }
        finish(request, state);
    }
}

int64_t activation_floats(int64_t intermediate) {
    // Rows a multiple of SAME_LINES apart would drive one another out of a core's first cache.
    constexpr int64_t APART = SAME_LINES / sizeof(float);
    const int64_t floats = rounded_up(intermediate, ACCUMULATOR_UNIT);
    return floats % APART == 0 ? floats + APART / 2 : floats;
}

std::pair<std::vector<int64_t>, std::vector<int64_t>> run_experts(
    const Path& path, const ExpertsCall& call, int threads) {
    const int64_t size = element_size(call.dtype);
    const int64_t routed = call.num_tokens * call.experts_per_token;
    std::vector<int64_t> counts;
    for (int64_t i = 0; i < routed; ++i) {
        const size_t expert = static_cast<size_t>(call.experts[i]);
        if (expert >= counts.size()) counts.resize(expert + 1);
        ++counts[expert];
    }
    // Tokens sorted by expert, in their order within each.
    std::vector<int64_t> next(counts.size());
    for (size_t e = 1; e < counts.size(); ++e) next[e] = next[e - 1] + counts[e - 1];
    const std::vector<int64_t> starts = next;
    std::vector<int32_t> tokens(static_cast<size_t>(routed));
    std::vector<float> weights(static_cast<size_t>(routed));
    for (int64_t i = 0; i < routed; ++i) {
        const int64_t place = next[call.experts[i]]++;
        tokens[place] = static_cast<int32_t>(i / call.experts_per_token);
        weights[place] = call.weights[i];
    }

    const int64_t stride = activation_floats(call.intermediate);
    Experts shape{
        call.hidden, call.intermediate, call.x, call.x_stride / size, call.scratch, stride,
        call.out, call.out_stride / size,
    };
    const int64_t room = call.scratch_floats / stride;
    std::vector<int64_t> left_out;
    std::vector<ExpertGroup> groups;
    int64_t rows = 0;
    const auto run_groups = [&] {
        const int64_t num_groups = static_cast<int64_t>(groups.size());
        const int64_t expert_bytes = 3 * call.hidden * call.intermediate * size;
        const int of = threads_for(threads, num_groups * expert_bytes);
        const int64_t pieces = (call.intermediate + COLUMNS - 1) / COLUMNS;
        const int64_t all_pieces = num_groups * pieces;
        const auto w13 = [&](int64_t i) -> const void* {
            if (i >= all_pieces) return nullptr;
            const int64_t row = i % pieces * COLUMNS;
            return static_cast<const char*>(groups[i / pieces].w13) + row * call.hidden * size;
        };
        // The pieces in between are probably the other threads'.
        Helpers::mine().run(of, all_pieces, [&](int64_t i) {
            const int64_t first = i % pieces * COLUMNS;
            const int64_t last = std::min<int64_t>(first + COLUMNS, call.intermediate);
            const bool is_whole = last - first == COLUMNS;
            const void* next = is_whole ? w13(i + of) : nullptr;
            path.gate[call.dtype](shape, groups[i / pieces], first, last, next);
        });
        run_columns(num_groups ? call.hidden : 0, of, [&](int64_t first, int64_t last, int64_t next) {
            path.project[call.dtype](shape, groups.data(), num_groups, first, last, next);
        });
        groups.clear();
        rows = 0;
    };
    for (size_t i = 0; i < call.indices.size(); ++i) {
        const size_t expert = static_cast<size_t>(call.indices[i]);
        const int64_t count = expert < counts.size() ? counts[expert] : 0;
        if (count == 0) continue;
        if (count > call.max_tokens || count > room) {
            left_out.push_back(static_cast<int64_t>(i));
            continue;
        }
        if (rows + count > room) run_groups();
        groups.push_back({
            reinterpret_cast<const void*>(call.w13[i]), reinterpret_cast<const void*>(call.w2[i]),
            tokens.data() + starts[expert], weights.data() + starts[expert], count, rows,
        });
        rows += count;
    }
    run_groups();
    return {std::move(counts), std::move(left_out)};
}

void linear(const Path& path, Dtype dtype, const Linear& shape, int threads) {
    const int64_t num_bytes = shape.rows * shape.width * element_size(dtype);
    const int of = threads_for(threads, num_bytes + shape.tokens * num_bytes / MEMORY_BOUND_TOKENS);
    run_columns(shape.tokens ? shape.rows : 0, of, [&](int64_t first, int64_t last, int64_t next) {
        path.linear[dtype](shape, first, last, next);
    });
}

void rms_norm(const Path& path, Dtype dtype, const RmsNorm& shape, int threads) {
    run_rows(shape.tokens, shape.width * element_size(dtype), threads, [&](int64_t first, int64_t last) {
        path.rms_norm[dtype](shape, first, last);
    });
}

void rotate(const Path& path, Dtype dtype, const Rotation& shape, int threads) {
    const int64_t row_bytes = shape.heads * shape.head_dim * element_size(dtype);
    run_rows(shape.tokens, row_bytes, threads, [&](int64_t first, int64_t last) {
        path.rotate[dtype](shape, first, last, scratch(shape.head_dim));
    });
}

uint64_t read(const Path& path, const char* from, int64_t num_bytes, int threads) {
    std::atomic<uint64_t> all{0};
    Helpers::mine().run(threads, (num_bytes + READ_BYTES - 1) / READ_BYTES, [&](int64_t i) {
        const int64_t first = i * READ_BYTES;
        all.fetch_xor(path.read(from + first, std::min(READ_BYTES, num_bytes - first)));
    });
    return all.load();
}

void copy(const Path& path, char* to, const char* from, int64_t num_bytes, int threads) {
    const int64_t pieces = (num_bytes + COPY_BYTES - 1) / COPY_BYTES;
    Helpers::mine().run(threads_for(threads, num_bytes), pieces, [&](int64_t i) {
        const int64_t first = i * COPY_BYTES;
        path.copy(to + first, from + first, std::min(COPY_BYTES, num_bytes - first));
    });
}

}  // namespace native
