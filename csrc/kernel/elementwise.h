// What surrounds the GEMM, written once over the vector interface: SiLU(gate) * up, y += w * sums, and the table of it all.
#pragma once
#include "kernel/exp.h"
#include "kernel/gemm.h"
#include "kernel/gemm_int.h"
#include "kernel/packed_inputs.h"
#include "kernel/quantize.h"
#include "kernel/rows.h"

namespace hetero {
namespace {

inline void silu_mul(const SiluMulArgs& args) {
  const SiluMulArgs a = args;
  for (int r = 0; r < a.rows; r++)
    for (int i = 0; i < kTileRows; i += kLanes)
      store(a.out + r * a.stride + i, mul(silu(load(a.gate + r * kTileRows + i)), load(a.up + r * kTileRows + i)));
}

inline void add_rows(const AddRowsArgs& args) {
  const AddRowsArgs a = args;
  for (int r = 0; r < a.rows; r++) {
    const F32 weight = set1(a.weights[r]);
    const float* sums = a.sums + r * kTileRows;
    float some[kTileRows] = {}, *y = a.y + a.tokens[r] * a.stride, *sum = a.cols == kTileRows ? y : some;
    if (sum == some) for (int i = 0; i < a.cols; i++) some[i] = y[i];
    for (int i = 0; i < kTileRows; i += kLanes) store(sum + i, fma(weight, load(sums + i), load(sum + i)));
    if (sum == some) for (int i = 0; i < a.cols; i++) y[i] = some[i];
  }
}

template <class F> constexpr FormatKernels kFormatKernels = {&pack<F>, &gemm<F>, nullptr};
template <IntegerFormat F> constexpr FormatKernels kFormatKernels<F> = {&pack_int8<F>, &gemm_int<F>, &quantize<F>};

constexpr KernelTable make_kernel_table(const char* name, uint32_t needs) {
  return {name, needs,
          {kFormatKernels<Fp32>, kFormatKernels<Bf16>, kFormatKernels<Fp8>, kFormatKernels<Int8>, kFormatKernels<Int4>},
          &silu_mul, &add_rows, kRowKernels};
}

}  // namespace
}  // namespace hetero
