// IEEE half precision to float, exact: 5 exponent bits (bias 15), 10 mantissa bits, subnormals are mantissa * 2^-24.
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

}  // namespace
}  // namespace hetero
