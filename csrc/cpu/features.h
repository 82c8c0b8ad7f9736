// CPU features the kernels ask for, as bits. A bit is set only if the operating system saves the registers too.
#pragma once
#include <cstdint>

namespace hetero {

enum Feature : uint32_t {
  kFeatureAvx2 = 1,        // AVX2 + FMA
  kFeatureAvx512 = 2,      // F, BW, VL, DQ
  kFeatureAvx512Bf16 = 4,  // BF16 + VBMI + VNNI
};

uint32_t cpu_features();

}  // namespace hetero
