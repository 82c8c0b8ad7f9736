// BF16: bf16 weights, activations rounded to bf16 once, fp32 sums, tile [K/2][32][2]. Error of a weight: 2^-9 relative.
#pragma once
#include "base/bf16.h"
#include "format/format.h"

namespace hetero {
namespace {

struct Bf16 {
  static constexpr Format id = Format::bf16;
  static constexpr const char* name = "BF16";
  using Code = uint16_t;
  static constexpr int line_k = 2, scale_block = 0, step_k = 2;
  static constexpr int place(int k) { return k; }
  static constexpr float decode(Code code) { return bf16_to_float(code); }
  static constexpr Code encode(float value) { return float_to_bf16(value); }
};

}  // namespace
}  // namespace hetero
