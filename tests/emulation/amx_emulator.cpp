// AMX (tiles, BF16, INT8) on a machine without it: an illegal instruction traps, is decoded, done on a tile state per thread,
// and stepped over. Everything else runs natively; CPUID tells the truth. For LD_PRELOAD, in tests only: a trap takes
// microseconds. What a processor would refuse ends the process, with a word on stderr.
//
// It must own SIGILL: python's faulthandler takes it away (pytest -p no:faulthandler).
//
//   c++ -O3 -mavx512f -shared -fPIC amx_emulator.cpp -o libamx.so
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tiles {
  uint8_t palette, start_row;
  uint16_t row_bytes[kTiles];
  uint8_t rows[kTiles];
  alignas(64) uint8_t data[kTiles][kRows][kRowBytes];
};
__attribute__((tls_model("initial-exec"))) thread_local Tiles tiles;

struct TileConfig {  // as in memory
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

const char* const kNames[] = {"ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored",
                              "tdpbf16ps", "tdpbssd",   "tdpbsud",     "tdpbusd",  "tdpbuud"};
enum Kind { kLoadConfig, kStoreConfig, kRelease, kZero, kLoad, kLoadT1, kStore, kBf16, kSS, kSU, kUS, kUU, kKinds, kNone };
std::atomic<uint64_t> counts[kKinds];

struct Instruction {
  Kind kind;
  const uint8_t* end;
  int reg, rm, vvvv;          // tile numbers
  uint64_t address, stride;   // of a memory operand: everything but the index, and the scaled index
};

Kind kind_of(int opcode, int pp, int modrm) {
  const bool memory = modrm >> 6 != 3, sib = memory && (modrm & 7) == 4;
  switch (opcode) {
    case 0x49:
      if (memory) return modrm >> 3 & 7 ? kNone : pp == 0 ? kLoadConfig : pp == 1 ? kStoreConfig : kNone;
      return pp == 0 && modrm == 0xc0 ? kRelease : pp == 3 && (modrm & 7) == 0 ? kZero : kNone;
    case 0x4b: return !sib ? kNone : pp == 3 ? kLoad : pp == 1 ? kLoadT1 : pp == 2 ? kStore : kNone;
    case 0x5c: return !memory && pp == 2 ? kBf16 : kNone;
    case 0x5e: return memory ? kNone : pp == 3 ? kSS : pp == 2 ? kSU : pp == 1 ? kUS : kUU;
    default: return kNone;
  }
}

template <class T> T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Three-byte VEX, map 0F38, W = 0, L = 0. kNone: something else.
Instruction decode(const uint8_t* p, const greg_t* registers) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  Instruction i = {};
  i.kind = kNone;
  if (p[0] != 0xc4 || (p[1] & 31) != 2 || (p[2] & 0x84) != 0) return i;
  const int r = ~p[1] >> 7 & 1, x = ~p[1] >> 6 & 1, b = ~p[1] >> 5 & 1, modrm = p[4], mod = modrm >> 6;
  i.kind = kind_of(p[3], p[2] & 3, modrm);
  i.reg = (modrm >> 3 & 7) | r << 3, i.rm = (modrm & 7) | b << 3, i.vvvv = ~p[2] >> 3 & 15;
  i.end = p + 5;
  if (mod == 3) return i;
  const auto value = [&](int number) { return static_cast<uint64_t>(registers[order[number]]); };
  bool based = true;
  int base = i.rm;
  if ((modrm & 7) == 4) {
    const int sib = *i.end++, index = (sib >> 3 & 7) | x << 3;
    base = (sib & 7) | b << 3;
    based = !(mod == 0 && (sib & 7) == 5);
    if (index != 4) i.stride = value(index) << (sib >> 6);
  } else if (mod == 0 && (modrm & 7) == 5) {  // relative to what follows the displacement
    i.address = reinterpret_cast<uint64_t>(i.end + 4) + read<int32_t>(i.end);
    i.end += 4;
    return i;
  }
  if (based) i.address = value(base);
  if (mod == 1) i.address += read<int8_t>(i.end), i.end += 1;
  if (mod == 2 || !based) i.address += read<int32_t>(i.end), i.end += 4;
  return i;
}

bool is_tile(int t) { return tiles.palette == 1 && t < kTiles && tiles.rows[t] != 0; }

bool load_config(const uint8_t* from) {
  const auto c = read<TileConfig>(from);
  static const uint8_t zeros[16] = {};
  if (c.palette > 1) return false;
  Tiles fresh = {};
  if (c.palette == 1) {
    if (std::memcmp(c.reserved, zeros, sizeof c.reserved) != 0 || std::memcmp(c.row_bytes + kTiles, zeros, 16) != 0 ||
        std::memcmp(c.rows + kTiles, zeros, 8) != 0)
      return false;
    for (int t = 0; t < kTiles; t++)
      if (c.rows[t] > kRows || c.row_bytes[t] > kRowBytes || (c.rows[t] == 0) != (c.row_bytes[t] == 0)) return false;
    fresh.palette = 1, fresh.start_row = c.start_row;
    std::memcpy(fresh.row_bytes, c.row_bytes, sizeof fresh.row_bytes);
    std::memcpy(fresh.rows, c.rows, sizeof fresh.rows);
  }
  tiles = fresh;
  return true;
}

void store_config(uint8_t* to) {
  TileConfig c = {};
  c.palette = tiles.palette, c.start_row = tiles.start_row;
  std::memcpy(c.row_bytes, tiles.row_bytes, sizeof tiles.row_bytes);
  std::memcpy(c.rows, tiles.rows, sizeof tiles.rows);
  std::memcpy(to, &c, sizeof c);
}

bool move_rows(const Instruction& i) {
  if (!is_tile(i.reg) || tiles.row_bytes[i.reg] % 4 != 0 || tiles.start_row >= tiles.rows[i.reg]) return false;
  auto& tile = tiles.data[i.reg];
  if (i.kind != kStore) std::memset(tile[tiles.start_row], 0, (kRows - tiles.start_row) * kRowBytes);
  for (int r = tiles.start_row; r < tiles.rows[i.reg]; r++) {
    auto* memory = reinterpret_cast<uint8_t*>(i.address + r * i.stride);
    if (i.kind == kStore) std::memcpy(memory, tile[r], tiles.row_bytes[i.reg]);
    else std::memcpy(tile[r], memory, tiles.row_bytes[i.reg]);
  }
  tiles.start_row = 0;
  return true;
}

template <class A, class B> void dot_bytes(int c, int a, int b) {
  for (int m = 0; m < tiles.rows[c]; m++) {
    uint32_t sums[16];
    std::memcpy(sums, tiles.data[c][m], sizeof sums);
    for (int k = 0; k < tiles.rows[b]; k++)
      for (int n = 0; n < 16; n++)
        for (int j = 0; j < 4; j++)
          sums[n] += static_cast<uint32_t>(static_cast<A>(tiles.data[a][m][4 * k + j]) * static_cast<B>(tiles.data[b][k][4 * n + j]));
    std::memcpy(tiles.data[c][m], sums, sizeof sums);
  }
}

// From zero, even and odd columns apart, by FMA; then their sum; then C. noinline: no operation may leave the rounding mode.
__attribute__((noinline)) void dot_bf16(int c, int a, int b) {
  for (int m = 0; m < tiles.rows[c]; m++) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < tiles.rows[b]; k++) {
      const __m512i x = _mm512_set1_epi32(read<int32_t>(tiles.data[a][m] + 4 * k)), w = _mm512_load_si512(tiles.data[b][k]);
      const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
      const auto low = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
      const auto high = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
      even = _mm512_fmadd_ps(low(x), low(w), even);
      odd = _mm512_fmadd_ps(high(x), high(w), odd);
    }
    auto* sums = reinterpret_cast<float*>(tiles.data[c][m]);
    _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), _mm512_add_ps(even, odd)));
  }
}

bool multiply(const Instruction& i) {
  const int c = i.reg, a = i.rm, b = i.vvvv;
  if (!is_tile(c) || !is_tile(a) || !is_tile(b) || c == a || c == b || a == b) return false;
  const uint16_t* bytes = tiles.row_bytes;
  if (bytes[a] % 4 != 0 || bytes[b] % 4 != 0 || bytes[c] != bytes[b]) return false;
  if (tiles.rows[c] != tiles.rows[a] || bytes[a] / 4 != tiles.rows[b]) return false;
  if (i.kind == kBf16) {
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(0x9fc0);  // to nearest, subnormals are zero on the way in and out, no exceptions
    dot_bf16(c, a, b);
    _mm_setcsr(mode);
  }
  if (i.kind == kSS) dot_bytes<int8_t, int8_t>(c, a, b);
  if (i.kind == kSU) dot_bytes<int8_t, uint8_t>(c, a, b);
  if (i.kind == kUS) dot_bytes<uint8_t, int8_t>(c, a, b);
  if (i.kind == kUU) dot_bytes<uint8_t, uint8_t>(c, a, b);
  for (int m = 0; m < kRows; m++) {  // beyond the tile's shape there are zeros, whatever NaN x 0 made of them
    const int kept = m < tiles.rows[c] ? bytes[c] : 0;
    std::memset(tiles.data[c][m] + kept, 0, kRowBytes - kept);
  }
  tiles.start_row = 0;
  return true;
}

bool execute(const Instruction& i) {  // false: the processor would refuse
  auto* memory = reinterpret_cast<uint8_t*>(i.address + i.stride);
  switch (i.kind) {
    case kLoadConfig: return i.vvvv == 0 && load_config(memory);
    case kStoreConfig: store_config(memory); return i.vvvv == 0;
    case kRelease: tiles = {}; return i.vvvv == 0;
    case kZero:
      if (!is_tile(i.reg) || i.vvvv != 0) return false;
      std::memset(tiles.data[i.reg], 0, sizeof tiles.data[i.reg]);
      tiles.start_row = 0;
      return true;
    case kLoad:
    case kLoadT1:
    case kStore: return i.vvvv == 0 && move_rows(i);
    default: return multiply(i);
  }
}

void on_illegal(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  for (bool first = true;; first = false) {  // AMX instructions in a row cost one trap
    const Instruction i = decode(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
    if (i.kind == kNone && !first) return;
    if (i.kind == kNone || !execute(i)) break;
    counts[i.kind].fetch_add(1, std::memory_order_relaxed);
    registers[REG_RIP] = reinterpret_cast<greg_t>(i.end);
  }
  constexpr char sentence[] = "amx_emulator: an instruction that no processor with AMX would execute\n";
  (void)!write(2, sentence, sizeof sentence - 1);
  signal(SIGILL, SIG_DFL);  // and the instruction is run again
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  action.sa_sigaction = on_illegal;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" {

extern const int hetero_glm5_emulates_amx = 1;  // csrc/cpu/features.h looks for it

// How often this process ran that instruction so far; ~0 for a name that is none.
uint64_t amx_emulator_count(const char* name) {
  for (int i = 0; i < kKinds; i++)
    if (std::strcmp(name, kNames[i]) == 0) return counts[i].load();
  return ~uint64_t{0};
}
}
