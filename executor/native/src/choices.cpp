// What `executor.native` has of choices, rows put into a cache or elsewhere, and tapes.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "calls.hpp"

namespace native {

void bind_choices(nb::module_& module) {
    module.def(
        "append",
        [](uintptr_t to, int64_t row_bytes, int64_t num_rows, uintptr_t from, int64_t stride,
           uintptr_t rows, int64_t tokens) {
            const auto work = [=](const Numbers* now) {
                const int64_t* const present = now == nullptr ? at<const int64_t>(rows) : now->cache_rows;
                for (int64_t t = 0; t < tokens; ++t) {
                    require(present[t] >= 0 && present[t] < num_rows, "rows lie within the cache");
                    std::memcpy(at<char>(to) + present[t] * row_bytes, at<const char>(from) + t * stride, row_bytes);
                }
            };
            const auto is_of_numbers = [&](const Numbers& of) {
                return of.cache_rows == at<const int64_t>(rows);
            };
            perform(work, repeats(is_of_numbers));
        },
        nb::kw_only(), nb::arg("to_address"), nb::arg("row_bytes"), nb::arg("num_rows"),
        nb::arg("from_address"), nb::arg("stride"), nb::arg("rows"), nb::arg("tokens"));

    module.def(
        "clear",
        [](uintptr_t to, int64_t num_bytes) {
            perform([=](const Numbers*) { std::memset(at<char>(to), 0, num_bytes); });
        },
        nb::kw_only(), nb::arg("to_address"), nb::arg("num_bytes"));

    module.def(
        "put",
        [](uintptr_t to, uintptr_t from, int64_t num_bytes) {
            perform([=](const Numbers*) { std::memmove(at<char>(to), at<const char>(from), num_bytes); });
        },
        nb::kw_only(), nb::arg("to_address"), nb::arg("from_address"), nb::arg("num_bytes"));

    module.def(
        "add",
        [](const std::string& path, const std::string& dtype, uintptr_t to, uintptr_t from, int64_t count,
           int threads) {
            const Path& chosen = path_named(path);
            const Dtype type = dtype_named(dtype);
            perform([=, &chosen](const Numbers*) {
                add(chosen, type, at<char>(to), at<const char>(from), count, threads);
            });
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("to_address"), nb::arg("from_address"),
        nb::arg("count"), nb::arg("threads"));

    module.def(
        "choose_experts",
        [](const std::string& path, const std::string& dtype, int64_t tokens, int64_t experts, int64_t chosen,
           uintptr_t logits, int64_t stride, bool sigmoid, int64_t groups, int64_t chosen_groups,
           int64_t best_of_group, bool normalised, float scale, uintptr_t correction, uintptr_t out_weights,
           uintptr_t out_experts, int threads) {
            require(chosen > 0 && chosen <= experts, "no more experts chosen than there are");
            require(groups > 0 && groups <= MOST_GROUPS && experts % groups == 0 && chosen_groups > 0 && chosen_groups <= groups,
                    "groups of equally many experts");
            require(best_of_group > 0 && best_of_group <= std::min(experts / groups, MOST_GROUPS), "no more of a group than it has");
            require(chosen <= experts / groups * chosen_groups, "experts enough in the chosen groups");
            const Choice shape{
                tokens, experts, chosen, at<const void>(logits), stride, sigmoid, groups, chosen_groups,
                best_of_group, normalised, scale, at<const void>(correction), at<float>(out_weights),
                at<int64_t>(out_experts),
            };
            compute(choose_experts, path, dtype, shape, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("tokens"), nb::arg("experts"),
        nb::arg("chosen"), nb::arg("logits"), nb::arg("stride"), nb::arg("sigmoid"), nb::arg("groups"),
        nb::arg("chosen_groups"), nb::arg("best_of_group"), nb::arg("normalised"), nb::arg("scale"),
        nb::arg("correction"), nb::arg("out_weights"), nb::arg("out_experts"), nb::arg("threads"));

    module.def(
        "greatest",
        [](const std::string& path, const std::string& dtype, int64_t rows, int64_t width, uintptr_t x,
           int64_t stride, uintptr_t out, int threads) {
            const Greatest shape{rows, width, at<const void>(x), stride, at<int64_t>(out)};
            compute(greatest, path, dtype, shape, threads);
        },
        nb::kw_only(), nb::arg("path"), nb::arg("dtype"), nb::arg("rows"), nb::arg("width"), nb::arg("x"),
        nb::arg("stride"), nb::arg("out"), nb::arg("threads"));

    nb::class_<Numbers>(module, "Numbers")
        .def("__init__",
             [](Numbers* numbers, uintptr_t positions, uintptr_t cache_rows, std::vector<int64_t> starts,
                std::vector<int64_t> lengths) {
                 new (numbers) Numbers{
                     at<const int64_t>(positions), at<const int64_t>(cache_rows), std::move(starts),
                     std::move(lengths)};
             });

    nb::class_<Tape>(module, "Tape")
        .def(nb::init<const Numbers&>())
        .def("start", [](Tape& tape) { Tape::recording() = &tape; })
        .def("stop", [](Tape&) { Tape::recording() = nullptr; })
        .def("spoil", &Tape::spoil)
        .def("is_whole", &Tape::is_whole)
        .def("play", [](const Tape& tape, const Numbers& now) {
            require(now.starts.size() == tape.numbers().starts.size(), "as many requests as were recorded");
            nb::gil_scoped_release released;
            tape.play(now);
            return *tape.counts();
        });
}

}  // namespace native
