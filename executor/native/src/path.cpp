// One path: compiled once for each set of instructions, which its flags and a PATH_ name say.
#include "attention.hpp"
#include "experts.hpp"

namespace {

constexpr int64_t READ_AHEAD = 16 << 10;  // bytes; far enough for the memory to be kept busy

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

}  // namespace

namespace native {

#if defined(PATH_AVX512_BF16)
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
    {attend<Bf16>, attend<Fp16>, attend<float>},
    merge_states,
    {finish<Bf16>, finish<Fp16>, finish<float>},
    {gate<Bf16>, gate<Fp16>, gate<float>},
    {project<Bf16>, project<Fp16>, project<float>},
    {linear<Bf16>, linear<Fp16>, linear<float>},
    read_lines,
};

}  // namespace native
