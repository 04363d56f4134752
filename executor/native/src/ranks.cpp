// What processes tell one another through memory that they share.
#include <nanobind/stl/string.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

#include "calls.hpp"

namespace native {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t LINE = 64;                    // bytes that processors hand over at once
constexpr std::chrono::microseconds YIELDING{300};  // a few times as long as a thread takes to wake up
constexpr std::chrono::milliseconds LOOK{20};    // after which a waiting rank looks whether the other is still there

// Sleep until somebody wakes those who wait at `count`, unless it is no longer `seen`, or until it is time to look.
void sleep_at(std::atomic<int32_t>* count, int32_t seen) {
#ifdef __linux__
    const timespec until{0, std::chrono::nanoseconds(LOOK).count()};
    syscall(SYS_futex, count, FUTEX_WAIT, seen, &until, nullptr, 0);
#else
    (void)count, (void)seen;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
#endif
}

void wake_all_at(std::atomic<int32_t>* count) {
#ifdef __linux__
    syscall(SYS_futex, count, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#else
    (void)count;
#endif
}

// One rank of several. In every turn each writes a piece, and counts; when all have counted, all are read. A rank
// writes to a place again two turns later, and so after all others have counted once more, having read it.
class Ranks {
  public:
    // The memory has a line for each rank's count, and two turns' pieces of each.
    Ranks(uintptr_t memory, int64_t piece_bytes, int rank, int size)
        : memory_(at<char>(memory)), piece_bytes_(piece_bytes), rank_(rank), size_(size) {
        require(0 <= rank && rank < size, "one of the ranks");
    }

    // The piece of this turn that a rank has written, once `tell` has returned and until the turn after the next.
    char* piece(int rank) const { return memory_ + size_ * LINE + (turn_ % 2 * size_ + rank) * piece_bytes_; }

    int32_t turn() const { return turn_; }

    // Write a piece, and wait until all have, without the interpreter's lock. While one does not come, `look` is called
    // with it and for how many seconds, and may raise.
    void tell(const char* own, int64_t num_bytes, nb::handle look) {
        require(0 <= num_bytes && num_bytes <= piece_bytes_, "no more than a piece");
        turn_ = static_cast<int32_t>(static_cast<uint32_t>(turn_) + 1);
        std::memcpy(piece(rank_), own, num_bytes);
        count_of(rank_)->store(turn_, std::memory_order_release);
        wake_all_at(count_of(rank_));
        for (int other = 0; other < size_; ++other) wait_for(other, look);
    }

    // Add up so many numbers of all ranks, in their order, where this one has its own. Likewise.
    void sum(
        const Path& path, Dtype dtype, char* own, int64_t count, int64_t num_bytes, int threads, nb::handle look) {
        tell(own, num_bytes, look);
        std::memcpy(own, piece(0), num_bytes);
        for (int other = 1; other < size_; ++other) add(path, dtype, own, piece(other), count, threads);
    }

  private:
    std::atomic<int32_t>* count_of(int rank) const { return at<std::atomic<int32_t>>(uintptr_t(memory_) + rank * LINE); }

    // A rank is at most two turns from another, so that counts may start over.
    bool has_come(int other) const {
        const int32_t count = count_of(other)->load(std::memory_order_acquire);
        return static_cast<int32_t>(static_cast<uint32_t>(count) - static_cast<uint32_t>(turn_)) >= 0;
    }

    // Awake at first, but letting the rank's other threads have the core whenever one has need of it, and then asleep.
    void wait_for(int other, nb::handle look) const {
        const Clock::time_point begin = Clock::now();
        while (Clock::now() < begin + YIELDING) {
            if (has_come(other)) return;
            std::this_thread::yield();
        }
        while (true) {
            const int32_t seen = count_of(other)->load(std::memory_order_acquire);
            if (has_come(other)) return;
            sleep_at(count_of(other), seen);
            if (has_come(other)) return;
            const std::chrono::duration<double> waited = Clock::now() - begin;
            nb::gil_scoped_acquire acquired;
            try {
                look(other, waited.count());
            } catch (const nb::python_error&) {
                if (!has_come(other)) throw;  // else it has come, and gone, since
                return;
            }
        }
    }

    char* const memory_;
    const int64_t piece_bytes_;
    const int rank_, size_;
    int32_t turn_ = 0;
};

}  // namespace

void bind_ranks(nb::module_& module) {
    nb::class_<Ranks>(module, "Ranks")
        .def(nb::init<uintptr_t, int64_t, int, int>(), nb::arg("memory"), nb::arg("piece_bytes"),
             nb::arg("rank"), nb::arg("size"))
        .def_prop_ro("turn", &Ranks::turn)
        .def(
            "tell",
            [](Ranks& ranks, uintptr_t own, int64_t num_bytes, nb::handle look) {
                nb::gil_scoped_release released;
                ranks.tell(at<const char>(own), num_bytes, look);
            },
            nb::arg("own"), nb::arg("num_bytes"), nb::arg("look"))
        .def(
            "sum",
            [](Ranks& ranks, const std::string& path, const std::string& dtype, uintptr_t own, int64_t count,
               int64_t num_bytes, int threads, nb::handle look) {
                const Path& chosen = path_named(path);
                const Dtype type = dtype_named(dtype);
                nb::gil_scoped_release released;
                ranks.sum(chosen, type, at<char>(own), count, num_bytes, threads, look);
            },
            nb::arg("path"), nb::arg("dtype"), nb::arg("own"), nb::arg("count"), nb::arg("num_bytes"),
            nb::arg("threads"), nb::arg("look"));
}

}  // namespace native
