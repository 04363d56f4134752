// What the scheduler (module.cpp) asks of each path. A path is one set of instructions; all paths
// are compiled from the same source (path.cpp) and one is chosen when the module is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace native {

enum Dtype { BFLOAT16, FLOAT16, FLOAT32, NUM_DTYPES };

// Internal to each file that includes this, as all code here must be: a function shared by name
// might be taken from the object that was compiled for instructions which this processor lacks.
static inline int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

constexpr int64_t SAME_LINES = 4096;      // bytes apart, two lines compete for a core's first cache
constexpr int64_t ACCUMULATOR_UNIT = 32;  // floats; a row of accumulators is padded to it
constexpr int64_t TILE_UNIT = 8;          // tokens; for fewer it is slow to load and store all accumulators

// How a token lies in a quantised cache: `parts` of codes, a byte each, of which the first has `first` of
// them and each other one `others`, and from byte `scales` on a bfloat16 for each part. 0 row_bytes: it is
// of elements.
struct CodedRows {
    int codes;  // as `Path::codes_named` numbers them
    int64_t row_bytes, scales, parts, first, others;
};

// Decode attention of one request. A token of the cache is 2 * kv_heads rows of head_dim elements,
// its keys and then its values.
struct Heads {
    int64_t heads, kv_heads, head_dim;
    int64_t padded_dim;      // of a head's float32 sums: head_dim rounded up to ACCUMULATOR_UNIT
    int64_t token_elements;  // 2 * kv_heads * head_dim
    int64_t tile_tokens;     // computed at a time, a multiple of TILE_UNIT
    float scale;             // of the logits, log2(e) included: weights are powers of two
    float capped_scale;      // of them before a tanh, 2 log2(e) included; 0: there is no tanh
    const float* sinks;      // of each head a logit that has no value, or null
    int64_t token_bytes = 0;  // from token to token of the cache
    const CodedRows* coded = nullptr;  // how it is quantised, if it is
    bool is_tiled = false;    // latent attention is by tiles
};

// Floats that a tile's elements need that are made of codes.
static inline int64_t tile_floats(const Heads& shape) {
    return shape.coded == nullptr ? 0 : shape.tile_tokens * shape.token_elements;
}

// What is one float a head is padded to whole vectors of them.
static inline int64_t padded_heads(const Heads& shape) { return rounded_up(shape.heads, 16); }

// Floats of a softmax in progress: the weighted sums of the values, head by head, then every
// head's greatest logit, then every head's sum of weights.
static inline int64_t state_floats(const Heads& shape) {
    return rounded_up(
        shape.heads * shape.padded_dim + 2 * padded_heads(shape), ACCUMULATOR_UNIT);
}

// Floats of scratch: the queries, widened, for every head a factor and a tile's scores, and its elements.
static inline int64_t scratch_floats(const Heads& shape) {
    return shape.heads * shape.padded_dim + (1 + shape.tile_tokens) * padded_heads(shape) + tile_floats(shape);
}

// Latent attention of `requests` new tokens, before and after it goes over the cache.
struct Latent {
    int64_t requests, heads, nope, rope, rank, value_dim;
    const void* q_nope;      // of each head `nope` elements
    int64_t nope_stride, nope_head_stride;  // elements from request to request, from head to head
    const void* q_rope;      // likewise `rope`
    int64_t rope_stride, rope_head_stride;
    const void* kv_up;       // (heads, nope + value_dim, rank)
    void* absorbed;          // (requests, heads, rank + rope)
};

static inline int64_t padded_rank(const Latent& shape) {
    return rounded_up(shape.rank, ACCUMULATOR_UNIT);
}

// Floats of scratch to absorb one head's queries: factors, weights and sums of every request.
static inline int64_t absorbing_floats(const Latent& shape) {
    const int64_t padded = rounded_up(shape.requests, 16);
    return (1 + rounded_up(shape.nope, 2)) * padded + shape.requests * padded_rank(shape);
}

constexpr int64_t TILED_LATENT_TOKENS = 128;  // that are computed at a time by tiles

// Floats of scratch to attend: every head's query, factor, scores and, by tiles, weights of half a float, some rows
// of the cache, widened, and a tile's elements.
static inline int64_t latent_floats(const Heads& shape) {
    constexpr int64_t ROWS = 8;
    return padded_heads(shape) * (1 + shape.tile_tokens + (shape.is_tiled ? shape.tile_tokens / 2 : 0)) +
           (shape.heads + ROWS) * rounded_up(shape.token_elements, ACCUMULATOR_UNIT) + tile_floats(shape);
}

// One new token of each of `requests`, whose states are rows of theirs. Queries and keys of all key
// heads and values of all value heads are the `channels` of a convolution; a key head has as many
// value heads as any other, one after the other.
struct GatedDelta {
    int64_t requests, key_heads, value_heads, key_dim, value_dim, channels;
    int64_t conv_tokens;         // before the new one, that the convolution goes over
    const void* qkv;             // rows of `channels`; strides are of elements
    int64_t qkv_stride;
    const void* convolution;     // (channels, conv_tokens + 1), the newest token's last
    void* conv_states;           // rows of (conv_tokens, channels), the earliest token first
    int64_t conv_state_stride;
    float* states;               // rows of (value_heads, key_dim, value_dim)
    int64_t state_stride;
    const void *a, *b;           // rows of `value_heads`: before softplus and before sigmoid
    int64_t a_stride, b_stride;
    const float *log_rate, *step_bias;  // of each value head
    const int64_t* rows;         // of the states, of each request
    void* out;                   // rows of (value_heads, value_dim)
    int64_t out_stride;
};

// Floats for the channels of one key head, its query, key and values each whole vectors.
static inline int64_t delta_room(const GatedDelta& shape) {
    const int64_t values = shape.value_heads / shape.key_heads * shape.value_dim;
    return 2 * rounded_up(shape.key_dim, 16) + rounded_up(values, 16);
}

// Floats of scratch for them, for outputs and for the convolution's weights.
static inline int64_t delta_floats(const GatedDelta& shape) {
    return (3 + shape.conv_tokens) * delta_room(shape);
}

enum Code { FP8, INT8, INT4, FP4, NUM_CODES };
enum ScaleType { SCALE_FLOAT32, SCALE_BFLOAT16, SCALE_FLOAT16, SCALE_E8M0, SCALE_E4M3, NUM_SCALE_TYPES };

// How a matrix is packed: what a weight is, and what a group of them has in common. It is the weight,
// less the group's zero point if there are any, times the group's scale, times its row's if there are any.
struct Packing {
    Code code;
    ScaleType scale;
    int64_t rows, columns;  // of a group; 0 columns are all
};

// A matrix of numbers, or of codes: then rows of whole bytes.
struct Matrix {
    const void* numbers;
    const void* scales;       // of each group, row by row of them; the rest is null if there are none
    const uint8_t* zeros;     // likewise
    const float* row_scales;  // of each row
};

// The tokens given to one expert: token t of the group has the input row `tokens[t]` and, after
// the gate, the activation row `first_row + t`.
struct ExpertGroup {
    Matrix w13;             // (2 * intermediate, hidden)
    Matrix w2;              // (hidden, intermediate)
    const void *bias13, *bias2;  // (2 * intermediate) and (hidden), or null
    const int32_t* tokens;
    const float* weights;   // by which each token's output, or its input, is multiplied
    int64_t count, first_row;
    const void* arranged;   // its input rows, arranged for tiles, as its activations will be; or null
};

// How gate and up become an activation: gate * sigmoid(slope * gate) * up with a slope of 1, or one
// that depends on the gate so that it is GELU by its tanh, or up + 1 instead of up and both clamped.
enum Activation { SILU, GELU_TANH, CLAMPED, NUM_ACTIVATIONS };

struct Experts {
    int64_t hidden, intermediate;
    Activation activation;
    float limit;                // of the clamped ones: of gates above, of ups on both sides
    bool weight_on_input;       // tokens are multiplied by their weights before, not after
    const void* x;              // inputs, rows of x_stride elements
    int64_t x_stride;
    float* activations;         // as the path prepares it
    int64_t activation_stride;  // at least intermediate rounded up to ACCUMULATOR_UNIT
    void* out;                  // rows of out_stride elements, added to
    int64_t out_stride;
    const Packing *packing13, *packing2;  // of every expert's matrices, or null
};

// out = x @ w.T, or added to it: `tokens` rows of `width` elements by rows of w.
struct Linear {
    int64_t tokens, width, rows;
    const void* x;
    Matrix w;
    const Packing* packing;  // of w, or null
    int64_t x_stride;  // elements
    void* out;
    int64_t out_stride;
    bool add;
    const void* arranged = nullptr;  // rows of `x`, arranged for tiles, or null
};

// Each head of each row of `tokens`, `heads` of `width` elements one after the other, times `weight`
// over the root of its mean square.
struct RmsNorm {
    int64_t tokens, heads, width;
    const void* x;
    int64_t x_stride;  // elements from row to row
    const void* weight;
    float offset;      // added to the weights; unless it is 0, only the product is rounded
    float epsilon;     // added to the mean square
    void* out;         // may be `x`
    int64_t out_stride;
};

// The first 2 * pairs elements of the first `heads` heads of each of `tokens` rows, turned by positions
// times frequencies: each with the one that follows it if `interleaved`, else with the one `pairs` on.
struct Rotation {
    int64_t tokens, heads, head_dim, pairs;
    bool interleaved;
    float magnitude;  // that what was turned is multiplied by
    void* rows;
    int64_t stride;  // elements
    const int64_t* positions;
    const float* frequencies;  // of each pair
};

// The experts of each of `tokens` tokens with the greatest scores, which become its weights: softmax of its logits
// over all experts, or sigmoid of each. With a `correction` that is added to scores to choose by. Of `groups` of
// experts, `chosen_groups` are chosen from: those whose `best_of_group` greatest have the greatest sum. Weights
// are divided by their sum if `normalised`, and multiplied by the scale. Of equals the first comes first.
struct Choice {
    int64_t tokens, experts, chosen;
    const void* logits;
    int64_t stride;  // elements
    bool sigmoid;
    int64_t groups, chosen_groups, best_of_group;
    bool normalised;
    float scale;
    const void* correction;  // of each expert, or null
    float* out_weights;      // (tokens, chosen), the greatest score first
    int64_t* out_experts;
};

constexpr int64_t MOST_GROUPS = 64;

// Floats of scratch for a token's scores, what experts are chosen by, and the same of the chosen ones.
static inline int64_t choice_floats(const Choice& shape) {
    return 2 * rounded_up(shape.experts, 16) + shape.chosen;
}

// Where each row has its greatest element, the first of equals; -1 if that is no finite number.
struct Greatest {
    int64_t rows, width;
    const void* x;
    int64_t stride;  // elements
    int64_t* out;
};

constexpr int COLUMNS = 64;  // of the activations or the output that are one piece of work
constexpr int MOST_TOKENS = 192;  // whose products with them are held at a time
constexpr int TILE = 16;          // rows of a tile, and tokens that are arranged for tiles together
constexpr int TILE_COLUMNS = 32;  // of a bfloat16 matrix

// Elements of so many tokens, arranged for tiles. For 8 tokens and more it is no more than two rows each.
static inline int64_t arranged_elements(int64_t tokens, int64_t width) {
    return rounded_up(tokens, TILE) * rounded_up(width, TILE_COLUMNS);
}

constexpr int PANEL_ROW_BYTES = 2048 + 64;  // of packed weights that were unpacked for many tokens

// Floats of scratch of a piece: two matrices' products and panels.
constexpr int64_t PIECE_FLOATS = 2 * COLUMNS * (MOST_TOKENS + PANEL_ROW_BYTES / 4);

struct Path {
    const char* name;
    // The number of a quantised cache's codes that are called so, or -1.
    int (*codes_named)(const char* name);
    // Of how many tokens on matrices are multiplied with bfloat16s by tiles, if these are arranged for it; 0: never.
    int64_t least_tiled;
    // Arrange up to TILE rows of so many bfloat16s: those that `rows` names, or the first.
    void (*arrange)(const void* x, int64_t stride, const int32_t* rows, int count, int64_t width, void* to);
    // Softmax of `tokens` tokens of the cache from `cache` on, started anew in `state`; what begins
    // at `next`, if it is not null, is fetched with the last of them.
    void (*attend[NUM_DTYPES])(
        const Heads&, const void* query, const void* cache, int64_t tokens, const void* next,
        float* state, float* scratch);
    // Likewise of absorbed queries over a cache that all heads share.
    void (*attend_latent[NUM_DTYPES])(
        const Heads&, const void* queries, const void* cache, int64_t tokens, const void* next,
        float* state, float* scratch);
    // The absorbed queries of one head of all requests; `next` will probably be read next, or is null.
    void (*absorb[NUM_DTYPES])(const Latent&, int64_t head, const void* next, float* scratch);
    // One key head of requests [first, last); `next` is the state that probably comes next, or null.
    void (*delta_step[NUM_DTYPES])(
        const GatedDelta&, int64_t head, int64_t first, int64_t last, const void* next,
        float* scratch);
    // Take the later tokens' softmax of heads [first, last) into an earlier one's.
    void (*merge)(const Heads&, int64_t first, int64_t last, float* state, const float* later);
    // The weighted mean of their values.
    void (*finish[NUM_DTYPES])(const Heads&, int64_t first, int64_t last, const float* state, void* out);
    // Activations of one group in columns [first, last), at most COLUMNS of them; those from
    // `next_first` on of the group `next` will probably be computed next, if it is not null. Scratch
    // of this and the next two has room for PIECE_FLOATS.
    void (*gate[NUM_DTYPES])(
        const Experts&, const ExpertGroup&, int64_t first, int64_t last, const ExpertGroup* next,
        int64_t next_first, float* scratch);
    // Add all groups' weighted outputs in columns [first, last), at most COLUMNS of them; those
    // from `next` on probably come next, if it is not negative.
    void (*project[NUM_DTYPES])(
        const Experts&, const ExpertGroup* groups, int64_t num_groups, int64_t first,
        int64_t last, int64_t next, float* scratch);
    // Likewise columns [first, last) of one product.
    void (*linear[NUM_DTYPES])(
        const Linear&, int64_t first, int64_t last, int64_t next, float* scratch);
    // Rows [first, last) of them; `scratch` has room for 2 * pairs floats.
    void (*rms_norm[NUM_DTYPES])(const RmsNorm&, int64_t first, int64_t last);
    void (*rotate[NUM_DTYPES])(const Rotation&, int64_t first, int64_t last, float* scratch);
    // Add so many elements of `x` to those of `out`, each sum rounded once.
    void (*add[NUM_DTYPES])(void* out, const void* x, int64_t count);
    // Rows [first, last), with scratch of `choice_floats`.
    void (*choose_experts[NUM_DTYPES])(const Choice&, int64_t first, int64_t last, float* scratch);
    void (*greatest[NUM_DTYPES])(const Greatest&, int64_t first, int64_t last);
    // Read whole cache lines and return something of all of them.
    uint64_t (*read)(const char* from, int64_t num_bytes);
    // Copy bytes that nothing will read soon.
    void (*copy)(char* to, const char* from, int64_t num_bytes);
};

extern const Path portable_path;
extern const Path portable_tiles_path;  // for tests: what it does without them is faster
extern const Path avx2_path;
extern const Path avx512_path;
extern const Path avx512_bf16_path;
extern const Path amx_path;

}  // namespace native
