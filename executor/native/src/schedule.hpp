// Cuts a call into pieces of work and hands them to threads. How it is cut depends on the sizes of
// each request alone, and sums are taken in a fixed order: results depend neither on what else is
// in the call nor on the number of threads.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace native {

struct AttentionCall {
    Dtype dtype;
    int64_t heads, kv_heads, head_dim;
    double scale, softcap;  // of the logits; softcap * tanh(scaled / softcap), unless it is 0
    const float* sinks;    // of each head, or null
    const char* queries;   // a row per request, row strides in bytes
    int64_t query_stride;
    const char* cache;     // (tokens, 2, kv_heads, head_dim), or rows of codes
    CodedRows coded;
    char* out;
    int64_t out_stride;
    std::vector<int64_t> starts, lengths;
};

void decode_attention(const Path& path, const AttentionCall& call, int threads);

struct LatentCall {
    Dtype dtype;
    Latent shape;            // of the first request on
    double scale;
    const char* cache;       // (tokens, rank + rope), or rows of codes
    CodedRows coded;
    char* out;               // (requests, heads, value_dim)
    int64_t out_stride;      // elements
    std::vector<int64_t> starts, lengths;
};

void latent_attention(const Path& path, const LatentCall& call, int threads);

void gated_delta_step(const Path& path, Dtype dtype, const GatedDelta& shape, int threads);

struct ExpertsCall {
    Dtype dtype;
    int64_t hidden, intermediate, num_tokens, experts_per_token;
    const char* x;               // row strides in bytes
    int64_t x_stride;
    const int64_t* experts;      // (num_tokens, experts_per_token)
    const float* weights;        // the same
    char* out;
    int64_t out_stride;
    float* scratch;              // for activations
    int64_t scratch_floats;
    std::vector<int64_t> indices;          // of the experts given
    std::vector<Matrix> w13, w2;           // their weights
    const Packing *packing13, *packing2;   // of all of them, or null
    std::vector<uintptr_t> bias13, bias2;  // and their biases; empty if they have none
    Activation activation;
    float limit;                           // of a clamped activation
    bool weight_on_input;                  // tokens are multiplied by their weights before, not after
    int64_t max_tokens;                    // of one expert; those with more are left out
};

// Floats of scratch for the activations of one token of one expert.
int64_t activation_floats(int64_t intermediate);

// Tokens routed to each expert up to the last that any is routed to, and the positions in `indices`
// of the experts that were left out.
std::pair<std::vector<int64_t>, std::vector<int64_t>> run_experts(
    const Path& path, const ExpertsCall& call, int threads);

// Whether no expert is left out, wherever tokens are routed.
bool takes_all(const ExpertsCall& call);

void linear(const Path& path, Dtype dtype, const Linear& shape, int threads);

void rms_norm(const Path& path, Dtype dtype, const RmsNorm& shape, int threads);

void rotate(const Path& path, Dtype dtype, const Rotation& shape, int threads);

// Add `count` elements to as many others.
void add(const Path& path, Dtype dtype, char* out, const char* x, int64_t count, int threads);

void choose_experts(const Path& path, Dtype dtype, const Choice& shape, int threads);

void greatest(const Path& path, Dtype dtype, const Greatest& shape, int threads);

// Read `num_bytes` bytes and do nothing with them.
uint64_t read(const Path& path, const char* from, int64_t num_bytes, int threads);

// Copy memory to memory that does not overlap with it, past the caches.
void copy(const Path& path, char* to, const char* from, int64_t num_bytes, int threads);

}  // namespace native
