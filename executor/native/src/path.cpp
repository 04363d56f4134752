// One path: compiled once for each set of instructions, which its flags and a PATH_ name say.
#include "attention.hpp"
#include "delta.hpp"
#include "experts.hpp"
#include "latent.hpp"
#include "choices.hpp"
#include "rows.hpp"

namespace {

constexpr int64_t READ_AHEAD = 16 << 10;  // bytes; far enough for the memory to be kept busy
constexpr int64_t COPY_AHEAD = 1 << 10;

uint64_t read_lines(const char* from, int64_t num_bytes) {
    typedef uint64_t Line __attribute__((vector_size(64)));
    constexpr int LINES = 4;
    Line all[LINES] = {};
    for (int64_t i = 0; i + 64 * LINES <= num_bytes; i += 64 * LINES) {
        UNROLL
        for (int line = 0; line < LINES; ++line) {
            const char* address = from + i + 64 * line;
            prefetch(address + READ_AHEAD);
            Line here;
            std::memcpy(&here, address, sizeof here);
            all[line] ^= here;
        }
    }
    uint64_t word = 0;
    for (const Line& line : all) {
        for (int w = 0; w < 8; ++w) word ^= line[w];
    }
    return word;
}

// What is written past the caches is not read first, as a line that is written in parts is.
void copy_past_caches(char* to, const char* from, int64_t num_bytes) {
    const int64_t before = -reinterpret_cast<uintptr_t>(to) % 64;
    const int64_t first = before < num_bytes ? before : num_bytes;
    std::memcpy(to, from, first);
    int64_t i = first;
    for (; i + 256 <= num_bytes; i += 256) {
        UNROLL
        for (int line = 0; line < 256; line += 64) {
            prefetch(from + i + line + COPY_AHEAD);
            stream_line(to + i + line, from + i + line);
        }
    }
    for (; i + 64 <= num_bytes; i += 64) stream_line(to + i, from + i);
    streamed();
    std::memcpy(to + i, from + i, num_bytes - i);
}

void arrange_rows(const void* x, int64_t stride, const int32_t* rows, int count, int64_t width, void* to) {
    const Bf16* tokens[TILE];
    for (int t = 0; t < count; ++t) tokens[t] = static_cast<const Bf16*>(x) + (rows ? rows[t] : t) * stride;
    arrange(tokens, count, width, static_cast<Bf16*>(to));
}

}  // namespace

namespace native {

#if defined(PATH_AMX)
#define PATH amx_path
#define PATH_NAME "amx"
#elif defined(PATH_AVX512_BF16)
#define PATH avx512_bf16_path
#define PATH_NAME "avx512-bf16"
#elif defined(PATH_AVX512)
#define PATH avx512_path
#define PATH_NAME "avx512"
#elif defined(PATH_AVX2)
#define PATH avx2_path
#define PATH_NAME "avx2"
#else
#define PATH portable_path
#define PATH_NAME "portable"
#endif

const Path PATH = {
    PATH_NAME,
    codes_named,
#ifdef PATH_AMX
    LEAST_TILED,
#else
    0,
#endif
    arrange_rows,
    {attend<Bf16>, attend<Fp16>, attend<float>},
    {attend_latent<Bf16>, attend_latent<Fp16>, attend_latent<float>},
    {absorb<Bf16>, absorb<Fp16>, absorb<float>},
    {delta_step<Bf16>, delta_step<Fp16>, delta_step<float>},
    merge_states,
    {finish<Bf16>, finish<Fp16>, finish<float>},
    {gate<Bf16>, gate<Fp16>, gate<float>},
    {project<Bf16>, project<Fp16>, project<float>},
    {linear<Bf16>, linear<Fp16>, linear<float>},
    {rms_norm<Bf16>, rms_norm<Fp16>, rms_norm<float>},
    {rotate<Bf16>, rotate<Fp16>, rotate<float>},
    {add<Bf16>, add<Fp16>, add<float>},
    {choose_experts<Bf16>, choose_experts<Fp16>, choose_experts<float>},
    {greatest<Bf16>, greatest<Fp16>, greatest<float>},
    read_lines,
    copy_past_caches,
};

#ifdef PATH_PORTABLE
const Path portable_tiles_path = [] {
    Path path = portable_path;
    path.name = "portable-tiles";
    path.least_tiled = LEAST_TILED;
    return path;
}();
#endif

}  // namespace native
