// How Python calls kernels: by names, addresses and sizes, now and once more from a tape.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "paths.hpp"
#include "schedule.hpp"
#include "tape.hpp"

namespace nb = nanobind;

namespace native {

// std::invalid_argument if there is none.
Dtype dtype_named(const std::string& name);

// The sizes were checked by whoever planned them; that addresses stay inside them is checked here.
inline void require(bool holds, const char* rule) {
    if (!holds) throw std::out_of_range(rule);
}

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Do it now, without the interpreter's lock, and again whenever the tape that the thread records on is played.
template <typename Work>
void perform(Work work, bool repeats = true) {
    {
        nb::gil_scoped_release released;
        work(nullptr);
    }
    Tape* const tape = Tape::recording();
    if (tape == nullptr) return;
    if (repeats) {
        tape->add(std::move(work));
    } else {
        tape->spoil();
    }
}

// Compute what a shape says.
template <typename Shape>
void compute(
    void (*kernel)(const Path&, Dtype, const Shape&, int), const std::string& path,
    const std::string& dtype, const Shape& shape, int threads) {
    const Path& chosen = path_named(path);
    const Dtype type = dtype_named(dtype);
    perform([=, &chosen](const Numbers*) { kernel(chosen, type, shape, threads); });
}

// Choices of experts and tokens, rows put into a cache or elsewhere, and tapes.
void bind_choices(nb::module_& module);

// What processes tell one another through memory that they share.
void bind_ranks(nb::module_& module);

}  // namespace native
