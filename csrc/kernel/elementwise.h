// What surrounds the GEMM, written once over the vector interface: SiLU(gate) * up, y += w * sums, and the table of it all.
//
// exp: x = n ln2 + r, |r| <= ln2 / 2, n by adding and subtracting 1.5 * 2^23; e^r by the Cephes degree-6 polynomial (2 ulp);
// 2^n added into the exponent. The argument is clamped to where the result is normal. Only fused and correctly rounded
// operations in a fixed order, so every ISA gives the same bits. silu(g) = g / (1 + e^-g): a NaN in g survives.
#pragma once
#include "kernel/gemm.h"
#include "kernel/gemm_int.h"
#include "kernel/packed_inputs.h"
#include "kernel/quantize.h"

namespace hetero {
namespace {

inline F32 exp(F32 x) {
  constexpr float kShift = 12582912.f;
  x = min(max(x, set1(-87.f)), set1(88.f));
  const F32 shifted = fma(x, set1(1.44269504088896341f), set1(kShift));
  const F32 n = sub(shifted, set1(kShift));
  const F32 r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  F32 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1)));
  return scale_exp2(p, shifted);
}

inline F32 silu(F32 g) { return div(g, add(set1(1), exp(sub(set1(0), g)))); }

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
          &silu_mul, &add_rows};
}

}  // namespace
}  // namespace hetero
