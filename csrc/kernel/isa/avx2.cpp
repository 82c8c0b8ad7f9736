// AVX2 + FMA: Haswell and Zen on.
#include "kernel/vec_avx2.h"
// The vector interface comes first: everything below is written over it.
#include "kernel/gemm.h"
#include "kernel/elementwise.h"
#include "cpu/features.h"

namespace hetero {

extern const KernelTable kernel_table_avx2;
constexpr KernelTable kernel_table_avx2 = make_kernel_table("avx2", kFeatureAvx2);

}  // namespace hetero
