#include "cpu/probe.h"

#include <emmintrin.h>

#include <chrono>
#include <cstring>

#include "base/check.h"
#include "cpu/features.h"

namespace hetero {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void busy_wait(double seconds) {
  if (seconds <= 0) return;
  for (const auto start = Clock::now(); seconds_since(start) < seconds;) _mm_pause();
}

// The baseline never uses xmm16 to xmm31, so they are not named as clobbered (older compilers refuse the names).
#define LOW_REGISTERS \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15", "cc", "memory"
#define DO12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define DO24(X) DO12(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)

#define CLEAR_Z(n) "vpxord %%zmm" #n ",%%zmm" #n ",%%zmm" #n "\n\t"
#define CLEAR_Y(n) "vxorps %%ymm" #n ",%%ymm" #n ",%%ymm" #n "\n\t"
#define CLEAR_X(n) "xorps %%xmm" #n ",%%xmm" #n "\n\t"
#define VDPBF16PS(n) "vdpbf16ps %%zmm25,%%zmm24,%%zmm" #n "\n\t"
#define VPDPBUSD(n) "vpdpbusd %%zmm25,%%zmm24,%%zmm" #n "\n\t"
#define FMA_Z(n) "vfmadd231ps %%zmm25,%%zmm24,%%zmm" #n "\n\t"
#define FMA_Y(n) "vfmadd231ps %%ymm13,%%ymm12,%%ymm" #n "\n\t"
#define MUL_X(n) "mulps %%xmm12,%%xmm" #n "\n\t"

#define PEAK_LOOP(name, clear, body, end)                                                                 \
  void name(int64_t turns) {                                                                              \
    asm volatile(clear ".p2align 6\n1:\n\t" body "dec %0\n\tjnz 1b\n\t" end : "+r"(turns)::LOW_REGISTERS); \
  }
PEAK_LOOP(loop_vdpbf16ps, DO24(CLEAR_Z) CLEAR_Z(24) CLEAR_Z(25), DO24(VDPBF16PS), "vzeroupper")
PEAK_LOOP(loop_vpdpbusd, DO24(CLEAR_Z) CLEAR_Z(24) CLEAR_Z(25), DO24(VPDPBUSD), "vzeroupper")
PEAK_LOOP(loop_fma512, DO24(CLEAR_Z) CLEAR_Z(24) CLEAR_Z(25), DO24(FMA_Z), "vzeroupper")
PEAK_LOOP(loop_fma256, DO12(CLEAR_Y) CLEAR_Y(12) CLEAR_Y(13), DO12(FMA_Y), "vzeroupper")
PEAK_LOOP(loop_mulps, DO12(CLEAR_X) CLEAR_X(12), DO12(MUL_X), "")

// Six C tiles of zeros hide the latency of one pipe (52 cycles, one start every 16). The configuration stands in memory as ldtilecfg reads it.
struct alignas(64) FullTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr FullTiles kFullTiles;
#define DO6(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define TDPBF16PS(n) "tdpbf16ps %%tmm7,%%tmm6,%%tmm" #n "\n\t"
#define TDPBSUD(n) "tdpbsud %%tmm7,%%tmm6,%%tmm" #n "\n\t"
#define TILE_LOOP(name, body)                                                                                        \
  void name(int64_t turns) {                                                                                         \
    asm volatile("ldtilecfg %1\n\t.p2align 6\n1:\n\t" body "dec %0\n\tjnz 1b\n\ttilerelease"                        \
                 : "+r"(turns) : "m"(kFullTiles) : "cc", "memory");                                                  \
  }
TILE_LOOP(loop_tdpbf16ps, DO6(TDPBF16PS))
TILE_LOOP(loop_tdpbsud, DO6(TDPBSUD))

bool has(uint32_t features) { return (cpu_features() & features) == features; }

bool has_tiles() { return has(kFeatureAmx) && !amx_is_emulated(); }

constexpr Instruction kInstructions[] = {
    {"tdpbsud", 6 * 32768, loop_tdpbsud, has_tiles},
    {"tdpbf16ps", 6 * 16384, loop_tdpbf16ps, has_tiles},
    {"vpdpbusd", 24 * 128, loop_vpdpbusd, [] { return has(kFeatureAvx512) && __builtin_cpu_supports("avx512vnni"); }},
    {"vdpbf16ps", 24 * 64, loop_vdpbf16ps, [] { return has(kFeatureAvx512) && __builtin_cpu_supports("avx512bf16"); }},
    {"fma512", 24 * 32, loop_fma512, [] { return has(kFeatureAvx512); }},
    {"fma256", 12 * 16, loop_fma256, [] { return has(kFeatureAvx2); }},
    {"mulps", 12 * 4, loop_mulps, [] { return true; }},
};

constexpr int64_t kTurns = 10000;        // of one task: 30 us and more
constexpr int64_t kTasksPerThread = 64;  // whoever is slowed down by other work hands tasks over
constexpr int64_t kStream = 256 << 10;   // bytes of one of the four streams of a reading task
constexpr int64_t kChunk = 4 * kStream;

// Loads a chunk in four streams. The loads are asm volatile, so that none is left out, whether or not its value is used.
#define READ_LOOP(name, load, end)                                                                            \
  void name(const uint8_t* p) {                                                                               \
    const uint8_t* q = p + 2 * kStream;                                                                       \
    for (int64_t i = 0; i < kStream; i += 64)                                                                 \
      asm volatile(load(0) load(1) load(2) load(3)::"r"(p + i), "r"(p + kStream + i), "r"(q + i), "r"(q + kStream + i) \
                   : LOW_REGISTERS);                                                                          \
    asm volatile(end ::: "memory");                                                                           \
  }
#define LOAD_Z(n) "vmovdqa64 (%" #n "),%%zmm" #n "\n\t"
#define LOAD_Y(n) "vmovdqa (%" #n "),%%ymm" #n "\n\tvmovdqa 32(%" #n "),%%ymm" #n "\n\t"
#define LOAD_X(n) LOAD_X1(n, "") LOAD_X1(n, "16") LOAD_X1(n, "32") LOAD_X1(n, "48")
#define LOAD_X1(n, offset) "movdqa " offset "(%" #n "),%%xmm" #n "\n\t"
READ_LOOP(read_zmm, LOAD_Z, "vzeroupper")
READ_LOOP(read_ymm, LOAD_Y, "vzeroupper")
READ_LOOP(read_xmm, LOAD_X, "")

}  // namespace

std::vector<const Instruction*> instructions() {
  std::vector<const Instruction*> found;
  for (const Instruction& instruction : kInstructions)
    if (instruction.present()) found.push_back(&instruction);
  return found;
}

Roofs::Roofs(int threads, int64_t bytes)
    : pool_(group_threads(this_machine(), {}, threads)) {
  CHECK(bytes >= 0, "a probe cannot read ", bytes, " bytes");
  if (bytes == 0) return;
  memory_ = Arena((bytes + kChunk - 1) / kChunk * kChunk);
  // Untouched pages would all be one page of zeros, in cache.
  pool_.for_each(memory_.bytes() / kChunk, [&](int, int64_t i) { std::memset(memory_.data() + i * kChunk, 1, kChunk); });
}

double Roofs::read() {
  CHECK(bytes() > 0, "this probe has no memory to read");
  const auto read_chunk = has(kFeatureAvx512) ? read_zmm : has(kFeatureAvx2) ? read_ymm : read_xmm;
  const auto start = Clock::now();
  pool_.for_each(bytes() / kChunk, [&](int, int64_t i) { read_chunk(memory_.data() + i * kChunk); });
  return static_cast<double>(bytes()) / seconds_since(start);
}

double Roofs::peak(const std::string& name) {
  const Instruction* wanted = nullptr;
  std::string present;
  for (const Instruction* instruction : instructions()) {
    if (name == instruction->name) wanted = instruction;
    present += (present.empty() ? "" : ", ") + std::string(instruction->name);
  }
  CHECK(wanted != nullptr, "'", name, "' cannot be measured on this machine; present: ", present);
  const int64_t tasks = kTasksPerThread * threads();
  const auto start = Clock::now();
  pool_.for_each(tasks, [&](int, int64_t) { wanted->loop(kTurns); });
  return static_cast<double>(tasks * kTurns * wanted->ops) / seconds_since(start);
}

std::vector<double> time_fork_join(ThreadPool& pool, const ForkJoin& call, int calls) {
  std::vector<double> seconds(calls);
  for (double& s : seconds) {
    busy_wait(call.gap);
    const auto start = Clock::now();
    pool.for_each(call.tasks, [&](int, int64_t) { busy_wait(call.body); });
    s = seconds_since(start);
  }
  return seconds;
}

std::vector<HandOver> time_hand_over(JobQueue& queue, double gap, int calls) {
  struct Stamp : Job {
    Stamp() : Job([](Job& job) { static_cast<Stamp&>(job).at = Clock::now(); }) {}
    Clock::time_point at;
  } stamp;
  std::vector<HandOver> seconds(calls);
  for (HandOver& s : seconds) {
    busy_wait(gap);
    const auto start = Clock::now();
    queue.submit(stamp);
    stamp.wait();
    s.back = seconds_since(start);
    s.there = std::chrono::duration<double>(stamp.at - start).count();
  }
  return seconds;
}

}  // namespace hetero
