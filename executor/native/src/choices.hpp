// What is chosen of a token's scores: experts, and the next token.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using native::Choice;
using native::Greatest;
using native::MOST_GROUPS;

// No number is greater than all, as torch has it.
inline bool is_better(float a, float b) { return a > b || (a != a && b == b); }

// The best so far, in order, of what is offered one by one; of equals the first.
struct Best {
    float* keys;
    int64_t* indices;
    int64_t room, count = 0;

    void offer(float key, int64_t index) {
        if (count == room && !is_better(key, keys[count - 1])) return;
        int64_t at = count < room ? count++ : count - 1;
        for (; at > 0 && is_better(key, keys[at - 1]); --at) {
            keys[at] = keys[at - 1];
            indices[at] = indices[at - 1];
        }
        keys[at] = key;
        indices[at] = index;
    }
};

// Scores of a token's logits, with room for whole vectors: exponentials over their sum, or sigmoid of each.
inline void make_scores(const Choice& shape, const float* logits, float* scores) {
    constexpr float LOG2_E = 1.44269504f;
    const int64_t count = shape.experts;
    if (shape.sigmoid) {
        for (int64_t i = 0; i < count; i += LANES) {
            const Floats power = power_of_two(multiply(widen(logits + i), splat(-LOG2_E)));
            store(scores + i, divide(splat(1.0f), add(splat(1.0f), power)));
        }
        for (int64_t i = 0; i < count; ++i) scores[i] = logits[i] != logits[i] ? logits[i] : scores[i];
        return;
    }
    float greatest = logits[0];
    for (int64_t i = 1; i < count; ++i) greatest = is_better(logits[i], greatest) ? logits[i] : greatest;
    const float none = greatest - greatest;  // no number unless it is finite
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats less = subtract(widen(logits + i), splat(greatest));
        store(scores + i, power_of_two(multiply(less, splat(LOG2_E))));
    }
    float total = none;
    for (int64_t i = 0; i < count; ++i) total += scores[i];
    for (int64_t i = 0; i < count; ++i) scores[i] /= total;
}

// Offer the experts, or those of the groups that are chosen from.
inline void offer_all(const Choice& shape, const float* keys, Best& best) {
    const int64_t of_group = shape.experts / shape.groups;
    bool is_chosen[MOST_GROUPS];
    for (int64_t g = 0; g < shape.groups; ++g) is_chosen[g] = shape.chosen_groups == shape.groups;
    if (shape.chosen_groups < shape.groups) {
        float sums[MOST_GROUPS], of_best[MOST_GROUPS];
        int64_t groups[MOST_GROUPS], ignored[MOST_GROUPS];
        Best chosen{sums, groups, shape.chosen_groups};
        for (int64_t g = 0; g < shape.groups; ++g) {
            Best within{of_best, ignored, shape.best_of_group};
            for (int64_t i = 0; i < of_group; ++i) within.offer(keys[g * of_group + i], i);
            float sum = 0.0f;
            for (int64_t i = 0; i < within.count; ++i) sum += of_best[i];
            chosen.offer(sum, g);
        }
        for (int64_t i = 0; i < chosen.count; ++i) is_chosen[groups[i]] = true;
    }
    for (int64_t g = 0; g < shape.groups; ++g) {
        if (!is_chosen[g]) continue;
        for (int64_t i = g * of_group; i < (g + 1) * of_group; ++i) best.offer(keys[i], i);
    }
}

// Tokens [first, last). Where scores are as logits are, experts are chosen by these, which are exact.
template <typename T>
void choose_experts(const Choice& shape, int64_t first, int64_t last, float* scratch) {
    const int64_t padded = native::rounded_up(shape.experts, LANES);
    float *const scores = scratch, *const keys = scores + padded, *const best = keys + padded;
    const T* const correction = static_cast<const T*>(shape.correction);
    for (int64_t t = first; t < last; ++t) {
        const T* const logits = static_cast<const T*>(shape.logits) + t * shape.stride;
        for (int64_t i = 0; i < padded; ++i) keys[i] = i < shape.experts ? widened(logits[i]) : 0.0f;
        make_scores(shape, keys, scores);
        if (correction != nullptr) {
            for (int64_t i = 0; i < shape.experts; ++i) keys[i] = scores[i] + widened(correction[i]);
        } else if (shape.chosen_groups < shape.groups && shape.best_of_group > 1) {
            for (int64_t i = 0; i < shape.experts; ++i) keys[i] = scores[i];
        }
        float* const weights = shape.out_weights + t * shape.chosen;
        int64_t* const experts = shape.out_experts + t * shape.chosen;
        Best chosen{best, experts, shape.chosen};
        offer_all(shape, keys, chosen);
        float total = 0.0f;
        for (int64_t k = 0; k < shape.chosen; ++k) total += weights[k] = scores[experts[k]];
        for (int64_t k = 0; k < shape.chosen; ++k) {
            if (shape.normalised) weights[k] /= total;
            weights[k] *= shape.scale;
        }
    }
}

// The greatest of COUNT elements from `row` on, if all of them are finite; else no number.
template <typename T, int COUNT>
float greatest_of(const T* row) {
    Floats most = splat(-__builtin_inff()), none = zeros();
    for (int i = 0; i < COUNT; i += Pack<T>::WIDTH) {
        const Floats even = Pack<T>::template vector<0>(row + i);
        most = greater(most, even);
        none = add(none, subtract(even, even));
        if constexpr (Pack<T>::VECTORS == 2) {
            const Floats odd = Pack<T>::template vector<1>(row + i);
            most = greater(most, odd);
            none = add(none, subtract(odd, odd));
        }
    }
    float lanes[LANES], found = -__builtin_inff();
    store(lanes, add(most, none));
    for (const float lane : lanes) found = found > lane || found != found ? found : lane;
    return found;
}

// Rows [first, last).
template <typename T>
void greatest(const Greatest& shape, int64_t first, int64_t last) {
    constexpr int COUNT = 256;
    for (int64_t r = first; r < last; ++r) {
        const T* const row = static_cast<const T*>(shape.x) + r * shape.stride;
        float best = -__builtin_inff();
        int64_t found = -1;
        const auto look_at = [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; ++i) {
                const float value = widened(row[i]);
                if (!is_better(value, best)) continue;
                best = value;
                found = i;
            }
        };
        int64_t i = 0;
        for (; i + COUNT <= shape.width; i += COUNT) {
            const float here = greatest_of<T, COUNT>(row + i);
            if (is_better(here, best)) look_at(i, i + COUNT);
        }
        look_at(i, shape.width);
        shape.out[r] = best - best == 0.0f ? found : -1;
    }
}

}  // namespace
