#include "cpu/features.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hetero {
namespace {

// A process must ask for the tiles' 8 KiB of state before it touches them (Linux 5.16); an older kernel refuses.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

uint32_t detect() {
  uint32_t found = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= kFeatureAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found |= kFeatureAvx512;
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
    found |= kFeatureAvx512Bf16;
  const bool amx = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8");
  if (amx_is_emulated() || (amx && may_use_tiles())) found |= kFeatureAmx;
  return found;
}

}  // namespace

uint32_t cpu_features() {
  static const uint32_t found = detect();
  return found;
}

bool amx_is_emulated() { return dlsym(RTLD_DEFAULT, "hetero_glm5_emulates_amx") != nullptr; }

}  // namespace hetero
