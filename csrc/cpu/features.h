// CPU features the kernels ask for, as bits. A bit is set only if the operating system saves the registers too.
#pragma once
#include <cstdint>

namespace hetero {

enum Feature : uint32_t {
  kFeatureAvx2 = 1,        // AVX2 + FMA
  kFeatureAvx512 = 2,      // F, BW, VL, DQ
  kFeatureAvx512Bf16 = 4,  // BF16 + VBMI + VNNI
  kFeatureAmx = 8,         // AMX tiles, BF16, INT8
};

uint32_t cpu_features();  // the first call asks Linux for AMX's registers, for the whole process
// Whether AMX is there only because a library of this process emulates it: one that exports `hetero_glm5_emulates_amx`.
bool amx_is_emulated();

}  // namespace hetero
