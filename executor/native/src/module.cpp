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
#include <optional>
#include <stdexcept>
#include <string>

#include "schedule.hpp"

namespace nb = nanobind;

namespace {

// Paths that this processor can run, the fastest first. Intel's dot products of bfloat16 take two
// cycles each and so are slower than widening and AVX-512's multiply-adds; AMD's take one.
std::vector<const native::Path*> usable_paths() {
    std::vector<const native::Path*> paths;
#ifdef WITH_X86_PATHS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) paths.push_back(&native::avx512_path);
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) {
        const auto place = __builtin_cpu_is("intel") ? paths.end() : paths.begin();
        paths.insert(place, &native::avx512_bf16_path);
    }
    if (avx2) paths.push_back(&native::avx2_path);
#endif
    paths.push_back(&native::portable_path);
    return paths;
}

const std::vector<const native::Path*> PATHS = usable_paths();

const native::Path& path_named(const std::string& name) {
    for (const native::Path* path : PATHS) {
        if (name == path->name) return *path;
    }
    throw std::invalid_argument("no such path on this processor: " + name);
}

native::Dtype dtype_named(const std::string& name) {
    if (name == "bfloat16") return native::BFLOAT16;
    if (name == "float16") return native::FLOAT16;
    if (name == "float32") return native::FLOAT32;
    throw std::invalid_argument("no such dtype: " + name);
}

// How a cache's rows are coded: not at all if the codes have no name.
native::CodedRows coded_rows(
    const std::string& codes, int64_t row_bytes, int64_t scales, int64_t parts, int64_t first, int64_t others) {
    if (codes.empty()) return {};
    if (codes != "int8" && codes != "fp8") throw std::invalid_argument("no such codes: " + codes);
    return {codes == "int8" ? native::INT8_CODES : native::FP8_CODES, row_bytes, scales, parts, first, others};
}

// The sizes were checked by whoever planned them; that addresses stay inside them is checked here.
void require(bool holds, const char* rule) {
    if (!holds) throw std::out_of_range(rule);
}

void require_within(
    const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths, int64_t tokens) {
    require(starts.size() == lengths.size(), "as many starts as lengths");
    for (size_t r = 0; r < starts.size(); ++r) {
        require(lengths[r] > 0 && starts[r] >= 0 && starts[r] + lengths[r] <= tokens,
                "requests lie within the cache");
    }
}

// Compute what a shape says, without the interpreter's lock.
template <typename Shape>
void compute(
    void (*kernel)(const native::Path&, native::Dtype, const Shape&, int), const std::string& path,
    const std::string& dtype, const Shape& shape, int threads) {
    const native::Path& chosen = path_named(path);
    const native::Dtype type = dtype_named(dtype);
    nb::gil_scoped_release released;
    kernel(chosen, type, shape, threads);
}

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
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

}  // namespace

NB_MODULE(_kernels, module) {
    module.def("paths", [] {
        std::vector<std::string> names;
        for (const native::Path* path : PATHS) names.emplace_back(path->name);
        return names;
    });

    module.def(
        "decode_attention",
        [](const std::string& path, const std::string& dtype, int64_t heads, int64_t kv_heads,
           int64_t head_dim, double scale, double softcap, uintptr_t sinks, uintptr_t queries,
           int64_t query_stride, uintptr_t cache, int64_t cache_tokens, const std::string& codes,
           int64_t row_bytes, int64_t scales, uintptr_t out, int64_t out_stride,
           std::vector<int64_t> starts, std::vector<int64_t> lengths, int threads) {
            require_within(starts, lengths, cache_tokens);
            const native::AttentionCall call{
                dtype_named(dtype), heads, kv_heads, head_dim, scale, softcap,
                at<const float>(sinks), at<const char>(queries), query_stride, at<const char>(cache),
                coded_rows(codes, row_bytes, scales, 2 * kv_heads, head_dim, head_dim), at<char>(out),
                out_stride, std::move(starts), std::move(lengths),
            };
            const native::Path& chosen = path_named(path);
            nb::gil_scoped_release released;
            native::decode_attention(chosen, call, threads);
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
            require_within(starts, lengths, cache_tokens);
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
            const native::Path& chosen = path_named(path);
            nb::gil_scoped_release released;
            native::latent_attention(chosen, call, threads);
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
            std::vector<int64_t> sorted = rows;
            std::sort(sorted.begin(), sorted.end());
            const bool are_own = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
            require(are_own, "each request has a state of its own");
            require(rows.empty() || (sorted.front() >= 0 && sorted.back() < num_states),
                    "requests' states are among those given");
            const native::GatedDelta shape{
                static_cast<int64_t>(rows.size()), key_heads, value_heads, key_dim, value_dim,
                channels, conv_tokens, at<const void>(qkv), qkv_stride, at<const void>(convolution),
                at<void>(conv_states), conv_state_stride, at<float>(states), state_stride,
                at<const void>(a), at<const void>(b), a_stride, b_stride,
                at<const float>(log_rate), at<const float>(step_bias), rows.data(), at<void>(out),
                out_stride,
            };
            compute(native::gated_delta_step, path, dtype, shape, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("key_heads"),
        nb::arg("value_heads"), nb::arg("key_dim"), nb::arg("value_dim"), nb::arg("channels"),
        nb::arg("conv_tokens"), nb::arg("qkv"), nb::arg("qkv_stride"), nb::arg("convolution"),
        nb::arg("conv_states"), nb::arg("conv_state_stride"), nb::arg("states"),
        nb::arg("state_stride"), nb::arg("num_states"), nb::arg("a"), nb::arg("a_stride"),
        nb::arg("b"), nb::arg("b_stride"), nb::arg("log_rate"), nb::arg("step_bias"),
        nb::arg("rows"), nb::arg("out"), nb::arg("out_stride"), nb::arg("threads"));

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
            for (int64_t i = 0; i < num_tokens * experts_per_token; ++i) {
                require(at<const int64_t>(experts)[i] >= 0, "experts count from 0");
            }
            const PackingOf of13(packing13), of2(packing2);
            const native::ExpertsCall call{
                dtype_named(dtype), hidden, intermediate, num_tokens, experts_per_token,
                at<const char>(x), x_stride, at<const int64_t>(experts), at<const float>(weights),
                at<char>(out), out_stride, at<float>(scratch), scratch_floats,
                std::move(indices), matrices_at(w13), matrices_at(w2), of13.get(), of2.get(), std::move(bias13),
                std::move(bias2), static_cast<native::Activation>(activation), limit, weight_on_input,
                max_tokens,
            };
            const native::Path& chosen = path_named(path);
            nb::gil_scoped_release released;
            return native::run_experts(chosen, call, threads);
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
            const PackingOf of(packing);
            const native::Linear shape{
                tokens, width, rows, at<const void>(x), matrix_at(w), of.get(), x_stride,
                at<void>(out), out_stride, add,
            };
            compute(native::linear, path, dtype, shape, threads);
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
            const native::Rotation shape{
                tokens, heads, head_dim, pairs, interleaved, magnitude, at<void>(rows), stride,
                at<const int64_t>(positions), at<const float>(frequencies),
            };
            compute(native::rotate, path, dtype, shape, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("tokens"), nb::arg("heads"),
        nb::arg("head_dim"), nb::arg("pairs"), nb::arg("interleaved"), nb::arg("magnitude"),
        nb::arg("rows"), nb::arg("stride"), nb::arg("positions"), nb::arg("frequencies"),
        nb::arg("threads"));

    module.def(
        "copy",
        [](const std::string& path, uintptr_t to, uintptr_t from, int64_t num_bytes, int threads) {
            const native::Path& chosen = path_named(path);
            nb::gil_scoped_release released;
            native::copy(chosen, at<char>(to), at<const char>(from), num_bytes, threads);
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
