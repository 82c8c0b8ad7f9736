// FP32: fp32 weights and fp32 activations, tile [K][32]. One FMA chain per (row, token) in the order of K on every ISA,
// so that all ISAs give the same bits. Not a speed format: it holds the whole engine to an oracle.
#pragma once
#include "format/format.h"

namespace hetero {
namespace {

struct Fp32 {
  static constexpr Format id = Format::fp32;
  static constexpr const char* name = "FP32";
  using Code = float;
  static constexpr int line_k = 1, scale_block = 0, step_k = 1;
  static constexpr int place(int k) { return k; }
  static constexpr float decode(Code code) { return code; }
  static constexpr Code encode(float value) { return value; }
};

}  // namespace
}  // namespace hetero
