// bfloat16 is the upper half of a float. Rounding: to nearest, ties to even; a NaN stays a NaN (quiet, sign kept).
#pragma once
#include "base/bits.h"

namespace hetero {
namespace {

[[maybe_unused]] constexpr float bf16_to_float(uint16_t half) { return as_float(uint32_t{half} << 16); }

[[maybe_unused]] constexpr uint16_t float_to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace
}  // namespace hetero
