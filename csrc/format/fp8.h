// FP8: E4M3 weights with one fp32 scale per 128 x 128 block ("weight_scale_inv" of a GLM-5-FP8 checkpoint, kept bit for
// bit), bf16 activations. w = e4m3(code) * scale[row / 128][k / 128]; rows and columns are the true ones, so the last block
// of a ragged matrix is smaller. A tile's 32 rows lie in one block row: it carries that row's scales.
// Tile [K/4][32][4], the 4 bytes in the order k0 k2 k1 k3: the even bytes widen to the neighbouring pair (k0, k1) and the
// odd ones to (k2, k3), so BF16's packed activations serve unchanged.
#pragma once
#include "base/fp8.h"
#include "format/format.h"

namespace hetero {
namespace {

struct Fp8 {
  static constexpr Format id = Format::fp8;
  static constexpr const char* name = "FP8";
  using Code = uint8_t;
  static constexpr int line_k = 4, scale_block = kScaleBlock, step_k = 2;
  static constexpr int place(int k) { return (k & 1) << 1 | k >> 1; }
  static constexpr float decode(Code code) { return e4m3_to_float(code); }
};

}  // namespace
}  // namespace hetero
