// The Python module: `executor.native` hands over addresses and sizes that it has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "calls.hpp"

namespace {

using native::at;
using native::compute;
using native::dtype_named;
using native::path_named;
using native::perform;
using native::require;

// How a cache's rows are coded: not at all if the codes have no name.
native::CodedRows coded_rows(
    const std::string& codes, int64_t row_bytes, int64_t scales, int64_t parts, int64_t first, int64_t others) {
    if (codes.empty()) return {};
    const int number = native::paths().front()->codes_named(codes.c_str());
    if (number < 0) throw std::invalid_argument("no such codes: " + codes);
    return {number, row_bytes, scales, parts, first, others};
}

void require_within(
    const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths, int64_t tokens) {
    require(starts.size() == lengths.size(), "as many starts as lengths");
    for (size_t r = 0; r < starts.size(); ++r) {
        require(lengths[r] > 0 && starts[r] >= 0 && starts[r] + lengths[r] <= tokens,
                "requests lie within the cache");
    }
}

void require_own(std::vector<int64_t> rows, int64_t num_states) {
    std::sort(rows.begin(), rows.end());
    const bool are_own = std::adjacent_find(rows.begin(), rows.end()) == rows.end();
    require(are_own, "each request has a state of its own");
    require(rows.empty() || (rows.front() >= 0 && rows.back() < num_states),
            "requests' states are among those given");
}

// Requests' parts of a cache, which are the numbers' of a tape.
template <typename Call>
void attend(
    void (*kernel)(const native::Path&, const Call&, int), const std::string& path, const Call& call,
    int64_t cache_tokens, int threads) {
    const native::Path& chosen = path_named(path);
    const auto is_of_numbers = [&](const native::Numbers& of) {
        return of.starts == call.starts && of.lengths == call.lengths;
    };
    const auto work = [=, &chosen](const native::Numbers* now) {
        Call moved = call;
        if (now != nullptr) {
            moved.starts = now->starts;
            moved.lengths = now->lengths;
        }
        require_within(moved.starts, moved.lengths, cache_tokens);
        kernel(chosen, moved, threads);
    };
    perform(work, native::repeats(is_of_numbers));
}

// Code, type of scales, rows and columns of a group; none of plain numbers.
using PackingSaid = std::optional<std::array<int64_t, 4>>;
using Addresses = std::array<uintptr_t, 4>;

class PackingOf {
  public:
    explicit PackingOf(const PackingSaid& said) : is_packed_(said.has_value()) {
        if (!is_packed_) return;
        const auto [code, scale, rows, columns] = *said;
        require(code >= 0 && code < native::NUM_CODES, "a known code");
        require(scale >= 0 && scale < native::NUM_SCALE_TYPES, "a known type of scales");
        require(rows > 0 && columns >= 0 && columns % 16 == 0, "groups of whole vectors");
        packing_ = {static_cast<native::Code>(code), static_cast<native::ScaleType>(scale), rows, columns};
    }

    const native::Packing* get() const { return is_packed_ ? &packing_ : nullptr; }

  private:
    bool is_packed_;
    native::Packing packing_{};
};

native::Matrix matrix_at(const Addresses& of) {
    return {at<const void>(of[0]), at<const void>(of[1]), at<const uint8_t>(of[2]), at<const float>(of[3])};
}

std::vector<native::Matrix> matrices_at(const std::vector<Addresses>& of) {
    std::vector<native::Matrix> matrices;
    for (const Addresses& each : of) matrices.push_back(matrix_at(each));
    return matrices;
}

// Experts as they are called, and called again.
struct HeldExperts {
    PackingOf packing13, packing2;
    native::ExpertsCall call;
};

using Counts = std::vector<int64_t>;

std::pair<Counts, Counts> run_experts(
    const native::Path& path, const std::shared_ptr<HeldExperts>& held, int threads) {
    native::ExpertsCall& call = held->call;
    call.packing13 = held->packing13.get();
    call.packing2 = held->packing2.get();
    const auto run = [&path, held, threads] {
        const native::ExpertsCall& call = held->call;
        for (int64_t i = 0; i < call.num_tokens * call.experts_per_token; ++i) {
            require(call.experts[i] >= 0, "experts count from 0");
        }
        return native::run_experts(path, call, threads);
    };
    native::Tape* const tape = native::Tape::recording();
    std::pair<Counts, Counts> done;
    {
        nb::gil_scoped_release released;
        done = run();
    }
    if (tape != nullptr && native::takes_all(call)) {
        tape->add([run, counts = tape->counts()](const native::Numbers*) { *counts = run().first; });
        *tape->counts() = done.first;
    } else if (tape != nullptr) {
        tape->spoil();
    }
    return done;
}

}  // namespace

namespace native {

Dtype dtype_named(const std::string& name) {
    if (name == "bfloat16") return BFLOAT16;
    if (name == "float16") return FLOAT16;
    if (name == "float32") return FLOAT32;
    throw std::invalid_argument("no such dtype: " + name);
}

}  // namespace native

NB_MODULE(_kernels, module) {
    module.def("paths", [] {
        std::vector<std::string> names;
        for (const native::Path* path : native::paths()) names.emplace_back(path->name);
        return names;
    });

    module.def(
        "decode_attention",
        [](const std::string& path, const std::string& dtype, int64_t heads, int64_t kv_heads,
           int64_t head_dim, double scale, double softcap, uintptr_t sinks, uintptr_t queries,
           int64_t query_stride, uintptr_t cache, int64_t cache_tokens, const std::string& codes,
           int64_t row_bytes, int64_t scales, uintptr_t out, int64_t out_stride,
           std::vector<int64_t> starts, std::vector<int64_t> lengths, int threads) {
            const native::AttentionCall call{
                dtype_named(dtype), heads, kv_heads, head_dim, scale, softcap,
                at<const float>(sinks), at<const char>(queries), query_stride, at<const char>(cache),
                coded_rows(codes, row_bytes, scales, 2 * kv_heads, head_dim, head_dim), at<char>(out),
                out_stride, std::move(starts), std::move(lengths),
            };
            attend(native::decode_attention, path, call, cache_tokens, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("heads"), nb::arg("kv_heads"),
        nb::arg("head_dim"), nb::arg("scale"), nb::arg("softcap"), nb::arg("sinks"), nb::arg("queries"),
        nb::arg("query_stride"), nb::arg("cache"), nb::arg("cache_tokens"), nb::arg("codes"),
        nb::arg("row_bytes"), nb::arg("scales"), nb::arg("out"), nb::arg("out_stride"),
        nb::arg("starts"), nb::arg("lengths"), nb::arg("threads"));

    module.def(
        "latent_attention",
        [](const std::string& path, const std::string& dtype, int64_t heads, int64_t nope,
           int64_t rope, int64_t rank, int64_t value_dim, double scale, uintptr_t q_nope,
           int64_t nope_stride, int64_t nope_head_stride, uintptr_t q_rope, int64_t rope_stride,
           int64_t rope_head_stride, uintptr_t cache, int64_t cache_tokens, const std::string& codes,
           int64_t row_bytes, int64_t scales, uintptr_t kv_up, uintptr_t out, int64_t out_stride, std::vector<int64_t> starts,
           std::vector<int64_t> lengths, int threads) {
            const native::Latent shape{
                static_cast<int64_t>(lengths.size()), heads, nope, rope, rank, value_dim,
                at<const void>(q_nope), nope_stride, nope_head_stride, at<const void>(q_rope),
                rope_stride, rope_head_stride, at<const void>(kv_up), nullptr,
            };
            const native::LatentCall call{
                dtype_named(dtype), shape, scale, at<const char>(cache),
                coded_rows(codes, row_bytes, scales, 2, rank, rope), at<char>(out), out_stride,
                std::move(starts), std::move(lengths),
            };
            attend(native::latent_attention, path, call, cache_tokens, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("heads"), nb::arg("nope"),
        nb::arg("rope"), nb::arg("rank"), nb::arg("value_dim"), nb::arg("scale"),
        nb::arg("q_nope"), nb::arg("nope_stride"), nb::arg("nope_head_stride"), nb::arg("q_rope"),
        nb::arg("rope_stride"), nb::arg("rope_head_stride"), nb::arg("cache"),
        nb::arg("cache_tokens"), nb::arg("codes"), nb::arg("row_bytes"), nb::arg("scales"),
        nb::arg("kv_up"), nb::arg("out"), nb::arg("out_stride"), nb::arg("starts"),
        nb::arg("lengths"), nb::arg("threads"));

    module.def(
        "gated_delta_step",
        [](const std::string& path, const std::string& dtype, int64_t key_heads,
           int64_t value_heads, int64_t key_dim, int64_t value_dim, int64_t channels,
           int64_t conv_tokens, uintptr_t qkv, int64_t qkv_stride, uintptr_t convolution,
           uintptr_t conv_states, int64_t conv_state_stride, uintptr_t states,
           int64_t state_stride, int64_t num_states, uintptr_t a, int64_t a_stride, uintptr_t b,
           int64_t b_stride, uintptr_t log_rate, uintptr_t step_bias,
           const std::vector<int64_t>& rows, uintptr_t out, int64_t out_stride, int threads) {
            const native::GatedDelta given{
                static_cast<int64_t>(rows.size()), key_heads, value_heads, key_dim, value_dim,
                channels, conv_tokens, at<const void>(qkv), qkv_stride, at<const void>(convolution),
                at<void>(conv_states), conv_state_stride, at<float>(states), state_stride,
                at<const void>(a), at<const void>(b), a_stride, b_stride,
                at<const float>(log_rate), at<const float>(step_bias), nullptr, at<void>(out),
                out_stride,
            };
            const native::Path& chosen = path_named(path);
            const native::Dtype type = dtype_named(dtype);
            const auto work = [=, &chosen](const native::Numbers* now) {
                const std::vector<int64_t>& present = now == nullptr ? rows : now->starts;
                require_own(present, num_states);
                native::GatedDelta shape = given;
                shape.rows = present.data();
                native::gated_delta_step(chosen, type, shape, threads);
            };
            perform(work, native::repeats([&](const native::Numbers& of) { return of.starts == rows; }));
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("key_heads"),
        nb::arg("value_heads"), nb::arg("key_dim"), nb::arg("value_dim"), nb::arg("channels"),
        nb::arg("conv_tokens"), nb::arg("qkv"), nb::arg("qkv_stride"), nb::arg("convolution"),
        nb::arg("conv_states"), nb::arg("conv_state_stride"), nb::arg("states"),
        nb::arg("state_stride"), nb::arg("num_states"), nb::arg("a"), nb::arg("a_stride"),
        nb::arg("b"), nb::arg("b_stride"), nb::arg("log_rate"), nb::arg("step_bias"),
        nb::arg("rows"), nb::arg("out"), nb::arg("out_stride"), nb::arg("threads"));

    native::bind_choices(module);
    native::bind_ranks(module);

    module.def("activation_floats", native::activation_floats, nb::arg("intermediate"));

    module.def(
        "run_experts",
        [](const std::string& path, const std::string& dtype, int64_t hidden, int64_t intermediate,
           int64_t num_tokens, int64_t experts_per_token, uintptr_t x, int64_t x_stride,
           uintptr_t experts, uintptr_t weights, uintptr_t out, int64_t out_stride,
           uintptr_t scratch, int64_t scratch_floats, std::vector<int64_t> indices,
           const std::vector<Addresses>& w13, const std::vector<Addresses>& w2, const PackingSaid& packing13,
           const PackingSaid& packing2, std::vector<uintptr_t> bias13,
           std::vector<uintptr_t> bias2, int activation, float limit, bool weight_on_input,
           int64_t max_tokens, int threads) {
            require(indices.size() == w13.size() && w13.size() == w2.size(), "weights of each");
            require(bias13.size() == bias2.size(), "both biases or none");
            require(bias2.empty() || bias2.size() == w2.size(), "biases of each");
            require(activation >= 0 && activation < native::NUM_ACTIVATIONS, "a known activation");
            for (int64_t index : indices) require(index >= 0, "experts count from 0");
            const auto held = std::make_shared<HeldExperts>(HeldExperts{
                PackingOf(packing13), PackingOf(packing2),
                {
                    dtype_named(dtype), hidden, intermediate, num_tokens, experts_per_token,
                    at<const char>(x), x_stride, at<const int64_t>(experts), at<const float>(weights),
                    at<char>(out), out_stride, at<float>(scratch), scratch_floats,
                    std::move(indices), matrices_at(w13), matrices_at(w2), nullptr, nullptr, std::move(bias13),
                    std::move(bias2), static_cast<native::Activation>(activation), limit, weight_on_input,
                    max_tokens,
                },
            });
            return run_experts(path_named(path), held, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("hidden"),
        nb::arg("intermediate"), nb::arg("num_tokens"), nb::arg("experts_per_token"), nb::arg("x"),
        nb::arg("x_stride"), nb::arg("experts"), nb::arg("weights"), nb::arg("out"),
        nb::arg("out_stride"), nb::arg("scratch"), nb::arg("scratch_floats"), nb::arg("indices"),
        nb::arg("w13"), nb::arg("w2"), nb::arg("packing13").none(), nb::arg("packing2").none(),
        nb::arg("bias13"), nb::arg("bias2"), nb::arg("activation"),
        nb::arg("limit"), nb::arg("weight_on_input"), nb::arg("max_tokens"), nb::arg("threads"));

    module.def(
        "linear",
        [](const std::string& path, const std::string& dtype, int64_t tokens, int64_t width,
           int64_t rows, uintptr_t x, int64_t x_stride, const Addresses& w, const PackingSaid& packing,
           uintptr_t out, int64_t out_stride, bool add, int threads) {
            const native::Linear given{
                tokens, width, rows, at<const void>(x), matrix_at(w), nullptr, x_stride,
                at<void>(out), out_stride, add,
            };
            const native::Path& chosen = path_named(path);
            const native::Dtype type = dtype_named(dtype);
            perform([=, &chosen, of = PackingOf(packing)](const native::Numbers*) {
                native::Linear shape = given;
                shape.packing = of.get();
                native::linear(chosen, type, shape, threads);
            });
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("tokens"), nb::arg("width"),
        nb::arg("rows"), nb::arg("x"), nb::arg("x_stride"), nb::arg("w"), nb::arg("packing").none(), nb::arg("out"),
        nb::arg("out_stride"), nb::arg("add"), nb::arg("threads"));

    module.def(
        "rms_norm",
        [](const std::string& path, const std::string& dtype, int64_t tokens, int64_t heads,
           int64_t width, uintptr_t x, int64_t x_stride, uintptr_t weight, float offset,
           float epsilon, uintptr_t out, int64_t out_stride, int threads) {
            const native::RmsNorm shape{
                tokens, heads, width, at<const void>(x), x_stride, at<const void>(weight), offset,
                epsilon, at<void>(out), out_stride,
            };
            compute(native::rms_norm, path, dtype, shape, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("tokens"), nb::arg("heads"),
        nb::arg("width"), nb::arg("x"), nb::arg("x_stride"), nb::arg("weight"), nb::arg("offset"),
        nb::arg("epsilon"), nb::arg("out"), nb::arg("out_stride"), nb::arg("threads"));

    module.def(
        "rotate",
        [](const std::string& path, const std::string& dtype, int64_t tokens, int64_t heads,
           int64_t head_dim, int64_t pairs, bool interleaved, float magnitude, uintptr_t rows,
           int64_t stride, uintptr_t positions, uintptr_t frequencies, int threads) {
            require(2 * pairs <= head_dim, "pairs lie within a head");
            const native::Rotation given{
                tokens, heads, head_dim, pairs, interleaved, magnitude, at<void>(rows), stride,
                at<const int64_t>(positions), at<const float>(frequencies),
            };
            const native::Path& chosen = path_named(path);
            const native::Dtype type = dtype_named(dtype);
            const auto work = [=, &chosen](const native::Numbers* now) {
                native::Rotation shape = given;
                if (now != nullptr) shape.positions = now->positions;
                native::rotate(chosen, type, shape, threads);
            };
            perform(work, native::repeats([&](const native::Numbers& of) { return of.positions == given.positions; }));
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("tokens"), nb::arg("heads"),
        nb::arg("head_dim"), nb::arg("pairs"), nb::arg("interleaved"), nb::arg("magnitude"),
        nb::arg("rows"), nb::arg("stride"), nb::arg("positions"), nb::arg("frequencies"),
        nb::arg("threads"));

    module.def(
        "copy",
        [](const std::string& path, uintptr_t to, uintptr_t from, int64_t num_bytes, int threads) {
            const native::Path& chosen = path_named(path);
            perform([=, &chosen](const native::Numbers*) {
                native::copy(chosen, at<char>(to), at<const char>(from), num_bytes, threads);
            });
        },
        nb::kw_only(), nb::arg("path"), nb::arg("to_address"), nb::arg("from_address"),
        nb::arg("num_bytes"), nb::arg("threads"));

    module.def(
        "read",
        [](const std::string& path, uintptr_t from, int64_t num_bytes, int threads) {
            const native::Path& chosen = path_named(path);
            nb::gil_scoped_release released;
            return native::read(chosen, at<const char>(from), num_bytes, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("from_address"), nb::arg("num_bytes"),
        nb::arg("threads"));
}
