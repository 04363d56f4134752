#include "schedule.hpp"

#include <algorithm>
#include <atomic>

#include "pieces.hpp"

namespace native {
namespace {

constexpr int64_t MEMORY_BOUND_TOKENS = 8;  // weights take as long to multiply by so many as to read
constexpr int64_t ROWS = 8;                // that are normed or rotated by a thread at a time
constexpr int64_t ADDED = 16 << 10;        // elements that are added by a thread at a time
constexpr int64_t READ_BYTES = 2 << 20;
constexpr int64_t COPY_BYTES = 1 << 20;
constexpr int64_t ARRANGED_BYTES = 4 << 20; // of tokens that are arranged for tiles together
constexpr int64_t KEPT_BYTES = 2 << 20;    // of activations: every piece of outputs reads all of them, so in a cache

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

// Call work(first, last) for a few rows of all at a time.
template <typename Work>
void run_rows(int64_t rows, int64_t row_bytes, int threads, const Work& work) {
    const int64_t pieces = (rows + ROWS - 1) / ROWS;
    Helpers::mine().run(threads_for(threads, rows * row_bytes), pieces, [&](int64_t i) {
        work(i * ROWS, std::min(rows, (i + 1) * ROWS));
    });
}

bool are_tiled(const Path& path, Dtype dtype, int64_t tokens) {
    return dtype == BFLOAT16 && path.least_tiled > 0 && tokens >= path.least_tiled;
}

// How many times tokens of so many elements are arranged, so that it is about as many each time.
int64_t rounds_of(int64_t tokens, int64_t width) {
    const int64_t most = std::max<int64_t>(MOST_TOKENS, ARRANGED_BYTES / (width * element_size(BFLOAT16)));
    return (tokens + most - 1) / most;
}

// Arrange each group's input rows, if it has enough of them.
void arrange_groups(const Path& path, const Experts& shape, std::vector<ExpertGroup>& groups, int threads) {
    struct Part {
        const int32_t* tokens;
        int count;
        char* to;
    };
    std::vector<Part> parts;
    int64_t elements = 0;
    for (const ExpertGroup& group : groups) {
        if (are_tiled(path, BFLOAT16, group.count)) elements += arranged_elements(group.count, shape.hidden);
    }
    if (elements == 0) return;
    char* to = reinterpret_cast<char*>(shared_scratch(elements / 2));
    for (ExpertGroup& group : groups) {
        if (!are_tiled(path, BFLOAT16, group.count)) continue;
        group.arranged = to;
        for (int64_t t = 0; t < group.count; t += TILE) {
            const int count = static_cast<int>(std::min<int64_t>(TILE, group.count - t));
            parts.push_back({group.tokens + t, count, to});
            to += arranged_elements(TILE, shape.hidden) * element_size(BFLOAT16);
        }
    }
    Helpers::mine().run(threads_for(threads, 2 * elements), static_cast<int64_t>(parts.size()), [&](int64_t i) {
        path.arrange(shape.x, shape.x_stride, parts[i].tokens, parts[i].count, shape.hidden, parts[i].to);
    });
}

// Some tokens of a product, arranged.
Linear arranged(const Path& path, const Linear& all, int64_t first, int64_t last, int threads) {
    const int64_t size = element_size(BFLOAT16), tile_bytes = arranged_elements(TILE, all.width) * size;
    Linear some = all;
    some.tokens = last - first;
    some.x = static_cast<const char*>(all.x) + first * all.x_stride * size;
    some.out = static_cast<char*>(all.out) + first * all.out_stride * size;
    char* const to = reinterpret_cast<char*>(shared_scratch(arranged_elements(some.tokens, all.width) / 2));
    some.arranged = to;
    Helpers::mine().run(threads, (some.tokens + TILE - 1) / TILE, [&](int64_t i) {
        const int count = static_cast<int>(std::min<int64_t>(TILE, some.tokens - i * TILE));
        const char* const x = static_cast<const char*>(some.x) + i * TILE * all.x_stride * size;
        path.arrange(x, all.x_stride, nullptr, count, all.width, to + i * tile_bytes);
    });
    return some;
}

}  // namespace

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
        call.hidden, call.intermediate, call.activation, call.limit, call.weight_on_input, call.x,
        call.x_stride / size, call.scratch, stride, call.out, call.out_stride / size,
        call.packing13, call.packing2,
    };
    const auto bias = [](const std::vector<uintptr_t>& biases, size_t i) {
        return biases.empty() ? nullptr : reinterpret_cast<const void*>(biases[i]);
    };
    const int64_t room = call.scratch_floats / stride, together = KEPT_BYTES / size / stride;
    std::vector<int64_t> left_out;
    std::vector<ExpertGroup> groups;
    int64_t rows = 0, to_arrange = 0;  // bytes
    const auto run_groups = [&] {
        const int64_t num_groups = static_cast<int64_t>(groups.size());
        const int64_t weights = call.hidden * call.intermediate;
        const int64_t expert_bytes = weight_bytes(2 * weights, call.dtype, call.packing13) +
                                     weight_bytes(weights, call.dtype, call.packing2);
        const int of = threads_for(threads, num_groups * expert_bytes);
        const int64_t pieces = (call.intermediate + COLUMNS - 1) / COLUMNS;
        const int64_t all_pieces = num_groups * pieces;
        if (call.dtype == BFLOAT16) arrange_groups(path, shape, groups, of);
        Helpers::mine().run(of, all_pieces, [&](int64_t i) {
            const int64_t first = i % pieces * COLUMNS;
            const int64_t last = std::min<int64_t>(first + COLUMNS, call.intermediate);
            // The pieces in between are probably the other threads'.
            const bool has_next = last - first == COLUMNS && i + of < all_pieces;
            path.gate[call.dtype](
                shape, groups[i / pieces], first, last, has_next ? &groups[(i + of) / pieces] : nullptr,
                (i + of) % pieces * COLUMNS, scratch(PIECE_FLOATS));
        });
        run_columns(num_groups ? call.hidden : 0, of, [&](int64_t first, int64_t last, int64_t next) {
            path.project[call.dtype](
                shape, groups.data(), num_groups, first, last, next, scratch(PIECE_FLOATS));
        });
        groups.clear();
        rows = to_arrange = 0;
    };
    for (size_t i = 0; i < call.indices.size(); ++i) {
        const size_t expert = static_cast<size_t>(call.indices[i]);
        const int64_t count = expert < counts.size() ? counts[expert] : 0;
        if (count == 0) continue;
        if (count > call.max_tokens || count > room) {
            left_out.push_back(static_cast<int64_t>(i));
            continue;
        }
        const bool is_tiled = are_tiled(path, call.dtype, count);
        const int64_t parts = is_tiled ? rounds_of(count, call.hidden) : 1;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = part * count / parts, some = (part + 1) * count / parts - first;
            const int64_t arranged = is_tiled ? size * arranged_elements(some, call.hidden) : 0;
            const bool is_room = rows + some <= std::min(room, together) && to_arrange + arranged <= ARRANGED_BYTES;
            if (rows > 0 && !is_room) run_groups();
            groups.push_back({
                call.w13[i], call.w2[i],
                bias(call.bias13, i), bias(call.bias2, i), tokens.data() + starts[expert] + first,
                weights.data() + starts[expert] + first, some, rows, nullptr,
            });
            rows += some;
            to_arrange += arranged;
        }
    }
    run_groups();
    return {std::move(counts), std::move(left_out)};
}

bool takes_all(const ExpertsCall& call) {
    return call.num_tokens <= std::min(call.max_tokens, call.scratch_floats / activation_floats(call.intermediate));
}

void linear(const Path& path, Dtype dtype, const Linear& shape, int threads) {
    const int64_t weights = shape.rows * shape.width;
    const int64_t num_bytes = weight_bytes(weights, dtype, shape.packing);
    const int64_t work = shape.tokens * weights * element_size(dtype) / MEMORY_BOUND_TOKENS;
    const int of = threads_for(threads, num_bytes + work);
    const auto run = [&](const Linear& some) {
        run_columns(some.tokens ? some.rows : 0, of, [&](int64_t first, int64_t last, int64_t next) {
            path.linear[dtype](some, first, last, next, scratch(PIECE_FLOATS));
        });
    };
    if (!are_tiled(path, dtype, shape.tokens)) return run(shape);
    const int64_t rounds = rounds_of(shape.tokens, shape.width);
    for (int64_t i = 0; i < rounds; ++i) {
        run(arranged(path, shape, i * shape.tokens / rounds, (i + 1) * shape.tokens / rounds, of));
    }
}

void rms_norm(const Path& path, Dtype dtype, const RmsNorm& shape, int threads) {
    const int64_t row_bytes = shape.heads * shape.width * element_size(dtype);
    run_rows(shape.tokens, row_bytes, threads, [&](int64_t first, int64_t last) {
        path.rms_norm[dtype](shape, first, last);
    });
}

void rotate(const Path& path, Dtype dtype, const Rotation& shape, int threads) {
    const int64_t row_bytes = shape.heads * 2 * shape.pairs * element_size(dtype);
    run_rows(shape.tokens, row_bytes, threads, [&](int64_t first, int64_t last) {
        path.rotate[dtype](shape, first, last, scratch(2 * shape.pairs));
    });
}

void add(const Path& path, Dtype dtype, char* out, const char* x, int64_t count, int threads) {
    const int64_t size = element_size(dtype), pieces = (count + ADDED - 1) / ADDED;
    Helpers::mine().run(threads_for(threads, count * size), pieces, [&](int64_t i) {
        const int64_t first = i * ADDED;
        path.add[dtype](out + first * size, x + first * size, std::min(ADDED, count - first));
    });
}

void choose_experts(const Path& path, Dtype dtype, const Choice& shape, int threads) {
    const int64_t row_bytes = 2 * shape.experts * sizeof(float);
    run_rows(shape.tokens, row_bytes, threads, [&](int64_t first, int64_t last) {
        path.choose_experts[dtype](shape, first, last, scratch(choice_floats(shape)));
    });
}

void greatest(const Path& path, Dtype dtype, const Greatest& shape, int threads) {
    run_rows(shape.rows, shape.width * element_size(dtype), threads, [&](int64_t first, int64_t last) {
        path.greatest[dtype](shape, first, last);
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
