// AMX's tile instructions for processors without them: each raises SIGILL, and the handler does what the instruction
// would do and goes on after it. As Intel's Software Developer's Manual, volume 2, describes them; what a processor
// would refuse ends the program. To be loaded before all else.
#include <ucontext.h>

#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

constexpr int TILES = 8, ROWS = 16, ROW_BYTES = 64;

struct Tiles {
    bool configured;
    int rows[TILES], row_bytes[TILES];
    uint8_t data[TILES][ROWS][ROW_BYTES];
};
thread_local Tiles tiles;
long products;

[[noreturn]] void refuse(const char* why) {
    std::fprintf(stderr, "FAILED: %s\n", why);
    std::_Exit(1);
}

void require(bool is_so, const char* why) {
    if (!is_so) refuse(why);
}

template <typename T>
T at(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Numbers too small to be normal are noughts.
float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

// LDTILECFG: palette 1 says how many rows each tile has, and how many bytes a row.
void configure(const uint8_t* from) {
    require(from[0] == 1 && from[1] == 0, "a palette other than 1, or rows to start from");
    for (int i = 2; i < 64; ++i) {
        const bool is_size = (i >= 16 && i < 32) || (i >= 48 && i < 56);
        require(is_size || from[i] == 0, "a reserved byte of the configuration is set");
    }
    std::memset(&tiles, 0, sizeof tiles);
    tiles.configured = true;
    for (int i = 0; i < TILES; ++i) {
        tiles.row_bytes[i] = at<uint16_t>(from + 16 + 2 * i);
        tiles.rows[i] = from[48 + i];
        require(tiles.row_bytes[i] <= ROW_BYTES && tiles.rows[i] <= ROWS, "a tile is too large");
        require(!tiles.row_bytes[i] == !tiles.rows[i], "a tile has rows without columns, or none with");
    }
}

// Bfloat16s as they lie in a tile's row.
using Numbers = float[ROWS][ROW_BYTES / 2];

void widen(int tile, Numbers& numbers) {
    for (int row = 0; row < ROWS; ++row) {
        for (int i = 0; i < ROW_BYTES / 2; ++i) {
            const uint32_t bits = static_cast<uint32_t>(at<uint16_t>(tiles.data[tile][row] + 2 * i)) << 16;
            numbers[row][i] = flushed(at<float>(&bits));
        }
    }
}

// TDPBF16PS: pairs of each row of `a` with those of each column of `b`, in two sums that are added in the end.
void add_products(int c, int a, int b) {
    require(a != b && b != c && a != c, "a product of the same tiles");
    require(tiles.rows[a] == tiles.rows[c] && tiles.row_bytes[b] == tiles.row_bytes[c], "tiles do not match");
    require(tiles.row_bytes[a] == 4 * tiles.rows[b], "tiles do not match");
    Numbers first, second;
    widen(a, first), widen(b, second);
    for (int row = 0; row < tiles.rows[c]; ++row) {
        float sums[ROW_BYTES / 2] = {};
        for (int pair = 0; pair < tiles.rows[b]; ++pair) {
            for (int i = 0; i < ROW_BYTES / 2; ++i) {
                sums[i] = flushed(std::fmaf(first[row][2 * pair + i % 2], second[pair][i], sums[i]));
            }
        }
        for (int column = 0; column < tiles.row_bytes[c] / 4; ++column) {
            uint8_t* const to = tiles.data[c][row] + 4 * column;
            const float both = flushed(sums[2 * column] + sums[2 * column + 1]);
            const float sum = flushed(flushed(at<float>(to)) + both);
            std::memcpy(to, &sum, sizeof sum);
        }
    }
    __atomic_fetch_add(&products, 1, __ATOMIC_RELAXED);
}

// A VEX instruction: its prefix, opcode and operands.
struct Instruction {
    int prefix, opcode, mode, reg, rm, vvvv;  // of the modrm byte `mode`, `reg` and `rm`
    uint8_t* address;                         // of its memory, or null
    int64_t stride;                           // its index register, scaled
    const uint8_t* next;

    static Instruction read(const greg_t* registers) {
        static const int ORDER[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
        const bool is_tile = bytes[0] == 0xc4 && (bytes[1] & 0x9f) == 0x82 && (bytes[2] & 0x84) == 0;
        require(is_tile, "an instruction that is none of tiles");
        Instruction made{bytes[2] & 3, bytes[3], bytes[4] >> 6, bytes[4] >> 3 & 7, bytes[4] & 7,
                         ~bytes[2] >> 3 & 15, nullptr, 0, bytes + 5};
        if (made.mode == 3) return made;
        const int high_index = bytes[1] & 0x40 ? 0 : 8, high_base = bytes[1] & 0x20 ? 0 : 8;
        int base = made.rm;
        if (made.rm == 4) {
            const uint8_t sib = *made.next++;
            const int index = (sib >> 3 & 7) + high_index;
            made.stride = index == 4 ? 0 : static_cast<int64_t>(registers[ORDER[index]]) << (sib >> 6);
            base = sib & 7;
        }
        const bool is_far = made.mode == 2 || (made.mode == 0 && base == 5), has_base = made.mode != 0 || base != 5;
        const int64_t offset = is_far ? at<int32_t>(made.next) : made.mode == 1 ? static_cast<int8_t>(*made.next) : 0;
        made.next += is_far ? 4 : made.mode;
        const int64_t after = made.rm == 5 && !has_base ? reinterpret_cast<int64_t>(made.next) : 0;
        const int64_t from = has_base ? registers[ORDER[base + high_base]] : after;
        made.address = reinterpret_cast<uint8_t*>(from + offset);
        return made;
    }
};

void run(const Instruction& made) {
    enum { NONE, P66, PF3, PF2 };
    const bool in_memory = made.address != nullptr;
    if (made.opcode == 0x49 && made.prefix == NONE && in_memory) {
        configure(made.address + made.stride);
        return;
    }
    require(tiles.configured, "tiles are not configured");
    const auto exists = [](int tile) { require(tile < TILES && tiles.rows[tile] > 0, "a tile that has no rows"); };
    if (made.opcode == 0x49 && made.prefix == NONE) {  // TILERELEASE
        tiles.configured = false;
        return;
    }
    exists(made.reg);
    auto& tile = tiles.data[made.reg];
    if (made.opcode == 0x49 && made.prefix == PF2 && !in_memory) {  // TILEZERO
        std::memset(tile, 0, sizeof tile);
    } else if (made.opcode == 0x4b && in_memory) {
        require(made.rm == 4, "no stride");
        const bool stores = made.prefix == PF3;  // else TILELOADD, or TILELOADDT1
        if (!stores) std::memset(tile, 0, sizeof tile);
        for (int row = 0; row < tiles.rows[made.reg]; ++row) {
            uint8_t* const there = made.address + row * made.stride;
            std::memcpy(stores ? there : tile[row], stores ? tile[row] : there, tiles.row_bytes[made.reg]);
        }
    } else if (made.opcode == 0x5c && made.prefix == PF3 && !in_memory) {
        exists(made.rm), exists(made.vvvv);
        add_products(made.reg, made.rm, made.vvvv);
    } else {
        refuse("an instruction of tiles that nobody uses");
    }
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
    greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const Instruction made = Instruction::read(registers);
    run(made);
    registers[REG_RIP] = reinterpret_cast<greg_t>(made.next);
}

__attribute__((constructor)) void listen() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
}

__attribute__((destructor)) void tell() { std::printf("%ld products of tiles in software\n", products); }

}  // namespace
