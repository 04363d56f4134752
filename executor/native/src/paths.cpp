#include "paths.hpp"

#include <stdexcept>

#ifdef WITH_AMX_PATH
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace native {
namespace {

#ifdef WITH_AMX_PATH
// Whether there are tiles of bfloat16, and the kernel lets this process use them: it has to be asked, as their
// registers make threads' states larger.
bool has_tiles() {
    constexpr unsigned BFLOAT16_TILES = 1u << 22, TILES = 1u << 24;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & BFLOAT16_TILES) == 0 || (d & TILES) == 0) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

// Intel's dot products of bfloat16 take two cycles each and so are slower than widening and AVX-512's
// multiply-adds; AMD's take one. What tiles do not multiply, the path with them does as AVX-512 does.
std::vector<const Path*> usable_paths() {
    std::vector<const Path*> usable;
#ifdef WITH_X86_PATHS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool avx512_bf16 =
        avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    if (avx512) usable.push_back(&avx512_path);
    if (avx512_bf16) usable.insert(__builtin_cpu_is("intel") ? usable.end() : usable.begin(), &avx512_bf16_path);
#ifdef WITH_AMX_PATH
    if (avx512_bf16 && has_tiles()) usable.insert(usable.begin(), &amx_path);
#endif
    if (avx2) usable.push_back(&avx2_path);
#endif
    usable.push_back(&portable_path);
    return usable;
}

}  // namespace

const std::vector<const Path*>& paths() {
    static const std::vector<const Path*> usable = usable_paths();
    return usable;
}

const Path& path_named(const std::string& name) {
    for (const Path* path : paths()) {
        if (name == path->name) return *path;
    }
    if (name == portable_tiles_path.name) return portable_tiles_path;
#ifdef WITH_AMX_PATH
    if (name == amx_path.name) return amx_path;
#endif
    throw std::invalid_argument("no such path on this processor: " + name);
}

}  // namespace native
