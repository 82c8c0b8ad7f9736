// FP8 E4M3 (the "fn" variant) to float, exact, and back, to the nearest (ties to even): 4 exponent bits (bias 7), 3 mantissa
// bits, no infinity, largest value 448; codes 0x7f and 0xff are NaN; subnormals are mantissa * 2^-9. Every value is a normal
// bf16 (or zero, or NaN).
#pragma once
#include "base/bits.h"

namespace hetero {
namespace {

[[maybe_unused]] constexpr float kE4m3Max = 448;

[[maybe_unused]] constexpr float e4m3_to_float(uint8_t code) {
  const uint32_t sign = uint32_t{code} >> 7 << 31, exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return as_float(sign | 0x7fc00000);
  if (exponent == 0) return as_float(sign | as_bits(static_cast<float>(mantissa) * 0x1p-9f));
  return as_float(sign | (exponent + 120) << 23 | mantissa << 20);
}

[[maybe_unused]] constexpr uint8_t float_to_e4m3(float x) {
  const uint32_t sign = as_bits(x) >> 24 & 128, size = as_bits(x) & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint8_t>(sign | 127);
  if (size > as_bits(kE4m3Max)) return static_cast<uint8_t>(sign | 126);
  if (size < as_bits(0x1p-6f)) {  // a float of 2^14 counts in steps of 2^-9
    return static_cast<uint8_t>(sign | (as_bits(as_float(size) + 0x1p14f) - as_bits(0x1p14f)));
  }
  return static_cast<uint8_t>(sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

}  // namespace
}  // namespace hetero
