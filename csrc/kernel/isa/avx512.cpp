// AVX-512 F, BW, VL, DQ: Skylake-X on; bf16 and E4M3 are widened to fp32, bytes to 16 bits.
#include "kernel/vec_avx512.h"
// The vector interface comes first: everything below is written over it.
#include "kernel/gemm.h"
#include "kernel/elementwise.h"
#include "cpu/features.h"

namespace hetero {

extern const KernelTable kernel_table_avx512;
constexpr KernelTable kernel_table_avx512 = make_kernel_table("avx512", kFeatureAvx512);

}  // namespace hetero
