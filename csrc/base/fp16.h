// IEEE half precision: 5 exponent bits (bias 15), 10 mantissa bits, subnormals are mantissa * 2^-24. To float it is exact; from
// float it is rounded to nearest, ties to even, beyond 65504 to infinity; a NaN stays a NaN (quiet, sign kept).
#pragma once
#include "base/bits.h"

namespace hetero {
namespace {

[[maybe_unused]] constexpr float fp16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return as_float(sign | as_bits(static_cast<float>(mantissa) * 0x1p-24f));
  return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

[[maybe_unused]] constexpr uint16_t float_to_fp16(float value) {
  const uint32_t bits = as_bits(value), sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 1023));
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000)  // below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded
    return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
  return static_cast<uint16_t>(sign | (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace
}  // namespace hetero
