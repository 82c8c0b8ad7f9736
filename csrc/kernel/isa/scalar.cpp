// Plain C++ at the x86-64 baseline: runs everywhere, specifies everything.
#include "kernel/vec_scalar.h"
// The vector interface comes first: everything below is written over it.
#include "kernel/gemm.h"
#include "kernel/elementwise.h"
#include "cpu/features.h"

namespace hetero {

extern const KernelTable kernel_table_scalar;
constexpr KernelTable kernel_table_scalar = make_kernel_table("scalar", 0);

}  // namespace hetero
