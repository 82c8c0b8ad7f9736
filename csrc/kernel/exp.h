// exp: x = n ln2 + r, |r| <= ln2 / 2, n by adding and subtracting 1.5 * 2^23; e^r by the Cephes degree-6 polynomial (2 ulp);
// 2^n added into the exponent. The argument is clamped to where the result is normal. Only fused and correctly rounded
// operations in a fixed order, so every ISA gives the same bits. silu(g) = g / (1 + e^-g): a NaN in g survives.
#pragma once

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

}  // namespace
}  // namespace hetero
