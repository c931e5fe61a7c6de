// An emulator of the AMX instructions, for processors without them: it answers the signal of an undefined instruction.
//
// It reads the bytes of each instruction, so that what is tested is what the compiled kernels contain, and it shares
// no code with the kernels' own model of the tiles. Call install() once; count(i) returns how often an instruction
// ran.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct Tile {
  int rows = 0, row_bytes = 0;
  unsigned char data[16][64] = {};
};

thread_local Tile tiles[8];
thread_local bool configured = false;

enum Count { kConfigure, kRelease, kZero, kLoad, kStore, kMultiply, kCounts };
long counts[kCounts];  // not atomic: exact on one thread alone

// The registers of the x86 encoding, in the order of their numbers.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// The memory operand of an instruction: its address without the index, the index, and the number of bytes after ModRM.
struct Memory {
  std::uint64_t base, index;
  int length;
};

Memory decode_memory(const unsigned char* modrm, bool extend_index, bool extend_base, const ucontext_t* context,
                     std::uint64_t next_instruction_without_displacement) {
  const auto value = [&](int number) {
    return static_cast<std::uint64_t>(context->uc_mcontext.gregs[kRegisters[number]]);
  };
  const int mode = modrm[0] >> 6, rm = modrm[0] & 7;
  Memory memory{0, 0, 0};
  int base = rm, displacement_bytes = mode == 1 ? 1 : mode == 2 ? 4 : 0;
  bool has_base = true;
  if (rm == 4) {  // a SIB byte
    const int scale = modrm[1] >> 6, index = (modrm[1] >> 3 & 7) | (extend_index ? 8 : 0);
    base = modrm[1] & 7;
    memory.length = 1;
    if (index != 4) memory.index = value(index) << scale;
    if (base == 5 && mode == 0) has_base = false, displacement_bytes = 4;
  } else if (rm == 5 && mode == 0) {  // relative to the next instruction
    std::int32_t displacement;
    std::memcpy(&displacement, modrm + 1, 4);
    return {next_instruction_without_displacement + 4 + displacement, 0, 4};
  }
  if (has_base) memory.base = value(base | (extend_base ? 8 : 0));
  if (displacement_bytes == 1) memory.base += static_cast<std::int8_t>(modrm[1 + memory.length]);
  if (displacement_bytes == 4) {
    std::int32_t displacement;
    std::memcpy(&displacement, modrm + 1 + memory.length, 4);
    memory.base += displacement;
  }
  memory.length += displacement_bytes;
  return memory;
}

float value_of(std::uint16_t bfloat16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

std::uint16_t half_at(const Tile& tile, int row, int i) {
  std::uint16_t half;
  std::memcpy(&half, tile.data[row] + 2 * i, 2);
  return half;
}

// TDPBF16PS, number by number.
[[gnu::noinline]] void multiply(Tile& sum, const Tile& x, const Tile& y) {
  for (int m = 0; m < sum.rows; ++m)
    for (int n = 0; n < sum.row_bytes / 4; ++n) {
      volatile float even = 0.0f, odd = 0.0f;
      for (int k = 0; k < y.rows; ++k) {
        even = std::fma(value_of(half_at(x, m, 2 * k)), value_of(half_at(y, k, 2 * n)), even);
        odd = std::fma(value_of(half_at(x, m, 2 * k + 1)), value_of(half_at(y, k, 2 * n + 1)), odd);
      }
      volatile float both = even + odd;
      float total;
      std::memcpy(&total, sum.data[m] + 4 * n, 4);
      volatile float result = total + both;
      total = result;
      std::memcpy(sum.data[m] + 4 * n, &total, 4);
    }
}

void fail(const char* message) {
  // write() may be called in a handler of a signal; what it returns changes nothing any more
  if (write(2, message, std::strlen(message)) < 0) std::abort();
  std::abort();
}

#define CHECK(condition) \
  if (!(condition)) fail("tile emulator: " #condition "\n")

void handle(int, siginfo_t*, void* state) {
  auto* context = static_cast<ucontext_t*>(state);
  greg_t& rip = context->uc_mcontext.gregs[REG_RIP];
  const auto* code = reinterpret_cast<const unsigned char*>(rip);
  CHECK(code[0] == 0xC4);        // a VEX prefix of three bytes
  CHECK((code[1] & 0x1F) == 2);  // the map 0F38
  CHECK((code[2] & 0x84) == 0);  // W0, 128 bits
  const bool extend_index = !(code[1] & 0x40), extend_base = !(code[1] & 0x20);
  const int prefix = code[2] & 3, opcode = code[3], modrm = code[4];  // prefix: none, 66, F3, F2
  const int source = ~(code[2] >> 3) & 15, destination = modrm >> 3 & 7, rm = modrm & 7;
  const bool is_register = modrm >> 6 == 3;
  int length = 5;
  const auto memory = [&] {
    const Memory m = decode_memory(code + 4, extend_index, extend_base, context, rip + 5);
    length += m.length;
    return m;
  };
  const unsigned control = _mm_getcsr();
  if (opcode == 0x49 && prefix == 0 && is_register) {  // TILERELEASE
    for (Tile& tile : tiles) tile = Tile{};
    configured = false;
    ++counts[kRelease];
  } else if (opcode == 0x49 && prefix == 0) {  // LDTILECFG
    const Memory m = memory();
    const auto* bytes = reinterpret_cast<const unsigned char*>(m.base + m.index);
    CHECK(bytes[0] == 1 && bytes[1] == 0);
    for (int i = 2; i < 16; ++i) CHECK(bytes[i] == 0);
    for (int i = 0; i < 16; ++i) {
      const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
      CHECK(i < 8 ? rows <= 16 && row_bytes <= 64 : rows == 0 && row_bytes == 0);
      if (i < 8) tiles[i] = Tile{rows, row_bytes, {}};
    }
    configured = true;
    ++counts[kConfigure];
  } else if (opcode == 0x49 && prefix == 3 && is_register) {  // TILEZERO
    CHECK(configured && tiles[destination].rows);
    std::memset(tiles[destination].data, 0, sizeof tiles[destination].data);
    ++counts[kZero];
  } else if (opcode == 0x4B && (prefix == 3 || prefix == 2) && !is_register) {  // TILELOADD, TILESTORED
    CHECK(configured && tiles[destination].rows && rm == 4);
    Tile& tile = tiles[destination];
    const Memory m = memory();
    if (prefix == 3) std::memset(tile.data, 0, sizeof tile.data);
    for (int row = 0; row < tile.rows; ++row) {
      auto* place = reinterpret_cast<unsigned char*>(m.base + row * m.index);
      if (prefix == 3)
        std::memcpy(tile.data[row], place, tile.row_bytes);
      else
        std::memcpy(place, tile.data[row], tile.row_bytes);
    }
    ++counts[prefix == 3 ? kLoad : kStore];
  } else if (opcode == 0x5C && prefix == 2 && is_register) {  // TDPBF16PS
    CHECK(configured && source < 8 && destination != rm && destination != source && rm != source);
    Tile &sum = tiles[destination], &x = tiles[rm], &y = tiles[source];
    CHECK(sum.rows && x.rows == sum.rows && x.row_bytes == 4 * y.rows && y.row_bytes == sum.row_bytes);
    _mm_setcsr(0x9FC0);  // to nearest even, no exceptions, denormals are zero on both sides
    multiply(sum, x, y);
    ++counts[kMultiply];
  } else {
    fail("tile emulator: an instruction that is none of AMX\n");
  }
  _mm_setcsr(control);
  rip += length;
}

}  // namespace

extern "C" int install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, nullptr);
}

extern "C" long count(int i) { return counts[i]; }
