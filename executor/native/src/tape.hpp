// Calls of kernels that are made once more as they were, but for what changes from token to token.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace native {

// What changes: the positions of requests' new tokens, the rows of a cache that these go to, and the rows there that
// each request attends to.
struct Numbers {
    const int64_t *positions, *cache_rows;
    std::vector<int64_t> starts, lengths;
};

class Tape {
  public:
    // With the numbers of now, or with null as it was called first.
    using Call = std::function<void(const Numbers*)>;

    // The one that the calling thread records on, or null.
    static Tape*& recording() {
        thread_local Tape* tape = nullptr;
        return tape;
    }

    explicit Tape(const Numbers& numbers) : numbers_(numbers) {}

    // Those while it was recorded.
    const Numbers& numbers() const { return numbers_; }

    // Tokens given to each expert in its last call of experts.
    const std::shared_ptr<std::vector<int64_t>>& counts() const { return counts_; }

    bool is_whole() const { return is_whole_; }

    void add(Call call) { calls_.push_back(std::move(call)); }

    // Something was done that it cannot repeat.
    void spoil() { is_whole_ = false; }

    void play(const Numbers& now) const {
        for (const Call& call : calls_) call(&now);
    }

  private:
    Numbers numbers_;
    std::vector<Call> calls_;
    std::shared_ptr<std::vector<int64_t>> counts_ = std::make_shared<std::vector<int64_t>>();
    bool is_whole_ = true;
};

// Whether a call with these is one that can be repeated on the tape under way; any is if there is none.
template <typename Condition>
bool repeats(const Condition& condition) {
    const Tape* const tape = Tape::recording();
    return tape == nullptr || condition(tape->numbers());
}

}  // namespace native
