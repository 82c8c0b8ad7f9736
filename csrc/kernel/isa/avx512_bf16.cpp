// AVX-512 with BF16, VBMI and VNNI: Sapphire Rapids and Zen 4 on.
#include "kernel/vec_avx512.h"
// The vector interface comes first: everything below is written over it.
#include "kernel/gemm.h"
#include "kernel/elementwise.h"
#include "cpu/features.h"

namespace hetero {

extern const KernelTable kernel_table_avx512_bf16;
constexpr KernelTable kernel_table_avx512_bf16 = make_kernel_table("avx512_bf16", kFeatureAvx512 | kFeatureAvx512Bf16);

}  // namespace hetero
