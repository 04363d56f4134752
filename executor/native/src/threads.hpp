// Threads of our own, so that torch's stay out of it: each thread that calls has helpers of its
// own, which sleep between calls that are not soon followed by others, and end with it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace native {

// How long a thread that waits stays awake: calls follow one another sooner than a thread wakes.
constexpr std::chrono::microseconds AWAKE{30};

// Stay awake until it `holds`, but no longer than that; whether it did.
template <typename Condition>
bool awake_until(const Condition& holds) {
    using Clock = std::chrono::steady_clock;
    for (const auto end = Clock::now() + AWAKE; Clock::now() < end;) {
        if (holds()) return true;
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
    return false;
}

// Return when `value` is no longer `old`.
template <typename Value>
void wait_for_change(const std::atomic<Value>& value, Value old) {
    if (!awake_until([&] { return value.load() != old; })) value.wait(old);
}

class Helpers {
  public:
    // The calling thread's own.
    static Helpers& mine() {
        thread_local Helpers helpers;
        return helpers;
    }

    // Call work(i) for every i below `count` on at most `threads` threads, this one among them.
    // Which thread takes which piece is left to chance: no result may depend on it.
    template <typename Work>
    void run(int threads, int64_t count, const Work& work) {
        const auto call = [](const void* of, int64_t index) {
            (*static_cast<const Work*>(of))(index);
        };
        run_pieces(threads, count, call, &work);
    }

    // A guess at the piece of the present job that the calling thread takes next, when it begins one: each of the
    // others takes one meanwhile. -1 after the last.
    int64_t upcoming() const {
        const uint64_t piece = (ticket_.load() & PIECES) + static_cast<uint64_t>(wanted_.load());
        return piece < count_.load() ? static_cast<int64_t>(piece) : -1;
    }

    ~Helpers() {
        stop_.store(true);
        ticket_.fetch_add(JOB);
        ticket_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

  private:
    using Call = void (*)(const void*, int64_t);

    // The ticket is the job's number above and its next piece below. Between jobs the next piece
    // is CLOSED, so a helper that wakes late finds nothing to take.
    static constexpr uint64_t JOB = uint64_t{1} << 32;
    static constexpr uint64_t PIECES = JOB - 1;
    static constexpr uint64_t CLOSED = PIECES;

    void run_pieces(int threads, int64_t count, Call call, const void* work) {
        if (threads > count) threads = static_cast<int>(count);
        while (static_cast<int>(threads_.size()) < threads - 1) {
            const int index = static_cast<int>(threads_.size());
            threads_.emplace_back([this, index] { help(index); });
        }
        call_.store(call);
        work_.store(work);
        count_.store(static_cast<uint64_t>(count));
        wanted_.store(threads - 1);
        left_.store(count);
        const uint64_t job = (ticket_.load() & ~PIECES) + JOB;
        ticket_.store(job);
        ticket_.notify_all();
        take_pieces(job);
        for (int64_t left = left_.load(); left > 0; left = left_.load()) {
            wait_for_change(left_, left);
        }
        ticket_.store(job | CLOSED);
    }

    // Take pieces of that job until there are none.
    void take_pieces(uint64_t job) {
        uint64_t ticket = ticket_.load();
        while ((ticket & ~PIECES) == job && (ticket & PIECES) < count_.load()) {
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
            call_.load()(work_.load(), static_cast<int64_t>(ticket & PIECES));
            if (left_.fetch_sub(1) == 1) left_.notify_one();
            ticket = ticket_.load();
        }
    }

    void help(int index) {
        uint64_t seen = 0;
        while (!stop_.load()) {
            const uint64_t ticket = ticket_.load();
            if ((ticket & ~PIECES) == seen) {
                wait_for_change(ticket_, ticket);
                continue;
            }
            seen = ticket & ~PIECES;
            if (index < wanted_.load()) take_pieces(seen);
        }
    }

    std::atomic<uint64_t> ticket_{CLOSED};
    std::atomic<Call> call_{nullptr};
    std::atomic<const void*> work_{nullptr};
    std::atomic<uint64_t> count_{0};
    std::atomic<int64_t> left_{0};
    std::atomic<int> wanted_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> threads_;
};

}  // namespace native
