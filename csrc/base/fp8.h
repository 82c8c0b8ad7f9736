// FP8 E4M3 (the "fn" variant) to float, exact: 4 exponent bits (bias 7), 3 mantissa bits, no infinity, largest value 448;
// codes 0x7f and 0xff are NaN; subnormals are mantissa * 2^-9. Every value is a normal bf16 (or zero, or NaN).
#pragma once
#include "base/bits.h"

namespace hetero {
namespace {

[[maybe_unused]] constexpr float e4m3_to_float(uint8_t code) {
  const uint32_t sign = uint32_t{code} >> 7 << 31, exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return as_float(sign | 0x7fc00000);
  if (exponent == 0) return as_float(sign | as_bits(static_cast<float>(mantissa) * 0x1p-9f));
  return as_float(sign | (exponent + 120) << 23 | mantissa << 20);
}

}  // namespace
}  // namespace hetero
