// What surrounds the GEMM, written once over the vector interface: packing activations, SiLU(gate) * up, and y += w * sums.
//
// exp: x = n ln2 + r, |r| <= ln2 / 2, n by adding and subtracting 1.5 * 2^23; e^r by the Cephes degree-6 polynomial (2 ulp);
// 2^n added into the exponent. The argument is clamped to where the result is normal. Only fused and correctly rounded
// operations in a fixed order, so every ISA gives the same bits. silu(g) = g / (1 + e^-g): a NaN in g survives.
#pragma once
#include "format/bf16.h"
#include "format/fp32.h"
#include "format/fp8.h"
#include "kernel/kernels.h"
#include "kernel/token_blocks.h"

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

// 16 values as activation steps: 16 floats, or 8 bf16 pairs.
template <int step_k> inline void to_steps(F32 values, uint32_t* steps) {
  if constexpr (step_k == 1) store(reinterpret_cast<float*>(steps), values);
  else store_bf16(reinterpret_cast<uint16_t*>(steps), values);
}

inline F32 load_some(const void* x, bool is_bf16, int64_t at, int64_t count) {  // zeros from count on
  const auto* f = static_cast<const float*>(x) + at;
  const auto* h = static_cast<const uint16_t*>(x) + at;
  if (count >= 16) return is_bf16 ? load_bf16(h) : load(f);
  float some[16] = {};
  for (int64_t i = 0; i < count; i++) some[i] = is_bf16 ? as_float(uint32_t{h[i]} << 16) : f[i];
  return load(some);
}

template <class F> void pack(const PackArgs& args) {
  const PackArgs a = args;
  constexpr int kSteps = 16 / F::step_k;
  const TokenBlocks blocks(a.rows, block_tokens<F>);
  for (int b = 0; b < blocks.count; b++) {
    const int64_t width = blocks.width(b);
    for (int64_t j = 0; j < width; j++) {
      uint32_t* out = a.out + blocks.start(b) * a.steps + j;
      const int64_t row = a.tokens[blocks.start(b) + j] * a.cols;
      for (int64_t s = 0; s < a.steps; s += kSteps) {
        alignas(64) uint32_t steps[16];
        const int64_t k = s * F::step_k;
        to_steps<F::step_k>(load_some(a.x, a.x_is_bf16, row + k, a.cols - k), steps);
        for (int64_t i = 0; i < kSteps && s + i < a.steps; i++) out[(s + i) * width] = steps[i];
      }
    }
  }
}

template <class F> void silu_mul(const SiluMulArgs& args) {
  const SiluMulArgs a = args;
  constexpr int kSteps = 16 / F::step_k;
  const TokenBlocks blocks(a.rows, block_tokens<F>);
  const int64_t first = a.tile * kSteps;
  for (int b = 0; b < blocks.count; b++) {
    const int64_t width = blocks.width(b);
    for (int64_t j = 0; j < width; j++) {
      const int64_t row = blocks.start(b) + j;
      alignas(64) uint32_t steps[16];
      to_steps<F::step_k>(mul(silu(load(a.gate + row * 16)), load(a.up + row * 16)), steps);
      uint32_t* out = a.out + blocks.start(b) * a.steps + first * width + j;
      for (int64_t i = 0; i < kSteps && first + i < a.steps; i++) out[i * width] = steps[i];
    }
  }
}

inline void add_rows(const AddRowsArgs& args) {
  const AddRowsArgs a = args;
  for (int r = 0; r < a.rows; r++) {
    const F32 weight = set1(a.weights[r]), sums = load(a.sums + r * 16);
    float* y = a.y + a.tokens[r] * a.stride;
    if (a.cols == 16) {
      store(y, fma(weight, sums, load(y)));
      continue;
    }
    float some[16] = {};
    for (int i = 0; i < a.cols; i++) some[i] = y[i];
    store(some, fma(weight, sums, load(some)));
    for (int i = 0; i < a.cols; i++) y[i] = some[i];
  }
}

template <class F> constexpr FormatKernels kFormatKernels = {&pack<F>, &gemm<F>, &silu_mul<F>};

constexpr KernelTable make_kernel_table(const char* name, uint32_t needs) {
  return {name, needs, {kFormatKernels<Fp32>, kFormatKernels<Bf16>, kFormatKernels<Fp8>}, &add_rows};
}

}  // namespace
}  // namespace hetero
