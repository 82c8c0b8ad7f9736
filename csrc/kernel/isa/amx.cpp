// AVX-512 with BF16, VBMI, VNNI and AMX tiles of bf16 and int8: Sapphire Rapids on.
#include "kernel/vec_avx512.h"
// The vector interface comes first: everything below is written over it.
#include "kernel/gemm_amx.h"
#include "cpu/features.h"

namespace hetero {

extern const KernelTable kernel_table_amx;
constexpr KernelTable kernel_table_amx = make_amx_table("amx", kFeatureAvx512 | kFeatureAvx512Bf16 | kFeatureAmx);

}  // namespace hetero
